"""Wrong labels of real images are found, and training without them is as good as training on clean data.

Handwritten digits, 3% of them with another digit as their answer, as docs/which_data.md does it by hand.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from examples.wrong_labels import main as write_wrong
from qwenvl.cli.make_demo_data.command import main as make_demo_data
from qwenvl.cli.make_tiny_checkpoint.command import main as make_tiny_checkpoint
from qwenvl.cli.rank_samples.command import main as rank
from qwenvl.metrics.bootstrap import score_interval
from qwenvl.train.records.sample_losses import FILE_NAME
from qwenvl.train.train_qwen import main as train
from tests.e2e.runs import REPOSITORY

STEPS = 240
CUT = 0.06
"""Share of the list that is looked at: twice as much as is wrong."""


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo's data and its starting weights."""
    folder = tmp_path_factory.mktemp("demo")
    assert make_demo_data(["--output", str(folder / "data")]) == 0
    assert make_tiny_checkpoint(["--family", "qwen3_vl", "--size", "demo", "--output", str(folder / "base")]) == 0
    return folder


def train_on(name: str, demo: Path, wrong: Path) -> Path:
    """Train on a dataset and answer all held-out digits at the end; return the output folder."""
    output = wrong / name
    settings = {
        "model_name_or_path": demo / "base",
        "output_dir": output,
        "dataset_registry": wrong / "registry.py",
        "dataset_use": name,
        "eval_dataset_use": "digits_heldout",
        "max_steps": STEPS,
        "eval_steps": STEPS,
        "eval_generate": 300,
        "eval_generate_tokens": 4,
        "log_sample_losses": True,
        "verify_export": False,
    }
    flags = [text for key, value in settings.items() for text in (f"--{key}", str(value))]
    assert train([str(REPOSITORY / "configs/demo.yaml"), *flags]) == 0
    return output


def accuracy(run: Path) -> float:
    lines = json.loads((run / "trainer_state.json").read_text())["log_history"]
    (found,) = [line["eval_exact_match"] for line in lines if "eval_exact_match" in line]
    return float(found)


def rank_wrong(seed: int, demo: Path, wrong: Path) -> tuple[list[int], set[int]]:
    """Exchange labels, train and rank; return the lines of the list in order, and the exchanged ones."""
    assert write_wrong(["--data", str(demo / "data"), "--output", str(wrong), "--seed", str(seed)]) == 0
    run = train_on("digits_wrong", demo, wrong)
    flags = ["--sample_losses", str(run / FILE_NAME), "--output", str(wrong / "ranking"), "--limit", "0"]
    assert rank(flags) == 0
    lines = [json.loads(line)["line"] for line in (wrong / "ranking/ranking.jsonl").read_text().splitlines()]
    return lines, set(json.loads((wrong / "exchanged.json").read_text()))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1])
def test_wrong_labels_stand_at_the_head_of_the_list(seed: int, demo: Path, tmp_path: Path) -> None:
    lines, exchanged = rank_wrong(seed, demo, tmp_path)
    assert len(lines) == 1497 and len(exchanged) == 45
    assert len(exchanged.intersection(lines[: round(CUT * len(lines))])) >= 0.9 * len(exchanged)
    if seed == 0:
        clean, kept = (accuracy(train_on(name, demo, tmp_path)) for name in ("digits", "digits_kept"))
        right = np.arange(300) < round(clean * 300)
        interval = score_interval(np.stack([right, np.ones(300)], axis=1), lambda sums, _: float(sums[0] / sums[1]), 0)
        assert interval.low <= kept <= interval.high or kept > clean


def test_the_choice_depends_on_the_seed_alone_and_every_exchanged_answer_is_wrong(demo: Path, tmp_path: Path) -> None:
    before = [json.loads(line) for line in (demo / "data/digits_train.jsonl").read_text().splitlines()]
    for output in (tmp_path / "one", tmp_path / "other"):
        assert write_wrong(["--data", str(demo / "data"), "--output", str(output), "--seed", "0"]) == 0
    text = (tmp_path / "one/digits.jsonl").read_text()
    assert text == (tmp_path / "other/digits.jsonl").read_text()
    after = [json.loads(line) for line in text.splitlines()]
    changed = [line for line, (one, other) in enumerate(zip(before, after, strict=True), start=1) if one != other]
    assert changed == json.loads((tmp_path / "one/exchanged.json").read_text())
    assert all(after[line - 1]["conversations"][1]["value"] == str(after[line - 1]["label"]) for line in changed)
