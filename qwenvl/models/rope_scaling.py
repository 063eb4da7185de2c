"""Contexts beyond the length a checkpoint was trained for, by YaRN (Peng et al., 2023, arXiv 2309.00071).

transformers and vLLM compute YaRN themselves from the config. What is done here is to write its settings there, as
Qwen3-VL's model card has them ("Processing Ultra-Long Texts"): rotary base, M-RoPE sections and their interleaving
stay those of the checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

from qwenvl.models.lora.files import TRAINED_CONFIG, read_config, start_anew
from qwenvl.utils.errors import UserError


def extend_context(config: Any, factor: float, native_length: int | None = None) -> None:
    """Set a config to a context of ``factor`` x its native length, whether or not it has been extended before.

    Args:
        config: of a checkpoint; its text config is changed in place. The model has to be built from it.
        factor: of the native length, above 1.
        native_length: positions that the checkpoint was trained for. None for what it says itself:
            ``original_max_position_embeddings`` where it has been extended, else ``max_position_embeddings``.

    Raises:
        UserError: its context is already extended in another way than by YaRN.
    """
    text = config.get_text_config()
    rope = dict(text.rope_parameters)
    if rope["rope_type"] not in ("default", "yarn"):
        raise UserError(
            f"--rope_scaling yarn: the checkpoint's config.json has rope_type {rope['rope_type']!r}, another way to "
            "extend the context, and the two do not combine. Leave --rope_scaling out, or start from a checkpoint "
            "without it."
        )
    native = native_length or rope.get("original_max_position_embeddings") or text.max_position_embeddings
    rope.pop("type", None)  # Qwen2-VL's older name of rope_type, where it says mrope; vLLM refuses two that differ
    rope |= {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": int(native)}
    text.rope_parameters = rope
    text.max_position_embeddings = int(native * factor)


def context_length(config: Any) -> int:
    """Return the positions that a model is made for: the native ones, times the factor of YaRN.

    A picture of h x w tokens takes max(h, w) positions, so that samples may have more tokens than that.
    """
    return int(config.get_text_config().max_position_embeddings)


def read_extension(folder: str | Path, base: str, **origin: Any) -> dict[str, Any]:
    """Return what of the text config adapters were trained with that their base does not have: an extended context.

    Args:
        folder: Folder of adapters.
        base: Their checkpoint.
        origin: Options of ``from_pretrained``.

    Returns:
        ``rope_parameters`` and ``max_position_embeddings``; nothing where the context is that of the base.
    """
    if not (Path(folder) / TRAINED_CONFIG).is_file():
        return {}
    trained, native = (read_config(*pair, **origin).get_text_config() for pair in ((folder, base), (base, base)))
    if _scaling(dict(trained.rope_parameters)) == _scaling(dict(native.rope_parameters)):
        return {}
    return {name: getattr(trained, name) for name in ("rope_parameters", "max_position_embeddings")}


def describe_context(config: Any) -> str:
    """Return the positions that a model is made for, in words."""
    rope = config.get_text_config().rope_parameters
    text = f"{context_length(config):,} positions"
    if rope["rope_type"] != "yarn":
        return text
    return f"{text}, {rope['factor']:g} x the native {rope['original_max_position_embeddings']:,}, by YaRN"


def require_same_context(config: Any, checkpoint: str) -> None:
    """Check that a checkpoint was trained with the context of the run that resumes from it.

    Args:
        config: of the run's model.
        checkpoint: folder of a model or of adapters.

    Raises:
        UserError: it was trained with another one: same weights, other positions.
    """
    adapted = (Path(checkpoint) / TRAINED_CONFIG).is_file()
    saved, _ = PreTrainedConfig.get_config_dict(
        checkpoint, **({"_configuration_file": TRAINED_CONFIG} if adapted else {})
    )
    there, here = _scaling(saved.get("text_config", saved).get("rope_parameters") or {}), _scaling(_rope(config))
    if there != here:
        raise UserError(
            f"{checkpoint} was trained with {_told(there)}, and this run has {_told(here)}. Resume with the settings "
            f"of {Path(checkpoint) / 'training_args.yaml'} (--rope_scaling, --rope_factor, --rope_native_length); or "
            f"{start_anew(checkpoint)}."
        )


def _rope(config: Any) -> dict[str, Any]:
    return dict(config.get_text_config().rope_parameters)


def _scaling(rope: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(rope.get(name) for name in ("factor", "original_max_position_embeddings"))


def _told(scaling: tuple[Any, ...]) -> str:
    factor, native = scaling
    return "the native context" if factor is None else f"a context of {factor:g} x {native} positions"
