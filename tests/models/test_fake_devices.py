"""The forward pass on CUDA, without a GPU: tensors that have shapes and devices, but no memory, and may not be mixed.

The attention is torch's own varlen kernel, whose shapes torch knows. The backward pass would need a driver.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from qwenvl.models import forward
from qwenvl.models.attention.packed import attend_by_segments
from qwenvl.models.attention.varlen import torch_kernel
from qwenvl.models.lora.adapters import AdapterSettings, add_adapters
from qwenvl.models.lora.new_tokens import train_rows
from qwenvl.models.vision.grid_inputs import grid_describer, shown_grids
from qwenvl.models.vision.patchify import Patchify
from qwenvl.tasks.objective import causal_loss
from tests.patches import patchify_of

CUDA = torch.device("cuda")


class FakeCuda:
    """Makes fake tensors of real ones: on the host, or on a CUDA device."""

    def __init__(self) -> None:
        self.mode = FakeTensorMode()
        self._known: dict[int, Any] = {}

    def host(self, tensor: Tensor) -> Tensor:
        return self.mode.from_tensor(tensor)

    def device(self, tensor: Tensor) -> Tensor:
        shape = self.host(tensor.detach())
        with self.mode:
            return shape.to(CUDA)

    def parameter(self, parameter: nn.Parameter) -> nn.Parameter:
        """Return the same for the same, so that tied weights stay tied."""
        if id(parameter) not in self._known:
            fake = nn.Parameter(self.device(parameter), requires_grad=parameter.requires_grad)
            self._known[id(parameter)] = (parameter, fake)
        return self._known[id(parameter)][1]  # type: ignore[no-any-return]

    def move(self, model: nn.Module) -> None:
        """Replace all parameters and buffers of a model."""
        for module in model.modules():
            for name, parameter in module._parameters.items():
                module._parameters[name] = None if parameter is None else self.parameter(parameter)
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else self.device(buffer)


def host_patchify(fake: FakeCuda, folder: str) -> Patchify:
    real = patchify_of(folder)
    sizes = real.patch_size, real.merge_size, real.temporal_patch_size
    return Patchify(*sizes, fake.host(real.mean), fake.host(real.std))


def open_fake(load_tiny: Any, family: str, *parts: str) -> tuple[FakeCuda, Any]:
    """Return a tiny model in bfloat16 on a fake CUDA device, ready for training whole or in parts."""
    fake, model = FakeCuda(), load_tiny(family)
    forward.install(model, host_patchify(fake, model.config._name_or_path))
    model.requires_grad_(not parts)
    if "LoRA" in parts:
        add_adapters(model, AdapterSettings("language", 4, 8, dropout=0.1))
    if "added tokens" in parts:
        train_rows(model, [5, 9])
    attend_by_segments(model, torch_kernel())
    model.set_experts_implementation("batched_mm")  # the default asks the driver for the GPU's generation
    fake.move(model.to(torch.bfloat16))
    return fake, model


def run(fake: FakeCuda, model: Any, batch: dict[str, Any]) -> Tensor:
    grids = shown_grids(batch.get("media", ()), model.model.visual.config.spatial_merge_size)
    batch = {**batch, "vision_grids": grid_describer(model.model.visual).describe(grids)}
    moved = tree_map(lambda value: fake.device(value) if isinstance(value, Tensor) else value, batch)
    with fake.mode:
        return causal_loss(model, moved, num_trained_tokens=10.0)


@pytest.mark.parametrize("parts", [(), ("LoRA",), ("LoRA", "added tokens")], ids=["whole", "LoRA", "added tokens"])
def test_no_tensor_of_the_host_meets_one_of_the_device(parts, family_name, load_tiny, mixture, make_batch):
    samples = mixture(family_name)
    media = [samples[name] for name in ("text", "two images", "video, image")]
    fake, model = open_fake(load_tiny, family_name, *parts)
    for layout, shown in (("flattened", media), ("padded", media), ("flattened", [samples["text"]])):
        loss = run(fake, model, make_batch(layout, shown))
        assert (loss.device.type, loss.dtype, loss.requires_grad) == ("cuda", torch.float32, True)


def test_a_tensor_left_on_the_host_is_found(load_tiny, mixture, make_batch):
    fake, model = open_fake(load_tiny, "qwen3_vl")
    batch = make_batch("flattened", [mixture("qwen3_vl")["image"]])
    norm = model.model.language_model.norm
    norm.weight = nn.Parameter(fake.host(torch.ones(norm.weight.shape, dtype=torch.bfloat16)))
    with pytest.raises(RuntimeError, match="device"):
        run(fake, model, batch)
