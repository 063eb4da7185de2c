"""Samples that are trained as they are and still said: the same words and numbers from every command."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwenvl.cli.check_image.command import main as check_image
from qwenvl.cli.show_sample import main as show_sample
from qwenvl.data.encoding.encoded import Event
from qwenvl.data.sample_stats import REMARKS
from qwenvl.train.records.skipped_samples import DataReport
from qwenvl.train.train_qwen import main as train
from tests.e2e.test_errors import Place

QUESTION = {"from": "human", "value": "Read."}


def answer(text: str, **turn: Any) -> dict[str, Any]:
    return {"from": "gpt", "value": text, **turn}


THOUGHT = "<think>\nhm\n</think>\n\nA"
RECORDS = [
    [QUESTION, answer(THOUGHT), QUESTION, answer(THOUGHT)],
    [QUESTION, answer("A1", reasoning="A"), QUESTION, answer("A2", reasoning="A")],  # words of the answer
    [QUESTION, answer(THOUGHT, loss=False), QUESTION, answer(THOUGHT)],  # the context of a server
    [QUESTION, answer("A"), QUESTION, answer(THOUGHT)],  # nothing to leave out
    [QUESTION, answer(""), QUESTION, answer(THOUGHT)],
    [QUESTION, answer("", loss=False), QUESTION, answer(THOUGHT)],
    [QUESTION, answer(" \n")],
]
COUNTS = {
    ("thinking", "exact"): {"empty_answers": 2},
    ("thinking", "as_rendered"): {"thinking_mismatch": 1, "thoughts_left_out": 2, "empty_answers": 2},
    ("", "exact"): {"thinking_mismatch": 6, "empty_answers": 2},
}
"""Of each kind, by template and history; without thoughts, all but the last are mismatches."""


@pytest.mark.parametrize(("template", "history"), COUNTS)
def test_every_command_says_the_same(
    template: str,
    history: str,
    tmp_path: Path,
    tiny_checkpoint: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    place = Place(tmp_path, tiny_checkpoint("qwen3_vl", template or None))
    records = [{"id": str(n), "conversations": turns} for n, turns in enumerate(RECORDS)]
    if not template:  # which has no place for a thought beside the text, and refuses it
        records[1] = records[0] | {"id": "again"}
    place.write(*records)
    counts = COUNTS[template, history]
    wanted = sorted(f"{count} sample{'s' * (count != 1)} {REMARKS[kind]}." for kind, count in counts.items())

    def said(output: str) -> list[str]:
        lines = [line.partition("Dataset 'set': ")[2].strip() for line in output.splitlines()]
        return sorted(line for line in lines if any(meaning in line for meaning in REMARKS.values()))

    flags = place.flags(max_steps=4, history=history)
    assert train([*flags, "--dry_run", "True"]) == 0
    assert said(capsys.readouterr().err) == wanted
    assert (
        train([*place.flags(dataset_use="set%200", history=history), "--dry_run", "True"]) == 0
    )  # from the cache, each counted once
    assert said(capsys.readouterr().err) == wanted
    assert train(flags) == 0
    assert said(capsys.readouterr().err) == wanted
    data = ["--dataset_use", "set", "--dataset_registry", str(place.registry)]
    model = ["--model_name_or_path", str(place.model), "--history", history]
    check_image([*data, *model, "--output", str(tmp_path / "out"), "--workers", "0"])
    assert said(capsys.readouterr().out) == wanted
    assert show_sample([*data, *model, "--all"]) == 0
    shown = capsys.readouterr().out
    for kind, count in counts.items():
        assert shown.count(f"A sample {REMARKS[kind]}.") == count, kind


def test_each_dataset_has_its_first_one_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    report = DataReport(str(tmp_path))
    report.add([Event("empty_answers", name, f"{name} {number}") for number in range(3) for name in ("a", "b")])
    assert [record.args for record in caplog.records] == [("a 0",), ("b 0",)]
    assert report.summary() == [f"Dataset {name!r}: 3 samples {REMARKS['empty_answers']}." for name in ("a", "b")]
