"""Adapters whose base model has moved since training: every tool says so, and takes ``--base``."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from qwenvl.cli import check_serving, merge_lora, show_sample
from qwenvl.cli.check_image import command as check_image
from qwenvl.cli.evaluate import command as evaluate
from qwenvl.cli.predict import command as predict
from tests.e2e.runs import LORA, equal_bits, flags, train

LIMITS = ("--max_pixels", "64*64", "--min_pixels", "32*32")
ASKED = ("--device", "cpu", "--max_new_tokens", "2")


class Moved(NamedTuple):
    adapter: Path
    before: Path
    base: Path
    data: list[str]


@pytest.fixture
def moved(tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path) -> Moved:
    before, base = tmp_path / "base", tmp_path / "elsewhere"
    shutil.copytree(tiny_checkpoint("qwen3_vl"), before)
    adapter = train(before, tmp_path / "adapter", registry, **{**LORA, "learning_rate": 1e-2})
    before.rename(base)
    return Moved(adapter, before, base, ["--dataset_use", "mixed", "--dataset_registry", str(registry)])


def commands(moved: Moved, output: Path) -> dict[str, tuple[Callable[[list[str]], int], list[str]]]:
    """Each tool that takes adapters, with its flags."""
    model = ["--model_name_or_path", str(moved.adapter)]
    asked = [*model, *moved.data, *LIMITS, *ASKED]
    return {
        "merge_lora": (merge_lora.main, ["--adapter", str(moved.adapter), "--output", str(output / "merged")]),
        "predict": (predict.main, [*asked, "--output", str(output / "answers.jsonl")]),
        "evaluate": (evaluate.main, [*asked, "--output", str(output / "evaluation")]),
        "check_serving": (check_serving.main, [*model, *moved.data, "--samples", "1"]),
        "show_sample": (show_sample.main, [*model, *moved.data, *LIMITS]),
        "check_image": (check_image.main, [*model, *moved.data, *LIMITS, "--output", str(output), "--workers", "0"]),
    }


def test_every_tool_says_it_and_takes_the_base(
    moved: Moved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, (main, argv) in commands(moved, tmp_path).items():
        capsys.readouterr()
        assert main(argv) in (1, 2), name
        said = capsys.readouterr().err
        assert f"{moved.adapter} holds adapters on {moved.before} (base_model_name_or_path" in said, name
        assert "there is no such folder. Name that checkpoint where it is now: --base FOLDER." in said, name
        assert "Traceback" not in said, name
        assert main([*argv, "--base", str(moved.before)]) in (1, 2), name
        assert f"--base {moved.before}: there is no such folder." in capsys.readouterr().err, name
        assert main([*argv, "--base", str(moved.base)]) == 0, name
    shutil.copytree(moved.base, moved.before)
    there = ["--adapter", str(moved.adapter), "--output", str(tmp_path / "there")]
    assert merge_lora.main(there) == 0
    assert equal_bits(tmp_path / "merged", tmp_path / "there")


def test_a_base_without_adapters_has_no_effect_and_is_refused(
    moved: Moved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, (main, argv) in commands(moved, tmp_path).items():
        if name == "merge_lora":
            continue
        whole = [str(moved.base) if one == str(moved.adapter) else one for one in argv]
        assert main([*whole, "--base", str(moved.base)]) in (1, 2), name
        assert f"--base {moved.base} has no effect: {moved.base} holds no adapters." in capsys.readouterr().err, name


def test_training_from_adapters_names_the_way_out(
    moved: Moved, registry: Path, tmp_path: Path, fail: Callable[[list[str]], Any]
) -> None:
    said = fail(flags(moved.adapter, tmp_path / "out", registry, **LORA))
    assert f"tools/merge_lora.py --adapter {moved.adapter} --output DIR (--base names" in said
