"""What other programs read of a saved folder, beside what transformers 5 writes: both open it, with the same results.

transformers 4, and what is pinned to it, read the rotary settings, the experts, the vision tower's type, the special
tokens and the two processors under other names and in other files; published checkpoints have those. Nothing that
transformers 5 wrote is taken away, but for ``extra_special_tokens``, which both read as ``additional_special_tokens``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from qwenvl.data.encoding.processor import BARE_VIDEO, MARKED_VIDEO
from qwenvl.families import FAMILIES

VIDEO_TEMPLATE = "chat_template_videos.jinja"
"""Chat template whose videos are one bare placeholder.

transformers from 5.10 on, and vLLM with it, keep the pair of markers that the template writes around a video, besides
those around each frame; training has the latter alone, as transformers 4 and the official recipe.
"""

_PROCESSORS = {
    "image_processor": "preprocessor_config.json",
    "video_processor": "video_preprocessor_config.json",
}


def write_client_forms(folder: Path) -> None:
    """Add to a saved folder, of a model or of adapters, what other programs read.

    Args:
        folder: Folder that transformers has saved; changed in place. Files that it does not hold are not made up.
    """
    _edit(folder / "config.json", _with_older_names)
    _edit(folder / "tokenizer_config.json", _with_older_tokens)
    processor = _read(folder / "processor_config.json")
    for part, name in _PROCESSORS.items():
        if part in processor:
            own = {"processor_class": processor.get("processor_class"), **processor[part]}
            _write(folder / name, {key: value for key, value in own.items() if value is not None})
    _write_video_template(folder)


def _with_older_names(config: dict[str, Any]) -> None:
    """Add the names of transformers 4 to the config of a family that it knows."""
    family = FAMILIES.get(config.get("model_type", ""))
    if family is None or family.linear_attention:  # Qwen3.5 was published with the names of transformers 5
        return
    text = config["text_config"]
    if rope := text.get("rope_parameters"):
        text["rope_theta"] = rope["rope_theta"]
        text["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    if "num_local_experts" in text:
        text["num_experts"] = text["num_local_experts"]
        # vLLM reads it without a default; transformers, which has no such setting, computes as if it were there
        text["norm_topk_prob"] = True
    config["vision_config"]["model_type"] = config["model_type"]


def _with_older_tokens(config: dict[str, Any]) -> None:
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")


def _write_video_template(folder: Path) -> None:
    path, family = folder / "chat_template.jinja", _read(folder / "processor_config.json").get("processor_class", "")
    if not path.is_file() or not family.startswith("Qwen3"):
        return
    text = path.read_text(encoding="utf-8")
    if MARKED_VIDEO in text:
        (folder / VIDEO_TEMPLATE).write_text(text.replace(MARKED_VIDEO, BARE_VIDEO), encoding="utf-8")


def _edit(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    if path.is_file():
        content = _read(path)
        change(content)
        _write(path, content)


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return content


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")
