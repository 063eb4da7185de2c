"""Prompts of a server over HTTP against those of training. The server tokenizes chat requests by stock transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor

from qwenvl.cli.check_serving import main
from qwenvl.serving.server import Server
from qwenvl.utils.errors import UserError
from tests.serving.chat_server import Answer, as_stock, listening


def served(processor: Any) -> AbstractContextManager[str]:
    """Serve ``/tokenize`` as vLLM did before it ran the processor: images are one placeholder."""

    def tokens(request: dict[str, Any]) -> Answer:
        text = processor.apply_chat_template(
            [as_stock(message) for message in request["messages"]],
            tools=request.get("tools"),
            tokenize=False,
            add_generation_prompt=request["add_generation_prompt"],
            **request["chat_template_kwargs"],
        )
        return 200, {"tokens": processor.tokenizer(text, add_special_tokens=False)["input_ids"]}

    return listening(["tiny"], tokens, "/tokenize")


@pytest.fixture
def data(tmp_path: Path) -> list[str]:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    turns = [
        {"role": "user", "content": "<image>What?"},
        {"role": "assistant", "content": "", "reasoning_content": "so", "tool_calls": [call]},
        {"role": "tool", "content": "2"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Sure?"},
        {"role": "assistant", "content": "Yes.", "reasoning": "again"},
    ]
    rows = [{"messages": turns, "image": "a.png", "tools": tools}, {"messages": turns[4:]}]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ["--annotation_path", str(tmp_path / "d.jsonl"), "--data_path", str(tmp_path)]


@pytest.mark.parametrize("checkpoint", [("qwen3_5", None), ("qwen3_vl", "thinking")], ids=str)
def test_prompts_are_those_of_the_server(
    checkpoint: tuple[str, str | None],
    data: list[str],
    tiny_checkpoint: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tiny_checkpoint(*checkpoint)
    processor = AutoProcessor.from_pretrained(folder)
    with served(processor) as url:
        main([*data, "--model_name_or_path", str(folder), "--server", url])
        out = capsys.readouterr().out
        assert '- Ask with "chat_template_kwargs": {"enable_thinking": false} for 1 of the answers looked at.' in out
        said = [line for line in out.splitlines() if line.split()[:1] == ["server"]]
        assert said and all("equal" in line for line in said), said
        processor.chat_template = processor.chat_template.replace(
            "<|im_start|>assistant\\n", "<|im_start|>assistant\\n "
        )
        assert main([*data, "--model_name_or_path", str(folder), "--server", url]) == 1
        said = [line for line in capsys.readouterr().out.splitlines() if line.split()[:1] == ["server"]]
        assert said and all("different" in line for line in said), said


def test_a_server_that_does_not_answer_is_named() -> None:
    with pytest.raises(UserError, match="--server: http://127.0.0.1:9/v1/models does not answer"):
        Server.at("http://127.0.0.1:9")
