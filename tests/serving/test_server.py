"""Prompts of a server over HTTP against those of training. The server tokenizes chat requests by stock transformers."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor

from qwenvl.cli.check_serving import main
from qwenvl.serving.server import Server
from qwenvl.utils.errors import UserError


@contextmanager
def served(processor: Any) -> Iterator[str]:
    """Serve ``/v1/models`` and ``/tokenize`` as vLLM does: images are one placeholder, arguments of calls parsed."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.answer({"data": [{"id": "tiny"}]})

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            messages = [as_stock(message) for message in request["messages"]]
            text = processor.apply_chat_template(
                messages,
                tools=request.get("tools"),
                tokenize=False,
                add_generation_prompt=request["add_generation_prompt"],
                **request["chat_template_kwargs"],
            )
            self.answer({"tokens": processor.tokenizer(text, add_special_tokens=False)["input_ids"]})

        def answer(self, value: Any) -> None:
            body = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def as_stock(message: dict[str, Any]) -> dict[str, Any]:
    parts = []
    if isinstance(message["content"], list):
        for part in message["content"]:
            if part["type"] == "image_url":
                data = part["image_url"]["url"].partition("base64,")[2]
                Image.open(io.BytesIO(base64.b64decode(data))).load()
                parts.append({"type": "image"})
            else:
                parts.append(part)
        message = {**message, "content": parts}
    for call in message.get("tool_calls", ()):
        call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return message


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
