"""The model families: everything that differs between them and is not read from a checkpoint's own files."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qwenvl.utils.errors import UserError


@dataclass(frozen=True, slots=True)
class Family:
    """What the code has to know of one ``config.model_type``.

    Args:
        model_type: ``config.model_type`` of its checkpoints.
        video_layout: ``clip``: all tokens of a video stand in one span; ``frames``: every pair of frames has its own
            span, after a text timestamp such as ``<1.5 seconds>``.
        timed_positions: temporal M-RoPE positions count seconds (``tokens_per_second`` of the vision config) rather
            than frames.
        moe: feed-forward layers are mixtures of experts.
        linear_attention: some layers are linear attention, whose state crosses packed samples unless its kernels
            are told the boundaries.
        mtp: Its checkpoints hold a layer for multi-token prediction (``mtp.*``), which transformers does not build.
        gated_vision: feed-forward layers of the vision tower are gated: three matrices rather than two.
        plain_positions: the language model counts tokens one by one, those of pictures too, rather than by M-RoPE.
        boxes: how coordinates of boxes and points are written. ``relative_1000``: whole numbers from 0 to 1000, the
            left or top edge to the right or bottom one; ``resized_pixels``: pixels of the picture after resizing.
        box_text: Written form of a box that stands alone. ``tokens``: between special tokens, as Qwen2-VL was trained
            (its model card); ``list``: numbers in square brackets, as the JSON of the newer cookbooks has it.
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


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family("qwen2_vl", video_layout="clip", box_text="tokens"),
        Family("qwen2_5_vl", video_layout="clip", timed_positions=True, gated_vision=True, boxes="resized_pixels"),
        Family("qwen3_vl", video_layout="frames"),
        Family("qwen3_vl_moe", video_layout="frames", moe=True),
        Family("qwen3_5", video_layout="frames", linear_attention=True, mtp=True),
        Family("qwen3_5_moe", video_layout="frames", moe=True, linear_attention=True, mtp=True),
    )
}
"""Those with published checkpoints."""

LAB = Family("connector_lab", video_layout="clip", plain_positions=True)
"""Models that are put together of any vision encoder, connector and language model; see :mod:`qwenvl.connector_lab`."""


def get_family(model_type: str) -> Family:
    """Return the family of a checkpoint's ``config.model_type``.

    Raises:
        UserError: this trainer does not know the model type.
    """
    if model_type == LAB.model_type:
        return LAB
    if model_type not in FAMILIES:
        raise UserError(
            f"model_type {model_type!r} of the checkpoint's config.json is not one this trainer knows: "
            f"{', '.join(FAMILIES)}. Point --model_name_or_path at a checkpoint of one of them."
        )
    return FAMILIES[model_type]
