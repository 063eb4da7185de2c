"""The README.md of a finished model: training data and settings, results, and how to use it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from qwenvl.config import ParsedArguments
from qwenvl.models.lora.files import CONFIG_FILE
from qwenvl.models.rope_scaling import read_extension
from qwenvl.tasks.registry import saved_kind
from qwenvl.train.records.run_info import UsedRows, rerun_command
from qwenvl.train.records.serving import SERVING

MARKER = "<!-- Written by qwenvl after training. Without this line it is yours, and no run replaces it. -->"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_LOADED = """from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{name}")
processor = AutoProcessor.from_pretrained("{name}")"""
_ADAPTER_LOADED = """from peft import PeftModel
from transformers import AutoModelForImageTextToText, AutoProcessor

base = AutoModelForImageTextToText.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "{name}")
processor = AutoProcessor.from_pretrained("{name}")"""

_EXTENDED_LOADED = """from peft import PeftModel
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

config = AutoConfig.from_pretrained("{base}")  # with the context of training, which the adapter's folder cannot set
config.text_config.rope_parameters = {rope_parameters}
config.text_config.max_position_embeddings = {max_position_embeddings}
base = AutoModelForImageTextToText.from_pretrained("{base}", config=config)
model = PeftModel.from_pretrained(base, "{name}")
processor = AutoProcessor.from_pretrained("{name}")"""


@dataclass(frozen=True)
class Card:
    """Contents of a model card.

    Args:
        name: Folder of the model, or its repository on the hub.
        base: Folder or name of the checkpoint that it was trained from.
        given: Settings that the user gave.
        rows: Used rows of each dataset.
        left_out: Sentences about skipped and cut samples.
    """

    name: str
    base: str
    given: Mapping[str, Any]
    rows: Sequence[UsedRows]
    left_out: Sequence[str] = ()

    def write(self, folder: Path, history: Sequence[Mapping[str, float]]) -> bool:
        """Write ``README.md``, unless there is one by the user; return whether it was written.

        Args:
            folder: Folder of the model.
            history: Log lines of the training.
        """
        path = folder / "README.md"
        if path.exists() and MARKER not in path.read_text(encoding="utf-8"):
            return False
        path.write_text(self.text(folder, history), encoding="utf-8")
        return True

    def text(self, folder: Path, history: Sequence[Mapping[str, float]]) -> str:
        """Return the card of a folder."""
        adapter = (folder / CONFIG_FILE).is_file()
        made = "A LoRA adapter for" if adapter else "Fine-tuned from"
        extended = read_extension(folder, self.base) if adapter else {}
        alone = _EXTENDED_LOADED if extended else _ADAPTER_LOADED if adapter else _LOADED
        kind = saved_kind(str(folder))
        usage = kind.usage if kind is not None and kind.usage is not None else alone
        loaded = usage.format(name=self.name, base=self.base, **extended)
        parts = [
            f"---\n{yaml.safe_dump(self._front(adapter), sort_keys=False)}---\n\n{MARKER}",
            f"# {Path(self.name).name}\n\n{made} `{self.base}`.",
            f"## Use\n\n```python\n{loaded}\n```",
            _limits(folder),
            _requests(folder),
            f"## Data\n\n{_table(('dataset', 'rows', 'for'), self._row_lines())}",
            "\n".join(f"- {line}" for line in self.left_out),
            f"## Results\n\n{_table(('', 'value'), _metrics(history))}",
            "## Settings\n\nEverything else is a default; `training_args.yaml` reruns it.\n\n"
            f"```bash\n{rerun_command(self.given)}\n```",
            f"## Versions\n\n{_versions(folder)}",
        ]
        return "\n\n".join(part for part in parts if part) + "\n"

    def _front(self, adapter: bool) -> dict[str, Any]:
        front: dict[str, Any] = {"library_name": "peft" if adapter else "transformers"}
        if _HUB_NAME.fullmatch(self.base) and not Path(self.base).exists():
            front["base_model"] = self.base
        return front | {"pipeline_tag": "image-text-to-text", "tags": ["qwenvl", "sft", *(["lora"] if adapter else [])]}

    def _row_lines(self) -> list[tuple[str, ...]]:
        return [(one.dataset, f"{one.rows:,}", one.use) for one in self.rows]


def describe_run(parsed: ParsedArguments, rows: Sequence[UsedRows], left_out: Sequence[str]) -> Card:
    """Return the card of a run.

    Args:
        parsed: Settings of the run.
        rows: Used rows of each dataset.
        left_out: Sentences about skipped and cut samples.
    """
    name = parsed.training.hub_model_id or parsed.training.output_dir
    return Card(name, parsed.model.model_name_or_path, parsed.given, rows, left_out)


def _limits(folder: Path) -> str:
    """Return the image and video limits of the saved processor, in a sentence or two."""
    path = folder / "processor_config.json"
    if not path.is_file():
        return ""
    config = json.loads(path.read_text(encoding="utf-8"))
    image, video = config.get("image_processor", {}).get("size", {}), config.get("video_processor", {})
    if "longest_edge" not in image or "max_frames" not in video:
        return ""
    said = (
        f"The processor resizes images to {image['shortest_edge']:,} to {image['longest_edge']:,} pixels, and takes "
        f"{video['min_frames']} to {video['max_frames']} frames of a video, {video['fps']:g} per second."
    )
    if not video.get("do_sample_frames"):  # as published: clients of these families sample the frames themselves
        said += ' Ask for them with `processor_kwargs={"do_sample_frames": True}`: without, it takes every frame.'
    return said


def _requests(folder: Path) -> str:
    """Return the template arguments that requests need, from ``serving.json``; empty if none are needed."""
    path = folder / SERVING
    record = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    of_datasets = [json.dumps(given) for given in record.get("datasets", {}).values()]
    given = ([json.dumps(record["chat_template_kwargs"])] if record.get("chat_template_kwargs") else []) + of_datasets
    said = [f"It was trained with `chat_template_kwargs` {' and '.join(dict.fromkeys(given))}."] if given else []
    if record.get("enable_thinking") == "auto":
        said.append(
            "Thinking was on for answers with a thought and off for answers without one: ask with "
            '`"chat_template_kwargs": {"enable_thinking": true}` or `false`.'
        )
    return " ".join(said)


def _metrics(history: Sequence[Mapping[str, float]]) -> list[tuple[str, ...]]:
    """Return the last training loss and all results of the last evaluation."""
    train = next((line for line in reversed(history) if "loss" in line), {})
    evaluated = next((line for line in reversed(history) if "eval_loss" in line), {})
    lines: list[tuple[str, ...]] = [("optimizer steps", f"{int(train['step']):,}")] if "step" in train else []
    lines += [("training loss, last log line", f"{train['loss']:.4g}")] if train else []
    shown = {"eval_loss": "evaluation loss"}
    return lines + [
        (shown.get(name, name.removeprefix("eval_").replace("_", " ")), f"{value:.4g}")
        for name, value in evaluated.items()
        if name == "eval_loss" or (name.startswith("eval_") and not name.endswith(("_second", "runtime", "_tokens")))
    ]


def _versions(folder: Path) -> str:
    path = folder / "versions.json"
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return ", ".join(f"{name} {version}" for name, version in found.items()) + "."


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rows = [head, ["---"] * len(head), *lines]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in rows)
