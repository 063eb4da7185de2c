"""The README.md of a quantized copy: how it was made, what it is read by, and its difference from the whole model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import transformers
import yaml

from qwenvl.cli.export.check import Difference
from qwenvl.train.export.model_card import MARKER


@dataclass(frozen=True)
class Described:
    """What a card says of a copy's form.

    Args:
        form: Name of the form.
        suffix: Suffix of its files of weights.
        about: Paragraphs on how it was made and is read.
    """

    form: str
    suffix: str
    about: str


def write_card(
    folder: Path, copy: Path, output: Path, described: Described, samples: str, found: Mapping[str, Difference]
) -> None:
    """Write the card.

    Args:
        folder: Folder of the whole model.
        copy: Folder of the quantized one.
        output: Name that the copy gets.
        described: Its form.
        samples: Names of the datasets that were compared.
        found: Difference of the two models, by the way the quantized one was asked.
    """
    before, after = _size(folder, "safetensors"), _size(copy, described.suffix)
    tags = ["qwenvl", described.form]
    front = yaml.safe_dump({"pipeline_tag": "image-text-to-text", "tags": tags}, sort_keys=False)
    parts = [
        f"---\n{front}---\n\n{MARKER}",
        f"# {output.name}\n\n`{folder}` in {described.form.upper()}: {after:.2f} GiB of weights, {before:.2f} before.",
        described.about,
        f"## Difference from the unquantized model\n\nGreedy answers to samples of `{samples}`, and the log-probability"
        f" that each model gives to their tokens:\n\n{_table(found)}",
        f"Made and compared with transformers {transformers.__version__}.",
    ]
    (copy / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _size(folder: Path, suffix: str) -> float:
    return sum(file.stat().st_size for file in folder.glob(f"*.{suffix}")) / 2**30


def _table(found: Mapping[str, Difference]) -> str:
    columns = [dict(one.lines()) for one in found.values()]
    rows = [["", *found], ["---"] * (len(found) + 1)]
    rows += [[name, *(column[name] for column in columns)] for name in columns[0]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
