"""The demo's registry entries name the files that the demo makes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from qwenvl.cli.make_demo_data.command import make_demo_data
from qwenvl.cli.make_demo_data.datasets import demo_datasets
from qwenvl.cli.make_mask_data import make_masks


def test_every_entry_names_what_the_demo_makes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEMO_DIR", str(tmp_path))
    make_demo_data(tmp_path / "data", limit=10)
    for split in ("train", "heldout"):
        make_masks(tmp_path / "mask_scenes", split, 1, seed=0)
    mixture = Path(__file__).resolve().parents[3] / "examples" / "thinking" / "mixture.py"
    subprocess.run([sys.executable, str(mixture), "--data", str(tmp_path / "data"), "--count", "2"], check=True)
    named = [Path(entry["annotation_path"]) for entry in demo_datasets().values()]
    assert sorted(named) == sorted(tmp_path.rglob("*.jsonl"))
    assert all(Path(entry["data_path"]).is_dir() for entry in demo_datasets().values())


def test_without_a_folder_the_entries_start_beside_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DEMO_DIR", raising=False)
    assert demo_datasets()["demo_digits"] == {
        "annotation_path": "demo/data/digits_train.jsonl",
        "data_path": "demo/data",
    }
