"""The ways to start training: as a file or a module, from any folder, with flags, a recipe, or both."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from qwenvl.train.train_qwen import main
from tests.e2e.runs import ERROR, REPOSITORY, history
from tests.e2e.test_errors import Place

SCRIPT = REPOSITORY / "qwenvl" / "train" / "train_qwen.py"


@pytest.fixture
def place(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> Place:
    return Place(tmp_path, tiny_checkpoint("qwen3_vl"))


def start(*arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Start Python in a folder; the variables of a launcher are not inherited."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "PYTHONPATH")}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**inherited, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=900,
    )


def test_as_a_file_from_any_folder_with_relative_paths(place: Place) -> None:
    """One process, without torchrun; a mistake is one message and a non-zero exit."""
    (place.folder / "model").symlink_to(place.model)
    flags = place.flags(model="model", output="here", dataset_use="sat")
    result = start(str(SCRIPT), *flags, folder=place.folder)
    assert result.returncode == 1
    assert len(ERROR.findall(result.stderr)) == 1, result.stderr
    assert "Traceback" not in result.stderr + result.stdout
    assert "'sat'" in result.stderr
    assert (place.folder / "here").is_dir()


def test_as_a_module(place: Place) -> None:
    """Help needs no argument, is a page on standard output, and does not wait for what only training needs."""
    module = ("-X", "importtime", "-m", "qwenvl.train.train_qwen")
    result = start(*module, "--help", folder=place.folder, PYTHONPATH=str(REPOSITORY))
    assert result.returncode == 0
    assert result.stdout.startswith("usage: train_qwen.py [RECIPE.yaml] [--flag VALUE ...]")
    for flag in ("--dataset_use", "--tune_mm_llm", "--on_bad_sample {raise,skip}", "--learning_rate"):
        assert flag in result.stdout
    imports = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "qwenvl.config.parsing.parser" in imports
    assert not imports & {"qwenvl.train.run", "datasets", "deepspeed"}


def test_a_recipe_and_flags_that_override_it(place: Place, capsys: pytest.CaptureFixture[str]) -> None:
    flags = place.flags(max_steps=3)
    settings = dict(zip((flag.removeprefix("--") for flag in flags[::2]), flags[1::2], strict=True))
    recipe = place.folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump({**settings, "learning_rate": 0.5}))
    assert main([str(recipe), "--learning_rate", "1e-5", "--max_steps", "1"]) == 0
    assert history(place.output, "learning_rate") == [1e-5]
    written = place.output / "training_args.yaml"
    assert main([str(written), "--output_dir", str(place.folder / "again")]) == 0
    assert history(place.folder / "again") == history(place.output)
    assert "error" not in capsys.readouterr().err
