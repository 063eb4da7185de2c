"""Merge adapters into the weights they adapt, and check the result."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from qwenvl.families import OLDER_NAMES
from qwenvl.models.fingerprints import checksum
from qwenvl.models.float32_compute import computing_in_float32
from qwenvl.models.loading import load_model
from qwenvl.models.lora.files import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    newer_name,
    read_config,
    require_same_names,
)
from qwenvl.utils.errors import UserError

logger = logging.getLogger(__name__)

TOLERANCE = 2e-5
"""Largest accepted relative difference (norm of the difference / norm) between outputs before and after merging, of the
model or of a layer, in float32. Ten times the difference measured for the logits of a 2B model."""

_PROBES = 16  # random input rows that a layer is compared on

_LISTED = 6


@dataclass(frozen=True, slots=True)
class MergeReport:
    """Effects of merging. Distances of logits are norm of the difference / norm, computed in float32.

    Args:
        changed: Number of adapted weights that changed.
        unchanged: Names of adapted weights that did not change.
        effect: Distance of the sample's logits with and without adapters.
        error: Distance of the sample's logits before and after merging.
        rounding: Distance of the sample's logits before and after rounding the merged weights to the checkpoint's type.
    """

    changed: int
    unchanged: tuple[str, ...]
    effect: float
    error: float
    rounding: float


def open_adapted(
    base: str, adapter: str, dtype: torch.dtype, *, cache_dir: str | None = None, trust_remote_code: bool = False
) -> Any:
    """Open a checkpoint with a folder of adapters by PEFT, and check that every tensor of the folder was loaded.

    Names from older versions of transformers (:data:`~qwenvl.families.OLDER_NAMES`) are read too.

    Args:
        base: Checkpoint that the adapters were trained on.
        adapter: Folder of adapters written by PEFT or this trainer.
        dtype: Data type of the weights.
        cache_dir: Folder of downloads.
        trust_remote_code: Whether to run Python code that comes with the checkpoint.

    Returns:
        ``PeftModel`` in evaluation mode.

    Raises:
        UserError: The adapters do not fit the checkpoint.
    """
    from peft import PeftModel, get_peft_model_state_dict

    path = Path(adapter) / WEIGHTS_FILE
    if not path.is_file() or not (Path(adapter) / CONFIG_FILE).is_file():
        raise UserError(f"--adapter {adapter} holds no {CONFIG_FILE} with {WEIGHTS_FILE}.")
    origin: dict[str, Any] = {"cache_dir": cache_dir, "trust_remote_code": trust_remote_code}
    config = read_config(adapter, base, **origin)
    model = load_model(base, dtype=dtype, attn_implementation="sdpa", config=config, **origin)
    with safe_open(path, "pt") as file:
        saved = {name: newer_name(name) for name in file.keys()}  # noqa: SIM118 (not a dictionary)
    renamed = any(name != newer for name, newer in saved.items())
    try:
        adapted = PeftModel.from_pretrained(model, adapter, key_mapping=OLDER_NAMES if renamed else None)
    except (RuntimeError, ValueError, KeyError) as error:  # shapes that differ, layers or tensors that are not there
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{adapter} does not fit {base}: {first} Was it trained on another checkpoint?") from error
    require_same_names(
        path, set(saved.values()), get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    )
    return adapted.eval()


def merge(adapted: Any, processor: Any) -> tuple[PreTrainedModel, MergeReport]:
    """Merge adapters into their weights and compare the logits of a sample before and after.

    Logits are computed and weights merged in float32, so that any difference is a mistake. The merged weights are then
    rounded, once.

    Args:
        adapted: Model from :func:`open_adapted`; not usable afterwards.
        processor: Processor of the checkpoint, for a sample of an image with a question.

    Returns:
        The stock model and a report.

    Raises:
        UserError: No weight changed, or the logits did.
    """
    inputs = sample_inputs(processor, adapted.device)
    with adapted.disable_adapter():
        plain = logits_of(adapted, inputs)
    unmerged = logits_of(adapted, inputs)
    merged = logits_of(adapted, inputs, merged=True)
    before = {name: checksum(weight) for name, weight in _adapted_weights(adapted)}
    model = _merge_and_unload(adapted)
    unchanged = tuple(name for name, found in before.items() if checksum(model.get_parameter(name)) == found)
    report = MergeReport(
        changed=len(before) - len(unchanged),
        unchanged=unchanged,
        effect=distance(plain, unmerged),
        error=distance(merged, unmerged),
        rounding=distance(logits_of(model, inputs), merged),
    )
    _require_sound(report)
    return model, report


def _merge_and_unload(adapted: Any) -> PreTrainedModel:
    """Merge each layer in float32, then round it to its own type; PEFT would round the adapters' product as well."""
    for name, layer in _adapted_layers(adapted.get_base_model()):
        _merge_layer(name, layer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?i)already.*merged")  # PEFT warns for each layer; they are, on purpose
        model: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    return model


def _merge_layer(name: str, layer: Any) -> None:
    """Merge one layer, and compare its outputs before and after.

    The logits alone do not show every mistake: among hundreds of adapters, a scale that is wrong by 5% in one of them
    changes the logits by less than float32 rounding. The output of its own layer shows it.

    Raises:
        UserError: The outputs differ.
    """
    own = [(parameter, parameter.dtype) for parameter in layer.parameters()]
    for parameter, _ in own:
        parameter.data = parameter.data.float()
    inputs = _probes(layer)
    with torch.no_grad():
        unmerged = layer(*inputs)
        layer.merge(safe_merge=True)
        errors = map(distance, *(_by_expert(layer, outputs) for outputs in (layer(*inputs), unmerged)))
    error = float(torch.tensor(list(errors)).max())  # not a number, if one of them is not
    if not error <= TOLERANCE:
        raise UserError(
            f"{name} computes something else when its adapter is merged: in float32 its outputs differ by "
            f"{error:.2g} of their norm; rounding explains at most {TOLERANCE:g}. Nothing was saved. Please report "
            "this, with the version of peft."
        )
    for parameter, dtype in own:
        parameter.data = parameter.data.to(dtype)


def _probes(layer: Any) -> tuple[Tensor, ...]:
    """Return random inputs of a layer [rows, in]; of stacked experts, as many rows for each, with their routing."""
    weight, experts = _weight_of(layer), _experts_of(layer)
    # the inner module of stacked experts takes hidden states, whichever of its projections has the adapter
    width = layer.get_base_layer().hidden_dim if experts else weight.shape[1]
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(_PROBES * max(experts, 1), width, generator=generator).to(weight.device)
    if not experts:
        return (rows,)
    chosen = torch.arange(experts, device=weight.device).repeat_interleave(_PROBES)[:, None]
    return rows, chosen, torch.ones_like(chosen, dtype=rows.dtype)


def _by_expert(layer: Any, outputs: Tensor) -> Sequence[Tensor]:
    """Split the outputs of :func:`_probes`: among hundreds of experts, a mistake in one would not show."""
    return outputs.chunk(max(_experts_of(layer), 1))


def _experts_of(layer: Any) -> int:
    """Return the number of experts of a layer; 0 for a linear layer."""
    weight = _weight_of(layer)
    return len(weight) if weight.ndim == 3 else 0


def _weight_of(layer: Any) -> Tensor:
    """Return the weight that an adapter of PEFT changes."""
    weight: Tensor = getattr(layer.get_base_layer(), getattr(layer, "parameter_name", "weight"))
    return weight


def _require_sound(report: MergeReport) -> None:
    if not report.changed:
        raise UserError(
            f"None of the {len(report.unchanged)} adapted weights changed: the adapters are zero, as before training, "
            "or smaller than the last digit of the weights (--dtype float32)."
        )
    if report.unchanged:
        names = ", ".join(report.unchanged[:_LISTED])
        logger.warning("%d adapted weights did not change: %s", len(report.unchanged), names)
    if not report.error <= TOLERANCE:
        raise UserError(
            f"Merged weights give other logits than the adapters: in float32 they differ by {report.error:.2g} of "
            f"their norm; rounding explains at most {TOLERANCE:g}. Nothing was saved. Please report this, with the "
            "version of peft."
        )
    if 2 * report.rounding > report.effect:
        logger.warning(
            "The adapters change the logits by %.2g of their norm, and rounding the merged weights by %.2g, so that "
            "rounding hides much of the training. --dtype float32 merges without rounding.",
            *(report.effect, report.rounding),
        )


def sample_inputs(processor: Any, device: torch.device) -> Any:
    """Return the inputs that a stock processor makes from a small image and a question."""
    image = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
    content = [{"type": "image"}, {"type": "text", "text": "What does this image show?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return processor(text=[text], images=[image], return_tensors="pt").to(device)


def logits_of(model: Any, inputs: Any, *, merged: bool = False) -> Tensor:
    """Return logits [T, V], computed in float32, on the host.

    Args:
        model: Model with weights of any data type.
        inputs: Result of :func:`sample_inputs`.
        merged: Whether to merge each adapter into its weight while its layer runs.
    """
    hooks = (_merge_part, _forget_part) if merged else ()
    with torch.no_grad(), computing_in_float32(model, *hooks):
        logits: Tensor = model(**inputs).logits[0].float().cpu()
    return logits


def _merge_part(part: nn.Module) -> None:
    for _, layer in _adapted_layers(part):
        layer.merge(safe_merge=True)  # into a copy: a float32 weight was not converted, it is the model's own


def _forget_part(part: nn.Module) -> None:
    """Mark the layers as not merged; their own weights are back in place."""
    for _, layer in _adapted_layers(part):
        layer.merged_adapters.clear()


def distance(first: Tensor, second: Tensor) -> float:
    """Return norm of the difference / norm of the second."""
    return float((first - second).norm() / second.norm())


def _adapted_weights(adapted: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight with an adapter, by its stock name."""
    for name, layer in _adapted_layers(adapted.get_base_model()):
        own = name.removesuffix(".base_layer")  # around a module of stacked experts there are two layers
        yield f"{own}.{getattr(layer, 'parameter_name', 'weight')}", _weight_of(layer)


def _adapted_layers(module: nn.Module) -> Iterator[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in module.named_modules():
        if isinstance(layer, BaseTunerLayer) and hasattr(layer, "lora_A"):
            yield name, layer
