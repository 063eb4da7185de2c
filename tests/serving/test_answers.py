"""Answers of a server through tools/predict.py and tools/evaluate.py, against those of the folder's own model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from qwenvl.cli.evaluate.command import main as evaluate
from qwenvl.cli.predict.command import main as predict
from tests.serving.chat_server import Answer, StockModel, listening

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def _turns(question: str, answer: str) -> list[dict[str, Any]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    """Images, text, a packed row, tool calls, and three samples that cannot be asked."""
    generator = np.random.default_rng(0)
    for number in range(3):
        pixels = generator.integers(0, 255, (40, 60 + 8 * number, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    agent = [
        {"role": "user", "content": "<image>What?"},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "Two."},
    ]
    rows: list[Any] = [
        {"id": "one", "image": "0.png", "conversations": _turns("<image>What is it?", "A thing.")},
        {"id": "two", "image": ["1.png", "2.png"], "conversations": _turns("<image><image>Which?", "Both.")},
        {"id": "gone", "image": "gone.png", "conversations": _turns("<image>?", "No.")},
        [{"conversations": _turns("One?", "1")}, {"conversations": _turns("Two?", "2")}],
        {"id": "agent", "messages": agent, "image": "0.png", "tools": TOOLS},
        {"id": "frames", "video": [["0.png", "0.png"]], "conversations": _turns("<video>?", "No.")},
        {"id": "own", "image": "0.png", "max_pixels": 4096, "conversations": _turns("<image>?", "No.")},
    ]
    (tmp_path / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--annotation_path", str(tmp_path / "set.jsonl"), "--data_path", str(tmp_path), "--max_new_tokens", "5"]


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("checkpoint", [("qwen3_vl", None), ("qwen3_5", None)], ids=str)
def test_a_servers_answers_are_those_of_the_folders_model(
    checkpoint: tuple[str, str | None], data: list[str], tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_checkpoint(*checkpoint)
    model = ["--model_name_or_path", str(folder), *data]
    assert predict([*model, "--device", "cpu", "--output", str(tmp_path / "own.jsonl")]) == 1
    stock = StockModel(folder)
    with listening(["other", str(folder)], stock.answer) as url:
        asked = [*model, "--server", f"{url}/v1/", "--requests", "3"]
        assert predict([*asked, "--output", str(tmp_path / "served.jsonl")]) == 1
        assert evaluate([*asked, "--output", str(tmp_path / "scores")]) == 1
    own, served = lines(tmp_path / "own.jsonl"), lines(tmp_path / "served.jsonl")
    refused = {line["id"]: line["error"] for line in served if line["id"] in ("frames", "own")}
    assert [line for line in served if line["id"] not in refused] == [line for line in own if line["id"] not in refused]
    assert refused["frames"].startswith("server: a video is given as a list of frames")
    assert refused["own"].startswith("server: the sample has max_pixels of its own")
    assert sum("error" not in line for line in served) == 5
    assert [request["tools"] for request in stock.asked if "tools" in request] == [TOOLS, TOOLS]
    assert lines(tmp_path / "scores" / "predictions.jsonl") == served
    settings = json.loads((tmp_path / "served.jsonl.settings.json").read_text())
    assert settings["server_model"] == str(folder)


def test_what_is_missing_is_asked_after_a_server_that_failed(
    data: list[str], tiny_checkpoint: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, output = tiny_checkpoint("qwen3_vl"), tmp_path / "answers.jsonl"
    stock = StockModel(folder)

    def failing(request: dict[str, Any]) -> Answer:
        return stock.answer(request) if len(stock.asked) < 2 else (500, {"error": {"message": "out of memory"}})

    flags = ["--model_name_or_path", str(folder), *data, "--output", str(output), "--requests", "1"]
    with listening([str(folder)], failing) as url:
        assert predict([*flags, "--server", url]) == 2
        assert f"{url}/v1/chat/completions refuses the request (500): out of memory" in caplog.text
    assert not output.exists()
    with listening([str(folder)], stock.answer) as url:
        assert predict([*flags, "--server", url]) == 1
    texts = [json.dumps(request["messages"]) for request in stock.asked]
    assert len(texts) == len(set(texts)) == 5  # none is asked again
    assert [line["line"] for line in lines(output)] == [1, 2, 3, 4, 4, 5, 6, 7]


def test_a_prompt_that_is_too_long_is_an_error_of_its_sample(
    data: list[str], tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    folder, output = tiny_checkpoint("qwen3_vl"), tmp_path / "answers.jsonl"
    stock = StockModel(folder, context=20)
    with listening([str(folder)], stock.answer) as url:
        flags = ["--model_name_or_path", str(folder), *data, "--server", url, "--output", str(output)]
        assert predict(flags) == 1
    said = "server: refused (400): This model's maximum context length is 20 tokens."
    assert [line["id"] for line in lines(output) if line.get("error") == said] == ["one", "two", "agent"]


def test_one_message_names_what_is_wrong_with_a_server(
    data: list[str], tiny_checkpoint: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tiny_checkpoint("qwen3_vl")
    flags = ["--model_name_or_path", str(folder), *data, "--output", str(tmp_path / "answers.jsonl")]

    def message(*more: str) -> str:
        caplog.clear()
        assert predict([*flags, *more]) == 2
        (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
        return record.getMessage()

    assert "http://127.0.0.1:9/v1/models does not answer" in message("--server", "http://127.0.0.1:9")
    assert "does not answer as an OpenAI-compatible server: unknown url type" in message("--server", "localhost")
    with listening(["base", "adapter"], lambda request: (401, {"error": {"message": "no key"}})) as url:
        server = ("--server", url)
        told = message(*server)
        assert told == f"--server: {url} serves base, adapter, none from {folder}. Name one by --server_model."
        assert "serves base, adapter, no model 'x'" in message(*server, "--server_model", "x")
        assert "refuses the request (401): no key" in message(*server, "--server_model", "adapter")
        assert "--max_pixels has no effect with --server" in message(*server, "--max_pixels", "4096")
        assert "--batch_size has no effect with --server" in message(*server, "--batch_size", "2")
        assert "--requests must be 1 or more" in message(*server, "--requests", "0")
    assert "are for a --server: name its address" in message("--requests", "2")
