"""Extend the context beyond a checkpoint's native length by YaRN (Peng et al., 2023, arXiv 2309.00071).

transformers and vLLM compute YaRN themselves from the config. This module writes its settings into the config, as
Qwen3-VL's model card describes ("Processing Ultra-Long Texts"). Rotary base, M-RoPE sections and their interleaving
do not change.
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
        config: Config of a checkpoint, to build the model from; its text config is changed in place.
        factor: Ratio of the extended to the native length, above 1.
        native_length: Positions that the checkpoint was trained for. None for the config's own value:
            ``original_max_position_embeddings`` if its context is extended, else ``max_position_embeddings``.

    Raises:
        UserError: Its context is already extended by another method than YaRN.
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
    """Return the number of positions that a model supports: the native ones, times the factor of YaRN.

    An image of h x w tokens takes max(h, w) positions, so that samples may have more tokens than positions.
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
    """Return the number of positions that a model supports, in words."""
    rope = config.get_text_config().rope_parameters
    text = f"{context_length(config):,} positions"
    if rope["rope_type"] != "yarn":
        return text
    return f"{text}, {rope['factor']:g} x the native {rope['original_max_position_embeddings']:,}, by YaRN"


def require_same_context(config: Any, checkpoint: str) -> None:
    """Check that a checkpoint was trained with the context of the run that resumes from it.

    Args:
        config: Config of the run's model.
        checkpoint: Folder of a model or of adapters.

    Raises:
        UserError: It was trained with another context: the same weights with other positions.
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
