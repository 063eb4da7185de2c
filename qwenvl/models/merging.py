"""Adapters put into the weights they adapt, with the checks that show that this happened."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from qwenvl.models.adapter_files import CONFIG_FILE, WEIGHTS_FILE, read_config, require_same_names
from qwenvl.models.loading import load_model
from qwenvl.utilities.errors import UserError

logger = logging.getLogger(__name__)

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""How far logits may move by merging: norm of the difference / norm. Rounding of weights is all that moves them."""

_LISTED = 6


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What merging did.

    Args:
        changed: adapted weights that changed.
        unchanged: names of those that did not.
        effect: how far the adapters moved the logits of the sample: norm of the difference / norm.
        error: how far merging moved them.
        tolerance: up to which ``error`` counts as rounding.
    """

    changed: int
    unchanged: tuple[str, ...]
    effect: float
    error: float
    tolerance: float


def open_adapted(
    base: str, adapter: str, dtype: torch.dtype, *, cache_dir: str | None = None, trust_remote_code: bool = False
) -> Any:
    """Open a checkpoint with a folder of adapters on it, by PEFT; every tensor of the folder finds its place.

    Args:
        base: checkpoint that the adapters were trained on.
        adapter: folder that PEFT or this trainer wrote.
        dtype: of the weights.
        cache_dir: where downloads are kept.
        trust_remote_code: run Python code that comes with the checkpoint.

    Returns:
        ``PeftModel`` in evaluation mode.

    Raises:
        UserError: adapters and checkpoint do not belong together.
    """
    from peft import PeftModel, get_peft_model_state_dict

    path = Path(adapter) / WEIGHTS_FILE
    if not path.is_file() or not (Path(adapter) / CONFIG_FILE).is_file():
        raise UserError(f"--adapter {adapter} holds no {CONFIG_FILE} with {WEIGHTS_FILE}.")
    origin: dict[str, Any] = {"cache_dir": cache_dir, "trust_remote_code": trust_remote_code}
    config = read_config(adapter, base, **origin)
    model = load_model(base, dtype=dtype, attn_implementation="sdpa", config=config, **origin)
    try:
        adapted = PeftModel.from_pretrained(model, adapter)
    except (RuntimeError, ValueError, KeyError) as error:  # shapes that differ, layers or tensors that are not there
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{adapter} does not fit {base}: {first} Was it trained on another checkpoint?") from error
    with safe_open(path, "pt") as file:
        saved = set(file.keys())
    require_same_names(path, saved, get_peft_model_state_dict(adapted, save_embedding_layers=False).keys())
    return adapted.eval()


def merge(adapted: Any, processor: Any) -> tuple[PreTrainedModel, MergeReport]:
    """Merge adapters into their weights and compare the logits of a sample before and after.

    Args:
        adapted: from :func:`open_adapted`; used up.
        processor: makes the sample, a picture with a question.

    Returns:
        The stock model, and what happened.

    Raises:
        UserError: nothing changed, or the logits moved by more than rounding.
    """
    inputs = sample_inputs(processor, adapted.device)
    with adapted.disable_adapter():
        plain = logits_of(adapted, inputs)
    unmerged = logits_of(adapted, inputs)
    before = {name: _fingerprint(weight) for name, weight in _adapted_weights(adapted)}
    model: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    unchanged = tuple(name for name, print_ in before.items() if _fingerprint(model.get_parameter(name)) == print_)
    report = MergeReport(
        changed=len(before) - len(unchanged),
        unchanged=unchanged,
        effect=distance(plain, unmerged),
        error=distance(logits_of(model, inputs), unmerged),
        tolerance=TOLERANCES[model.dtype],
    )
    _require_sound(report)
    return model, report


def _require_sound(report: MergeReport) -> None:
    if not report.changed:
        raise UserError(
            f"None of the {len(report.unchanged)} adapted weights changed: the adapters are zero, as before training, "
            "or smaller than the last digit of the weights (--dtype float32)."
        )
    if report.unchanged:
        names = ", ".join(report.unchanged[:_LISTED])
        logger.warning("%d adapted weights did not change: %s", len(report.unchanged), names)
    if not report.error <= report.tolerance:
        raise UserError(
            f"Merged weights give other logits than the adapters: they differ by {report.error:.2g} of their norm, and "
            f"rounding explains {report.tolerance:g}. Merge with --dtype float32."
        )


def sample_inputs(processor: Any, device: torch.device) -> Any:
    """Return what a stock processor makes of a small picture and a question."""
    picture = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
    content = [{"type": "image"}, {"type": "text", "text": "What does this picture show?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return processor(text=[text], images=[picture], return_tensors="pt").to(device)


def logits_of(model: Any, inputs: Any) -> Tensor:
    """Return logits [T, V], float32 on the host."""
    with torch.no_grad():
        logits: Tensor = model(**inputs).logits[0].float().cpu()
    return logits


def distance(first: Tensor, second: Tensor) -> float:
    """Return the norm of the difference / the norm of the second."""
    return float((first - second).norm() / second.norm())


def _adapted_weights(adapted: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight with an adapter, by its stock name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in adapted.get_base_model().named_modules():
        if isinstance(module, BaseTunerLayer) and hasattr(module, "lora_A"):
            yield f"{name}.weight", module.get_base_layer().weight


def _fingerprint(weight: Tensor) -> tuple[float, float]:
    return float(weight.sum(dtype=torch.float64)), float(weight.double().square().sum())
