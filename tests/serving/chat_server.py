"""OpenAI-compatible servers over HTTP that answer by a folder's stock model and processor of transformers."""

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

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

Answer = tuple[int, dict[str, Any]]


class StockModel:
    """A folder's model; answers greedily, one request after the other.

    Args:
        folder: Folder of the model.
        context: Most tokens of a prompt and its answer; longer ones are refused, as vLLM does.
    """

    def __init__(self, folder: Path, context: int = 100_000) -> None:
        self.name, self.context = str(folder), context
        self.asked: list[dict[str, Any]] = []
        self.processor: Any = AutoProcessor.from_pretrained(folder)
        self.model: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto").eval()
        self._lock = threading.Lock()

    def answer(self, request: dict[str, Any]) -> Answer:
        """Return the status and the body of the answer to a chat request."""
        if request["model"] != self.name:
            return 404, {"error": {"message": f"The model `{request['model']}` does not exist."}}
        assert request["temperature"] == 0
        with self._lock:
            self.asked.append(request)
            messages = [as_stock(message) for message in request["messages"]]
            inputs = self.processor.apply_chat_template(
                messages,
                tools=request.get("tools"),
                tokenize=True,
                return_dict=True,
                return_tensors="pt",
                add_generation_prompt=True,
                **request["chat_template_kwargs"],
            )
            length, most = inputs["input_ids"].shape[1], request["max_tokens"]
            if length + most > self.context:
                return 400, {"error": {"message": f"This model's maximum context length is {self.context} tokens."}}
            with torch.no_grad():
                ids = self.model.generate(**inputs, max_new_tokens=most, do_sample=False)[0, length:]
            ended = ids[-1].item() in torch.as_tensor(self.model.generation_config.eos_token_id)
            text = self.processor.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        choice = {"message": {"content": text}, "finish_reason": "stop" if ended else "length"}
        return 200, {"choices": [choice]}


def as_stock(message: dict[str, Any]) -> dict[str, Any]:
    """Return a turn of a request as stock processors take it: images opened, arguments of calls parsed."""
    parts = []
    if isinstance(message["content"], list):
        for part in message["content"]:
            if part["type"] == "image_url":
                data = part["image_url"]["url"].partition("base64,")[2]
                image = Image.open(io.BytesIO(base64.b64decode(data)))
                image.load()
                parts.append({"type": "image", "image": image})
            else:
                parts.append(part)
        message = {**message, "content": parts}
    for call in message.get("tool_calls", ()):
        call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return message


@contextmanager
def listening(
    names: list[str], answer: Callable[[dict[str, Any]], Answer], path: str = "/v1/chat/completions", port: int = 0
) -> Iterator[str]:
    """Serve ``/v1/models``, ``/health`` and the answers to the requests of a path; yield the address.

    Args:
        names: Names of the models.
        answer: Function that answers a request.
        path: Path of the requests.
        port: Port; 0 for a free one.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.reply(200, {"data": [{"id": name} for name in names]})

        def do_POST(self) -> None:
            assert self.path == path
            self.reply(*answer(json.loads(self.rfile.read(int(self.headers["Content-Length"])))))

        def reply(self, status: int, value: Any) -> None:
            body = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
