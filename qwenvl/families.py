"""Define the model families: their differences that are not in a checkpoint's own files."""

from __future__ import annotations

import importlib
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from types import ModuleType
from typing import Literal

from transformers import PretrainedConfig

from qwenvl.utils.errors import UserError


@dataclass(frozen=True, slots=True)
class ModelLayout:
    """Dotted names of the parts of a model, from the ``...ForConditionalGeneration`` on.

    Args:
        vision: Vision tower, its mergers included.
        mergers: Modules that make tokens of the tower's features.
        patches: First layer of the tower, a convolution whose patches do not overlap; None to leave it alone.
        language: Language model, with ``layers``, ``norm`` and ``embed_tokens``.
        head: Projection to the vocabulary.
        stacked_experts: Modules that hold all experts of a layer in one tensor, from a layer of the language model on.
        linear_attention: Linear attention of a layer of the language model, in the layers that have it.
        sharded: Whether weights may be sharded over ranks: all ranks run the same modules, whatever their samples hold.
    """

    vision: str = "model.visual"
    mergers: tuple[str, ...] = ("model.visual.merger",)
    patches: str | None = "model.visual.patch_embed.proj"
    language: str = "model.language_model"
    head: str = "lm_head"
    stacked_experts: str = "mlp.experts"
    linear_attention: str = "linear_attn"
    sharded: bool = True

    @property
    def embeddings(self) -> str:
        """Token embeddings."""
        return f"{self.language}.embed_tokens"


_WITH_DEEPSTACK = ModelLayout(mergers=("model.visual.merger", "model.visual.deepstack_merger_list"))

OLDER_NAMES = {
    r"^model\.(?=layers\.|embed_tokens\.|norm\.)": "model.language_model.",
    r"^visual\.": "model.visual.",
}
"""Patterns of the layer names of Qwen2-VL and Qwen2.5-VL in transformers before 4.52, and their replacements."""


@dataclass(frozen=True, slots=True)
class Family:
    """Facts about one ``config.model_type``.

    Args:
        model_type: ``config.model_type`` of its checkpoints.
        video_layout: ``clip``: all tokens of a video stand in one span; ``frames``: every pair of frames has its own
            span, after a text timestamp such as ``<1.5 seconds>``.
        timed_positions: Whether temporal M-RoPE positions count seconds (``tokens_per_second`` of the vision config)
            rather than frames.
        moe: Whether feed-forward layers are mixtures of experts.
        linear_attention: Whether some layers are linear attention, whose state crosses packed samples unless its
            kernels get the boundaries.
        mtp: Whether checkpoints hold a layer for multi-token prediction (``mtp.*``), which transformers does not build.
        gated_vision: Whether feed-forward layers of the vision tower are gated: three matrices rather than two.
        plain_positions: Whether the language model counts tokens one by one, also those of images, instead of M-RoPE.
        boxes: Written coordinates of boxes and points. ``relative_1000``: whole numbers from 0 at the left or top edge
            to 1000 at the right or bottom edge; ``resized_pixels``: pixels of the resized image.
        box_text: Written form of a box that stands alone. ``tokens``: between special tokens, as Qwen2-VL was trained
            (its model card); ``list``: numbers in square brackets, as the JSON of the newer cookbooks has it.
        layout: Names of the parts of its model.
    """

    model_type: str
    video_layout: Literal["clip", "frames"]
    timed_positions: bool = False
    moe: bool = False
    linear_attention: bool = False
    mtp: bool = False
    gated_vision: bool = False
    plain_positions: bool = False
    boxes: Literal["relative_1000", "resized_pixels"] = "relative_1000"
    box_text: Literal["tokens", "list"] = "list"
    layout: ModelLayout = ModelLayout()


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("qwen2_vl", video_layout="clip", box_text="tokens"),
        Family("qwen2_5_vl", video_layout="clip", timed_positions=True, gated_vision=True, boxes="resized_pixels"),
        Family("qwen3_vl", video_layout="frames", layout=_WITH_DEEPSTACK),
        Family("qwen3_vl_moe", video_layout="frames", moe=True, layout=_WITH_DEEPSTACK),
        Family("qwen3_5", video_layout="frames", linear_attention=True, mtp=True),
        Family("qwen3_5_moe", video_layout="frames", moe=True, linear_attention=True, mtp=True),
    )
}
"""Families with published checkpoints, by model type."""


_NOT_TRAINED = {
    "qwen4_exp": "Qwen3.8-Flash-Next (model_type qwen4_exp) is not trained here: its indexed attention picks "
    "the tokens that each token sees, which packing here does not know. Use Qwen3.8-27B, or another checkpoint of "
}
"""Published model types that are refused, and why."""


def get_family(model_type: str) -> Family:
    """Return the family of a checkpoint's ``config.model_type``.

    Raises:
        UserError: this trainer does not know the model type.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type in _NOT_TRAINED:
        raise UserError(f"{_NOT_TRAINED[model_type]}{', '.join(FAMILIES)}.")
    own = _own_family(model_type)
    if own is None:
        raise UserError(
            f"model_type {model_type!r} of the checkpoint's config.json is not one this trainer knows: "
            f"{', '.join(FAMILIES)}. Point --model_name_or_path at a checkpoint of one of them."
        )
    family: Family = own.FAMILY
    return family


def register_classes(model_type: str) -> None:
    """Register the classes of a family with transformers' Auto classes, if it is one of this package."""
    own = _own_family(model_type)
    if own is not None:
        own.register()


def register_classes_of(model_name_or_path: str, cache_dir: str | None = None) -> None:
    """Call :func:`register_classes` for a checkpoint that the Auto classes will open.

    Errors of reading its config are left to these to report.
    """
    with suppress(OSError, ValueError):
        config, _ = PretrainedConfig.get_config_dict(model_name_or_path, cache_dir=cache_dir)
        register_classes(str(config.get("model_type")))


def _own_family(model_type: str) -> ModuleType | None:
    """Return the module ``family`` in the package's folder with the name of a model type; None without one.

    It has the record ``FAMILY`` and ``register()``, which registers the classes with transformers. A new family only
    needs such a folder.
    """
    if not model_type.isidentifier() or find_spec(f"qwenvl.{model_type}") is None:
        return None
    name = f"qwenvl.{model_type}.family"
    return importlib.import_module(name) if find_spec(name) is not None else None
