"""The arguments with which vLLM and SGLang give a model what training gave it.

Flags are those of ``vllm serve`` (engine arguments of vLLM 0.11 and later) and of ``sglang.launch_server``. What was
tried, with which versions, stands in docs/compatibility.md.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What ``--max-lora-rank`` takes (``MaxLoRARanks`` of ``vllm/config/lora.py``)."""

FRAME_LIMITS = ("fps", "min_frames", "max_frames")

VLLM_MAX_FRAMES, VLLM_MAX_FPS = 768, 30
"""``_MAX_FRAMES`` and ``_MAX_FPS`` of ``vllm/multimodal/video.py``, of all families."""

CLIP_TOKEN = 28
"""Pixels of a side of a video token in Qwen2-VL and Qwen2.5-VL: patches of 14, two and two merged."""

VLLM_POSITIONS_FACTOR = 4
"""``positions_factor`` of ``MRotaryEmbedding`` of Qwen2-VL and Qwen2.5-VL."""

DRAFTS = ("--speculative-config", '{"method": "mtp", "num_speculative_tokens": 1}')
"""Flags of ``vllm serve`` that draft tokens with a model's layer for multi-token prediction."""

WITHOUT_PREFIXES = "--no-enable-prefix-caching"
"""Flag that drafts need on the CPU: the copy of linear attention's states between cached prefixes is a Triton kernel
(``run_fused_precopy`` of ``vllm/v1/worker/mamba_utils.py``), which the build for the CPU does not have."""

SGLANG_MAX_PIXELS = 16384 * 28 * 28
"""Above it SGLang shrinks images itself, unless ``SGLANG_IMAGE_MAX_PIXELS`` says otherwise."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter that is served beside its base model.

    Args:
        base: folder or name of the base model.
        rank: the largest one of its matrices.
        obstacle: why servers cannot load it as it is; empty where nothing speaks against it.
        extension: Entries of its text config that the base does not have, from
            :func:`qwenvl.models.rope_scaling.read_extension`.
        for_experts: Whether it adapts stacked experts.
    """

    base: str
    rank: int
    obstacle: str = ""
    extension: Mapping[str, Any] = field(default_factory=dict)
    for_experts: bool = False


@dataclass(frozen=True)
class Served:
    """What is served.

    Args:
        folder: the model, or the adapter.
        limits: Limits that the processor has to have, from
            :func:`qwenvl.data.encoding.processor.processor_limits`.
        carried: the folder's own processor has them.
        clips: the family's videos are limited by the frame, and sampled without their metadata.
        max_length: most tokens of a prompt and its answer.
        counts: most images and videos of a sample; empty where they are not known, and both may come.
        adapter: None for a whole model.
        requests: Number of answers by the template arguments, as JSON, that they have to be asked for with.
        rope: Rotary settings of the text config.
        video_template: File of the chat template that writes videos as training has them; empty where the processor's
            own does.
        drafts: Whether its files hold a layer for multi-token prediction.
    """

    folder: str
    limits: Mapping[str, Any]
    carried: bool
    clips: bool
    max_length: int
    counts: Mapping[str, int]
    adapter: Adapter | None = None
    requests: Mapping[str, int] = field(default_factory=dict)
    rope: Mapping[str, Any] = field(default_factory=dict)
    video_template: str = ""
    drafts: bool = False

    @property
    def videos(self) -> bool:
        """Whether videos may come."""
        return not self.counts or self.counts["video"] > 0


def vllm_command(served: Served) -> str:
    """Return the command line of vLLM."""
    return _lines(vllm_words(served))


def vllm_words(served: Served) -> list[str]:
    """Return the words of vLLM's command line."""
    words = ["vllm", "serve", served.adapter.base if served.adapter else served.folder]
    words += ["--max-model-len", str(served.max_length)]
    words += ["--limit-mm-per-prompt", json.dumps(served.counts)] if served.counts else []
    image, video = served.limits["image_processor"], served.limits["video_processor"]
    if not served.carried or served.adapter:  # the processor is the base model's
        kwargs: dict[str, Any] = {"images_kwargs": {"size": image["size"]}}
        if served.videos:
            kwargs["videos_kwargs"] = {"size": video["size"]}
        words += ["--mm-processor-kwargs", json.dumps(kwargs)]
    if served.videos:
        words += ["--media-io-kwargs", json.dumps({"video": {name: video[name] for name in FRAME_LIMITS}})]
        if served.video_template:
            words += ["--chat-template", served.video_template]
    if overrides := _overrides(served):
        words += ["--hf-overrides", json.dumps({"text_config": overrides})]
    if served.adapter:
        rank = next((rank for rank in VLLM_RANKS if rank >= served.adapter.rank), served.adapter.rank)
        words += ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"adapter={served.folder}"]
    return words


def _overrides(served: Served) -> dict[str, Any]:
    """Return what vLLM has to be told of the text config: a context that the folder or vLLM does not have so."""
    found = dict(served.adapter.extension) if served.adapter else {}
    if served.clips and served.rope.get("rope_type") == "yarn":
        # MRotaryEmbedding (vllm/model_executor/layers/rotary_embedding/mrope.py) computes YaRN's ramp with this many
        # times the native length, in the families whose positions may pass the number of tokens.
        native = served.rope["original_max_position_embeddings"]
        found["rope_parameters"] = {
            **served.rope,
            "original_max_position_embeddings": native // VLLM_POSITIONS_FACTOR,
        }
    return found


def sglang_command(served: Served) -> str:
    """Return the command line of SGLang."""
    image, video = served.limits["image_processor"], served.limits["video_processor"]
    words = ["python", "-m", "sglang.launch_server", "--model-path"]
    words += [served.adapter.base if served.adapter else served.folder, "--context-length", str(served.max_length)]
    words += ["--limit-mm-data-per-request", json.dumps(served.counts)]
    config: dict[str, Any] = {"image": {"size": image["size"]}}
    if served.videos:
        size = video["size"]
        limits = {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
        frames = {name: video[name] for name in FRAME_LIMITS}
        config["video"] = frames | (limits if served.clips else {"size": size})
    words += ["--mm-process-config", json.dumps(config)]
    if served.videos and served.video_template:
        words += ["--chat-template", served.video_template]
    if served.adapter:
        words += ["--enable-lora", "--max-lora-rank", str(served.adapter.rank)]
        words += ["--lora-paths", f"adapter={served.folder}"]
    most = image["size"]["longest_edge"]
    prefix = f"SGLANG_IMAGE_MAX_PIXELS={most} " if most > SGLANG_MAX_PIXELS else ""
    return prefix + _lines(words)


def notes(served: Served) -> list[str]:
    """Return what the arguments alone do not settle, a sentence each."""
    found = _adapter_notes(served.adapter) if served.adapter else []
    if served.clips and served.rope.get("rope_type") == "yarn":
        found.append(
            "vLLM computes YaRN of this family with 4 x the native length: --hf-overrides names a quarter of it, which "
            "gives the frequencies of training."
        )
    if served.carried and not served.adapter:
        found.append("The folder's processor carries the limits of training: vLLM needs none of its own.")
    if served.drafts:
        found.append(
            f"The folder holds a layer for multi-token prediction: {shlex.join(DRAFTS)} makes vLLM draft tokens with "
            f"it, which changes its speed alone. On the CPU this needs {WITHOUT_PREFIXES} too."
        )
    if served.videos:
        found.append("vLLM samples frames itself, by --media-io-kwargs alone; the processor's own limits do not count.")
        if served.video_template:
            found.append(
                f"{served.video_template} leaves out the pair of markers that transformers from 5.10 on keeps around a "
                "video, and training does not have."
            )
        video = served.limits["video_processor"]
        if served.adapter and _shares_a_budget(video):
            found.append(
                "vLLM cannot be told the pixels that the frames of a clip share (--video_max_pixels), only those of a "
                "frame: clips of many frames get more tokens than in training. Merge the adapter (tools/merge_lora.py) "
                "and serve the merged folder, whose processor has the budget."
            )
        if video["max_frames"] > VLLM_MAX_FRAMES or video["fps"] > VLLM_MAX_FPS:
            found.append(
                f"vLLM takes at most {VLLM_MAX_FRAMES} frames of a video, at most {VLLM_MAX_FPS} per second: send "
                "longer or faster ones as frames."
            )
    found += [
        f'Ask with "chat_template_kwargs": {arguments} for {count} of the answers looked at.'
        for arguments, count in served.requests.items()
        if arguments != "{}"
    ]
    found.append("The numbers of images and videos are the most of the samples looked at.")
    return found


def _adapter_notes(adapter: Adapter) -> list[str]:
    found = []
    if adapter.obstacle:
        found.append(f"{adapter.obstacle}: merge the adapter (tools/merge_lora.py) and serve the merged folder.")
    if adapter.for_experts:
        found.append(
            "The adapter has matrices of stacked experts (target_parameters), which vLLM loads on GPUs alone and "
            "SGLang does not know: for SGLang, and on CPUs, merge the adapter (tools/merge_lora.py)."
        )
    if adapter.extension:
        found.append(
            "The adapter was trained with a context that its base does not have: vLLM takes it from --hf-overrides; "
            "for SGLang and other programs, merge the adapter (tools/merge_lora.py)."
        )
    return found


def _shares_a_budget(video: Mapping[str, Any]) -> bool:
    """Return whether the budget of a clip makes the frames of some clips smaller than the limit of a frame does."""
    if not video["cap_pixels_per_frame"]:
        return False
    budget = 2 * int(video["max_video_tokens"] * CLIP_TOKEN**2 * 0.9)  # as Qwen2VLVideoProcessor computes it
    return budget // int(video["max_frames"]) < int(video["size"]["longest_edge"])


def _lines(words: list[str]) -> str:
    """Return a command with each flag on a line of its own."""
    text = shlex.join(words)
    for word in words:
        if word.startswith("--"):
            text = text.replace(f" {word} ", f" \\\n    {word} ", 1)
    return text
