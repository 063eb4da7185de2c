"""Data flags: datasets, limits of images and videos, and policies for samples."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from qwenvl.config.rules.limits import LONGEST_TIME
from qwenvl.utils.errors import UserError


@dataclass
class DataArguments:
    """Datasets, sizes of images and videos, and policies. Every field is explained by its ``help``.

    Defaults of the official flags are those of the official recipe
    (``QwenLM/Qwen3-VL``, ``qwen-vl-finetune/qwenvl/train/argument.py``). Pixels are height x width after resizing.

    Raises:
        UserError: values that contradict each other or are out of range.
    """

    dataset_use: str = field(
        default="",
        metadata={
            "help": "Datasets of the registry, separated by commas. name%%X takes X percent of one: name%%50 is half "
            "of it, name%%250 all of it twice and half of it again.",
            "joined_by": ",",
        },
    )
    dataset_registry: str | None = field(
        default=None,
        metadata={
            "help": "Python file that defines data_dict. Default: data/__init__.py of the repository, or of the "
            "working folder where qwenvl was installed as a package."
        },
    )
    eval_dataset_use: str = field(
        default="",
        metadata={
            "help": "Datasets for evaluation, written as for dataset_use. Not together with eval_ratio.",
            "joined_by": ",",
        },
    )
    eval_ratio: float = field(
        default=0.0,
        metadata={
            "help": "Share of the training samples held out for evaluation, 0 to 1 (0.01 is one in a hundred); always "
            "the same samples."
        },
    )
    data_flatten: bool = field(
        default=False,
        metadata={"help": "Concatenate the samples of a batch into one row instead of padding them."},
    )
    data_packing: bool = field(
        default=False,
        metadata={
            "help": "Combine rows into packs of up to model_max_length tokens, planned at the start from their "
            "exact lengths; rows of official packed files (lists of samples) stay together. Implies data_flatten; "
            "batch sizes then count packs."
        },
    )
    additional_tokens: list[str] | None = field(
        default=None,
        metadata={
            "help": "Texts that become one token each, such as <loc_0> <loc_1>. New ones are added to the tokenizer, "
            "with trained embeddings that start as the mean of all. Decoding keeps them, also with skip_special_tokens."
        },
    )
    packing_plan: str | None = field(
        default=None,
        metadata={
            "help": "Plan of tools/pack_data.py for these datasets and settings, instead of planning packs at the "
            "start. Implies data_packing; leave dataset_use out to train on everything that was planned."
        },
    )
    group_by_cost: bool = field(
        default=False,
        metadata={
            "help": "Measure all rows at the start and form each step from rows of about the same training cost (and "
            "of similar length, where batches are padded), so that no rank waits for another. Each epoch has new "
            "steps in random order. With data_packing, steps are balanced without this flag."
        },
    )
    base_interval: int = field(
        default=2,
        metadata={"help": "Accepted for older scripts; without effect, as in the official recipe."},
    )
    max_pixels: int = field(
        default=28 * 28 * 576, metadata={"help": "Most pixels of an image; larger ones are shrunk."}
    )
    min_pixels: int = field(
        default=28 * 28 * 16, metadata={"help": "Fewest pixels of an image; smaller ones are enlarged."}
    )
    video_max_frames: int = field(default=8, metadata={"help": "Most frames sampled from a video."})
    video_min_frames: int = field(default=4, metadata={"help": "Fewest frames sampled from a video."})
    video_max_pixels: int = field(
        default=1024 * 28 * 28,
        metadata={"help": "Most pixels of a whole video: frames x height x width, for every model family."},
    )
    video_min_pixels: int = field(
        default=256 * 28 * 28,
        metadata={"help": "Fewest pixels of a whole video: frames x height x width, for every model family."},
    )
    video_max_frame_pixels: int | None = field(
        default=None, metadata={"help": "Most pixels of one frame, besides video_max_pixels. Default: no such limit."}
    )
    video_min_frame_pixels: int | None = field(
        default=None, metadata={"help": "Fewest pixels of one frame, besides video_min_pixels. Default: no such limit."}
    )
    video_fps: float = field(
        default=2.0, metadata={"help": "Frames per second to sample from videos, within the frame limits."}
    )
    video_timeout: float = field(
        default=120.0,
        metadata={
            "help": "Seconds that opening or decoding a video may take; a video that takes longer is a bad sample (see "
            "on_bad_sample)."
        },
    )
    add_vision_id: bool = field(
        default=False, metadata={"help": "Number the media in the prompt (Picture 1: ..., Video 1: ...)."}
    )
    chat_template_kwargs: dict[str, Any] = field(
        default_factory=dict,
        metadata={
            "help": "Further arguments of the chat template, as JSON: '{\"enable_thinking\": false}'. They are "
            "overridden by chat_template_kwargs of a dataset's entry and of a sample. enable_thinking, where the "
            "template has it and it is not given, is true for answers with a thought and false for answers without."
        },
    )
    history: Literal["exact", "last", "as_rendered"] = field(
        default="exact",
        metadata={
            "help": "Context of the answers of a conversation. exact: each answer follows the prompt that a server "
            "sends for it; where the template renders earlier turns differently, as for thinking models, a "
            "conversation becomes several training rows. last: only the row of the last answer. as_rendered: one "
            "row, as the template renders the whole conversation, like the official recipe."
        },
    )
    loss_on: Literal["all", "last_turn", "answers", "thoughts"] = field(
        default="all",
        metadata={
            "help": "Trained tokens. all: all answers; last_turn: the last answer; answers: answers without their "
            "thoughts; thoughts: thoughts alone."
        },
    )
    on_bad_sample: Literal["raise", "skip"] = field(
        default="raise",
        metadata={
            "help": "Policy for a sample that cannot be used: raise stops with its file and line; skip leaves it out, "
            "counts it and writes it to bad_samples.jsonl in the output folder."
        },
    )
    overlength: Literal["drop", "error", "truncate_turns"] = field(
        default="drop",
        metadata={
            "help": "Policy for a sample longer than model_max_length: drop it, stop with an error, or leave out whole "
            "turns from its end. All are counted; images are never cut."
        },
    )
    allow_remote_media: bool = field(
        default=False, metadata={"help": "Load media from http(s) addresses named in the annotations."}
    )
    data_cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder for counted lengths, packs and indexes of annotation files. Default: $QWENVL_CACHE, or "
            "~/.cache/qwenvl."
        },
    )
    save_processor_limits: Literal["training", "original"] = field(
        default="training",
        metadata={
            "help": "Pixel and frame limits in the saved processor: those of training, so that inference sees what "
            "training saw, or the checkpoint's original ones."
        },
    )

    def __post_init__(self) -> None:
        for name in ("max_pixels", "min_pixels", "video_max_frames", "video_min_frames", "video_max_pixels"):
            _require_positive(name, getattr(self, name))
        for name in (
            "video_min_pixels",
            "video_max_frame_pixels",
            "video_min_frame_pixels",
            "video_fps",
            "video_timeout",
        ):
            _require_positive(name, getattr(self, name))
        if self.video_timeout > LONGEST_TIME:
            raise UserError(f"--video_timeout {self.video_timeout:g} must be at most {LONGEST_TIME} seconds.")
        for low, high in (
            ("min_pixels", "max_pixels"),
            ("video_min_pixels", "video_max_pixels"),
            ("video_min_frame_pixels", "video_max_frame_pixels"),
            ("video_min_frames", "video_max_frames"),
        ):
            _require_order(low, getattr(self, low), high, getattr(self, high))
        if not 0.0 <= self.eval_ratio < 1.0:
            raise UserError(f"--eval_ratio {self.eval_ratio:g} is a share of the samples: give 0 to below 1.")
        if self.eval_ratio and self.eval_dataset_use:
            raise UserError(
                "--eval_ratio and --eval_dataset_use both say what to evaluate on: keep one. The first takes a share "
                "of the training samples, the second whole datasets."
            )
        if taken := sorted(TEMPLATE_ARGUMENTS & (self.chat_template_kwargs or {}).keys()):
            raise UserError(
                f"--chat_template_kwargs: {taken[0]} is set by the trainer, which renders each turn as a server would. "
                "Leave it out."
            )
        if self.history == "as_rendered" and self.loss_on != "all":
            raise UserError(
                f"--loss_on {self.loss_on} goes with --history exact or last; a conversation as rendered trains all of "
                "its answers. Leave one of them out."
            )
        self.data_packing = self.data_packing or self.packing_plan is not None
        self.data_flatten = self.data_flatten or self.data_packing  # a pack is a flattened row


TEMPLATE_ARGUMENTS = frozenset(
    {
        *("conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message", "tools"),
        *("tokenize", "return_dict", "return_tensors", "return_assistant_tokens_mask", "processor_kwargs"),
    }
)
"""Arguments of ``apply_chat_template`` that the trainer gives itself, or that are not for the template."""


def _require_positive(name: str, value: float | None) -> None:
    if value is not None and value <= 0:
        raise UserError(f"--{name} {value:g} must be above 0.")


def _require_order(low: str, low_value: int | None, high: str, high_value: int | None) -> None:
    if low_value is not None and high_value is not None and low_value > high_value:
        raise UserError(f"--{low} {low_value} is above --{high} {high_value}: lower the first or raise the second.")
