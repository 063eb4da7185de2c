"""Prompt ids of a running OpenAI-compatible server, for comparison with those of training.

vLLM's ``/tokenize`` takes the messages, tools and template arguments of a chat request, and returns the ids of its
prompt with one placeholder for each image. (vllm/entrypoints/serve/tokenize/protocol.py, ``TokenizeChatRequest``.)
"""

from __future__ import annotations

import base64
import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from qwenvl.data.conversation.chat_template import THOUGHT
from qwenvl.data.encoding.encoded import Plan
from qwenvl.data.media.resize import VideoPlan
from qwenvl.data.types import ImageItem, Message, Sample, TextPart
from qwenvl.serving.compare import Finding
from qwenvl.serving.inputs import Serving, arguments_of, asked
from qwenvl.utils.errors import SampleError, UserError

_SECONDS = 60.0


@dataclass(frozen=True)
class Server:
    """A running server.

    Args:
        url: Its address, with or without ``/v1``.
        model: Name of the model to ask for.
    """

    url: str
    model: str

    @classmethod
    def at(cls, url: str, model: str | None = None) -> Server:
        """Return the server at an address, and by default the first model that it serves.

        Raises:
            UserError: Nothing answers there.
        """
        root = url.rstrip("/").removesuffix("/v1")
        if model is None:
            models = _answer(f"{root}/v1/models")
            model = str(models["data"][0]["id"])
        return cls(root, model)

    def prompt_ids(
        self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any]
    ) -> list[int]:
        """Return the ids of the prompt that the server makes of a chat request.

        Raises:
            UserError: The server does not answer, or refuses the request.
        """
        request: dict[str, Any] = {
            "model": self.model,
            "messages": list(messages),
            "add_generation_prompt": True,
            "chat_template_kwargs": dict(arguments),
            "add_special_tokens": False,
        }
        if tools:
            request["tools"] = [dict(tool) for tool in tools]
        return [int(number) for number in _answer(f"{self.url}/tokenize", request)["tokens"]]


def compare_prompts(server: Server, serving: Serving, plan: Plan, sample: Sample) -> list[Finding]:
    """Compare the prompt of the last answer of a training row with the server's.

    Runs of image placeholders count as one. Prompts with videos are not compared: the server writes their timestamps
    after it has tokenized.
    """
    if plan.rendering.whole:
        return [Finding("prompt ids", "not compared", "the conversation is trained as rendered, not behind prompts")]
    if any(isinstance(medium, VideoPlan) for medium in plan.media):
        return [Finding("prompt ids", "not compared", "/tokenize does not write the frames of videos")]
    pad = serving.config.image_token_id
    trained = _collapsed(plan.tokens.input_ids[: plan.tokens.starts[-1]].tolist(), pad)
    try:
        messages = [_as_request(message, serving, sample) for message in asked(serving, plan)]
        served = server.prompt_ids(messages, plan.conversation.tools, arguments_of(serving, plan))
    except SampleError as error:
        return [Finding("prompt ids", "different", error.reason)]
    served = _collapsed(served, pad)
    if served == trained:
        return [Finding("prompt ids", "equal", f"{len(trained)} ids, images as one each")]
    pairs = enumerate(zip(trained, served, strict=False))
    place = next((n for n, (a, b) in pairs if a != b), min(len(trained), len(served)))
    decode = serving.trained.tokenizer.decode
    shown = [repr(decode(ids[max(place - 8, 0) : place + 8])) for ids in (trained, served)]
    return [Finding("prompt ids", "different", f"from id {place} on: {shown[0]} in training, {shown[1]} at the server")]


def _as_request(message: Message, serving: Serving, sample: Sample) -> dict[str, Any]:
    """Return a turn in the form of OpenAI's protocol."""
    content: list[dict[str, Any]] = []
    for part in message.parts:
        if isinstance(part, TextPart):
            content.append({"type": "text", "text": part.text})
        elif isinstance(part, ImageItem):
            located = serving.sources(sample).locate(part.source)
            data = located if isinstance(located, bytes) else Path(located).read_bytes()
            url = f"data:image/*;base64,{base64.b64encode(data).decode()}"
            content.append({"type": "image_url", "image_url": {"url": url}})
    only_text = all(item["type"] == "text" for item in content)
    body: Any = "".join(item["text"] for item in content) if only_text else content
    written = {"role": message.role, "content": body, **message.extra}
    if calls := written.get("tool_calls"):
        written["tool_calls"] = [_as_call(number, call) for number, call in enumerate(calls)]
    if message.role == "tool":
        written.setdefault("tool_call_id", "call_0")
    if thought := written.get(THOUGHT):
        written["reasoning"] = thought  # vLLM's name for it
    return written


def _as_call(number: int, call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    arguments = function.get("arguments", {})
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {"id": f"call_{number}", "type": "function", "function": {"name": function["name"], "arguments": text}}


def _collapsed(ids: Sequence[int], pad: int) -> list[int]:
    """Return ids with every run of a placeholder as one."""
    found: list[int] = []
    for number, group in groupby(ids):
        found += [number] if number == pad else list(group)
    return found


def _answer(url: str, request: Mapping[str, Any] | None = None) -> Any:
    data = None if request is None else json.dumps(request).encode()
    headers = {"Content-Type": "application/json"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=_SECONDS) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        reason = error.read().decode(errors="replace")[:300]
        raise UserError(f"--server: {url} refuses the request ({error.code}): {reason}") from error
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--server: {url} does not answer as an OpenAI-compatible server: {error}.") from error
