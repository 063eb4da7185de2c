"""The notebook about boxes runs from top to bottom, and says what is so."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "tools" / "process_bbox.ipynb"
BOXES = {"cup": [110, 230, 290, 460], "ball": [420, 330, 560, 470], "book": [600, 180, 840, 480]}
# As the notebook limits them, 900 x 600 pixels become these (width, height).
RESIZED = {"qwen2_vl": (476, 308), "qwen2_5_vl": (476, 308), "qwen3_vl": (480, 320)}


def execute(folder: Path) -> tuple[str, list[Image.Image]]:
    """Run the notebook in a folder; return what it prints and shows."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(
        notebook, kernel_name="python3", timeout=900, resources={"metadata": {"path": str(folder)}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    printed = "".join(output["text"] for output in outputs if output["output_type"] == "stream")
    pictures = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    return printed, [Image.open(io.BytesIO(base64.b64decode(content))) for content in pictures]


def expected(family: str, box: list[int]) -> list[int]:
    width, height = RESIZED[family] if family == "qwen2_5_vl" else (1000, 1000)
    return [round(value * (width, height)[axis % 2] / (900, 600)[axis % 2]) for axis, value in enumerate(box)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "folder", [ROOT, NOTEBOOK.parent, ROOT / "tests" / "tools"], ids=["root", "tools", "elsewhere"]
)
def test_the_notebook_runs(folder: Path) -> None:
    printed, pictures = execute(folder)
    answers: dict[str, Any] = dict(re.findall(r"^(qwen\w+):\n```json\n(.*)\n```$", printed, re.MULTILINE))
    assert list(answers) == list(RESIZED)
    for family, answer in answers.items():
        found = {one["label"]: one["bbox_2d"] for one in json.loads(answer)}
        assert found == {name: expected(family, box) for name, box in BOXES.items()}
        assert f"{family:12} resized to {RESIZED[family][0]} x {RESIZED[family][1]}   {found}" in printed
    assert len(pictures) == 5
    # Converted boxes are drawn in the same places, whether from numbers or from the text of a photo stored turned.
    difference = np.abs(np.asarray(pictures[2], dtype=int) - np.asarray(pictures[4], dtype=int))[30:]
    assert np.mean(difference.max(axis=-1) > 100) < 0.01
    wrong = np.abs(np.asarray(pictures[1], dtype=int) - np.asarray(pictures[4], dtype=int))[30:]
    assert np.mean(wrong.max(axis=-1) > 100) > 0.02


def test_the_notebook_is_kept_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert not [cell for cell in notebook.cells if cell.get("outputs") or cell.get("execution_count")]
