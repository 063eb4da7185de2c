"""The tool that plans packs: its figures, files and messages (what is trained on: train/build/test_packing.py)."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pyarrow import parquet

from qwenvl.cli.pack_data import main

LIMIT = 128
Tool = Callable[..., int]


def text(words: int, answer: str = "yes") -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": "word " * words}, {"from": "gpt", "value": answer}]}


@pytest.fixture
def pack_data(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Tool:
    """Function of flags that calls the tool on eight texts, one that is too long and two without an answer."""
    silent = {"conversations": [{"from": "human", "value": "and?"}]}
    rows = [*(text(2 * number) for number in range(1, 9)), text(300), silent, silent]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    entry = {"annotation_path": str(tmp_path / "rows.json"), "data_path": ""}
    (tmp_path / "own.py").write_text(f"data_dict = {{'own': {entry!r}}}")

    def run(**settings: Any) -> int:
        named = {"model_name_or_path": tiny_checkpoint("qwen3_vl"), "dataset_registry": tmp_path / "own.py"}
        named |= {"dataset_use": "own", "model_max_length": LIMIT, "output": tmp_path / "plan", **settings}
        return main([text for name, value in named.items() if value is not None for text in (f"--{name}", str(value))])

    return run


def test_report_and_file_say_what_was_planned(
    pack_data: Tool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {"on_bad_sample": "skip", "world_size": 2}
    assert pack_data(**settings, report=tmp_path / "r" / "report.json") == 0
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    assert report["left_out"] == {"no_answer": 2, "overlength": 1}
    assert (report["rows"], report["samples"]) == (11, 8)
    assert report["balance"]["world_size"] == 2
    assert report["balance"]["slowest_over_mean"] >= 1
    assert report["fill"] == pytest.approx(report["tokens"] / report["packs"] / LIMIT)
    assert report["lower_bound"] <= report["packs"]
    table = parquet.read_table(tmp_path / "plan").to_pydict()
    assert table["pack"][-3:] == [None] * 3
    assert sorted(table["row"]) == list(range(11))
    assert sum(table["tokens"]) == report["tokens"]
    assert sum(table["trained_tokens"]) == report["trained_tokens"]
    assert max(table["tokens"]) == report["longest"]
    assert all((cost > 0) == (tokens > 0) for cost, tokens in zip(table["cost"], table["tokens"], strict=True))
    assert "no answer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"output": None}, "--output is missing"),
        ({"model_max_length": None}, "--model_max_length is missing"),
        ({"dataset_use": None}, "--dataset_use NAMES"),
        ({"format": "official", "output": "x.parquet"}, ".json or .jsonl"),
        ({"dataset_use": "owm"}, "Did you mean"),
        ({"on_bad_sample": "raise"}, "rows.json:10"),
        ({"output": "/proc/none/plan"}, "cannot be written"),
        ({"report": "/proc/none/report"}, "cannot be written"),
    ],
)
def test_mistakes_are_one_message(
    flags: dict[str, Any], message: str, pack_data: Tool, caplog: pytest.LogCaptureFixture
) -> None:
    assert pack_data(**{"on_bad_sample": "skip", **flags}) == 1
    assert message in caplog.text
    assert "Traceback" not in caplog.text
