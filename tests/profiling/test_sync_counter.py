"""Nothing in a micro-batch makes the host wait for the device; and what would is counted."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from transformers import TrainerCallback

from qwenvl.models.attention.packed import attend_by_segments
from qwenvl.models.trainable.freezing import configure_checkpointing
from qwenvl.models.vision.grid_inputs import grid_describer, shown_grids
from qwenvl.profiling.sync_counter import SyncCounter
from qwenvl.tasks.objective import causal_loss
from tests.e2e.runs import flags, torchrun
from tests.patches import install, patchify_of


def micro_batch(model: Any, batch: dict[str, Any]) -> Counter[str]:
    """Return the waits of forward and backward pass of a prepared batch that has reached the device."""
    grids = shown_grids(batch.get("media", ()), model.model.visual.config.spatial_merge_size)
    batch = {**batch, "vision_grids": grid_describer(model.model.visual).describe(grids)}
    patchify = patchify_of(model.config._name_or_path)  # on the device from the first batch on
    with SyncCounter((*model.parameters(), *model.buffers(), *patchify.buffers(), batch)) as counter:
        causal_loss(model, batch, num_trained_tokens=10.0).backward()
    return counter.waits


@pytest.mark.parametrize("contents", [["text", "video, image"], ["text"]], ids=["media", "text alone"])
def test_a_micro_batch_waits_nowhere(contents, family_name, layout, load_tiny, mixture, make_batch):
    model = load_tiny(family_name)
    install(model)
    attend_by_segments(model)
    configure_checkpointing(model, "both")
    waits = micro_batch(model, make_batch(layout, [mixture(family_name)[name] for name in contents]))
    assert not waits, "\n".join(f"{count} x {what}" for what, count in waits.items())


class Tower(torch.nn.Module):
    """A layer that waits in a way that its name tells."""

    def __init__(self, wait: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.wait, self.layer = wait, torch.nn.Linear(4, 4)

    def forward(self, states: Tensor) -> Tensor:
        states = self.layer(states)
        self.wait(states)
        return states


WAITS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "item": (lambda x: x.sum().item(), "_local_scalar_dense"),
    "float": (lambda x: float(x.detach()[0, 0]), "_local_scalar_dense"),
    "if": (lambda x: bool(x.isnan().any()), "_local_scalar_dense"),
    "tolist": (lambda x: x.tolist(), "Tensor.tolist"),
    "numpy": (lambda x: x.detach().numpy(), "Tensor.numpy"),
    "cpu": (lambda x: x.cpu(), "Tensor.cpu"),
    "nonzero": (lambda x: x.nonzero(), "nonzero"),
    "where": (lambda x: torch.where(x > 0), "nonzero"),
    "mask": (lambda x: x[x > 0], "index.Tensor"),
    "fill": (lambda x: x.clone().index_put_((x > 0,), x.new_ones(1)), "index_put_"),
    "select": (lambda x: x.masked_select(x > 0), "masked_select"),
    "repeat": (lambda x: torch.repeat_interleave(x.detach().abs()[0].long()), "repeat_interleave"),
    "unique": (lambda x: x.unique(), "_unique2"),
    "made": (lambda x: torch.tensor([1.0], device=x.device) + x, "torch.tensor on the device"),
    "copied": (lambda x: torch.ones(4).to(x.device) + x, "Tensor.to without non_blocking"),
}
HARMLESS: dict[str, Callable[[Tensor], Any]] = {
    "copied without blocking": lambda x: torch.ones(4).to(x.device, non_blocking=True) + x,
    "repeat of known size": lambda x: torch.repeat_interleave(x.detach().abs()[0].long() * 0, output_size=0),
    "cast": lambda x: x.to(torch.bfloat16).to(x.device, torch.float32),
    "rows": lambda x: x[torch.tensor([0, 1])] + x.index_select(0, torch.tensor([1, 0])),
    "numbers of the host": lambda x: [torch.arange(3).tolist(), torch.ones(2).nonzero(), int(torch.ones(()))],
}


@pytest.mark.parametrize("name", WAITS)
def test_every_kind_of_wait_is_counted_with_its_place(name):
    wait, operator = WAITS[name]
    model = Tower(wait)
    with SyncCounter(model.parameters()) as counter:
        model(torch.ones(2, 4))
    ((what, count),) = counter.waits.items()
    assert count == 1 and operator in what and "tests/profiling/test_sync_counter.py:" in what


@pytest.mark.parametrize("name", HARMLESS)
def test_what_does_not_wait_is_not_counted(name):
    model = Tower(HARMLESS[name])
    with SyncCounter(model.parameters()) as counter:
        model(torch.ones(2, 4)).sum().backward()
    assert not counter.waits
    model.layer.weight.sum().item()
    assert not counter.waits, "it counted after its end"


def test_a_wait_of_the_backward_pass_is_counted():
    """The one that scattering by a mask has, and index_copy has not."""
    weight = torch.ones(3, 2, requires_grad=True)
    mask = torch.tensor([[True], [False], [True]])
    with SyncCounter((weight, mask)) as counter:
        torch.zeros(3, 2).masked_scatter(mask, weight).sum().backward()
    assert any("masked_scatter_backward" in what for what in counter.waits)


class Micro(TrainerCallback):
    """Counts from the first micro-batch of a step, after its batches are there, to the start of the second."""

    def __init__(self, model: Any) -> None:
        self.counter = SyncCounter((*model.parameters(), *model.buffers()))
        self.waits: list[Counter[str]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.counter.waits = Counter()
        self.counter.__enter__()

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.counter.__exit__(None, None, None)
        self.waits.append(self.counter.waits)


@pytest.mark.parametrize("settings", [{"data_flatten": True}, {}], ids=["flattened", "padded"])
def test_the_trainer_adds_no_wait(settings, trainer_of):
    """Copies of the batch included, which are on their way while earlier work runs."""
    trainer = trainer_of(gradient_accumulation_steps=2, max_steps=2, gradient_checkpointing=True, **settings)
    micro = Micro(trainer.model)
    trainer.add_callback(micro)
    trainer.train()
    first, second = micro.waits
    assert len(first) == 1 and "models/forward.py" in str(first), "mean and deviation of the pixels, once a run"
    assert not second


def test_a_single_process_needs_no_device_to_agree_with_itself(trainer_of):
    trainer = trainer_of()
    with SyncCounter((*trainer.model.parameters(),)) as counter:
        assert trainer._over_ranks(True, 2.5) == [1.0, 2.5]
    assert not counter.waits


RUNNER = """
import json, sys
from pathlib import Path
from qwenvl.config import parse_arguments
from qwenvl.profiling.sync_counter import SyncCounter
from qwenvl.train import run as setup
from qwenvl.train.trainer import Trainer
from qwenvl.utils.distributed import rank, run_program, shut_down


class Watched(Trainer):
    def train(self, **options):
        sums = vars(self.running_loss).values()
        counter = SyncCounter((*self.model.parameters(), *self.model.buffers(), *sums))
        with counter:
            result = super().train(**options)
        found = {"all": counter.collectives, "of the host": counter.of_host}
        Path(f"{sys.argv[1]}.{rank()}").write_text(json.dumps(found))
        return result


setup.Trainer = Watched
assert setup.run(parse_arguments(json.load(open(sys.argv[1])))) == 0
shut_down()
run_program(lambda: 0)
"""


@pytest.mark.slow
def test_collectives_carry_tensors_of_the_device(tiny_checkpoint, registry, tmp_path):
    """Of steps, evaluations and checkpoints: NCCL would refuse a tensor of the host, which gloo takes."""
    settings = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "eval_dataset_use": "held_out"}
    settings |= {"logging_steps": 1, "save_strategy": "steps", "save_steps": 2, "per_device_train_batch_size": 1}
    (tmp_path / "runner.py").write_text(RUNNER)
    command = flags(tiny_checkpoint("qwen3_vl"), tmp_path / "out", registry, **settings)
    (tmp_path / "command.json").write_text(json.dumps(command))
    torchrun(tmp_path / "runner.py", str(tmp_path / "command.json"))
    for rank in range(2):
        found = json.loads((tmp_path / f"command.json.{rank}").read_text())
        # DDP's constructor compares shapes in C++, and copies them to the device first
        ours = [what for what in found["of the host"] if " at site-packages/accelerate/accelerator.py:" not in what]
        assert not ours and sum(found["all"].values()) > 10, found
        assert len(found["all"]) > 2, "reductions, gathers and broadcasts"


def test_a_collective_of_the_host_is_found():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        device, host = torch.ones(2), torch.ones(2)
        with SyncCounter([device]) as counter:
            dist.all_reduce(device * 2)
            assert not counter.of_host
            dist.all_reduce(host)
    finally:
        dist.destroy_process_group()
    assert sum(counter.collectives.values()) == 2
    ((what, count),) = counter.of_host.items()
    assert count == 1 and what.startswith("c10d::allreduce_ at tests/profiling/test_sync_counter.py:")
