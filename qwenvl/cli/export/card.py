"""The README.md of a quantized copy: how it was made, what it is read by, and its difference from the whole model."""

from __future__ import annotations

from pathlib import Path

import transformers
import yaml

from qwenvl.cli.export.check import Difference
from qwenvl.train.export.model_card import MARKER

_FP8 = """The linear layers of the language model have FP8 weights (e4m3) with a scale for each block of 128 x 128, in
the form of Qwen's published FP8 checkpoints; the vision tower, embeddings and output projection are not quantized.
Servers also round activations to FP8; these figures were computed with dequantized weights and do not hold that."""


def write_card(folder: Path, copy: Path, output: Path, samples: str, found: Difference) -> None:
    """Write the card.

    Args:
        folder: Folder of the whole model.
        copy: Folder of the quantized one.
        output: Name that the copy gets.
        samples: Names of the datasets that were compared.
        found: Difference of the two models.
    """
    sizes = [sum(file.stat().st_size for file in one.glob("*.safetensors")) / 2**30 for one in (folder, copy)]
    front = yaml.safe_dump({"pipeline_tag": "image-text-to-text", "tags": ["qwenvl", "fp8"]}, sort_keys=False)
    rows = "\n".join(f"| {name} | {value} |" for name, value in found.lines())
    parts = [
        f"---\n{front}---\n\n{MARKER}",
        f"# {output.name}\n\n`{folder}` in FP8: {sizes[1]:.2f} GiB of weights, {sizes[0]:.2f} before.",
        _FP8,
        f"## Difference from the unquantized model\n\nGreedy answers to samples of `{samples}`, and the log-probability"
        f" that each model gives to their tokens:\n\n| | value |\n| --- | --- |\n{rows}",
        f"Made and compared with transformers {transformers.__version__}.",
    ]
    (copy / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")
