"""A running OpenAI-compatible server: its answers, and its prompt ids for comparison with those of training.

vLLM's ``/tokenize`` takes the messages, tools and template arguments of a chat request, and returns the ids of its
prompt (vllm/entrypoints/serve/tokenize/protocol.py, ``TokenizeChatRequest``). 0.32 runs the processor for it: the
placeholders of images and videos are all there, with the timestamps of frames.
"""

from __future__ import annotations

import base64
import json
import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPException
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qwenvl.data.conversation.chat_template import THOUGHT
from qwenvl.data.encoding.encoded import Plan
from qwenvl.data.media.resize import VideoPlan
from qwenvl.data.types import ImageItem, Message, Sample, Source, TextPart, VideoItem
from qwenvl.serving.compare import OUTER_MARKERS, Finding, own_settings, without_outer_markers
from qwenvl.serving.inputs import Serving, arguments_of, asked
from qwenvl.utils.errors import SampleError, UserError

_SECONDS = 60.0
_SECONDS_OF_AN_ANSWER = 3600.0  # of a busy server, which lets requests wait


class RefusedError(UserError):
    """A request that a server refuses.

    Args:
        url: Address of the request.
        status: Status code of HTTP.
        reason: Reason that the server gives.
    """

    def __init__(self, url: str, status: int, reason: str) -> None:
        super().__init__(f"--server: {url} refuses the request ({status}): {reason}")
        self.status, self.reason = status, reason


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
    def at(cls, url: str, model: str | None = None, folder: str = "") -> Server:
        """Return the server at an address.

        Args:
            url: Address, with or without ``/v1``.
            model: Name of the model there; None for the only one, or the one that is served from ``folder``.
            folder: Folder of the model or the adapters that are served.

        Raises:
            UserError: Nothing answers there, or it serves other models.
        """
        root = url.rstrip("/").removesuffix("/v1")
        try:
            served = _models(f"{root}/v1/models")
        except RefusedError:  # transformers serve lists what is in its cache, if there is one
            if model is None:
                raise
            served = {}
        here = [name for name, path in served.items() if folder and os.path.realpath(path) == os.path.realpath(folder)]
        if model is None and (here or len(served) == 1):
            return cls(root, next(iter(here or served)))
        if model is not None and (model in served or not served or os.path.realpath(model) == os.path.realpath(folder)):
            return cls(root, model)
        wanted = f"no model {model!r}" if model is not None else f"none from {folder}" if folder else "several models"
        raise UserError(
            f"--server: {root} serves {', '.join(served) or 'no model'}, {wanted}. Name one by --server_model."
        )

    def chat(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the first choice of the server's answer to a chat request, whose model is this one.

        Raises:
            RefusedError: The server refuses the request.
            UserError: The server does not answer.
        """
        choice: Mapping[str, Any] = self.complete(request)["choices"][0]
        return choice

    def complete(self, request: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the whole answer to a chat request, with the number of its tokens; see :meth:`chat`."""
        url = f"{self.url}/v1/chat/completions"
        found: Mapping[str, Any] = _answer(url, {"model": self.model, **request}, _SECONDS_OF_AN_ANSWER)
        try:
            assert isinstance(found["choices"][0]["message"], dict)
        except (TypeError, KeyError, IndexError, AssertionError) as error:
            raise UserError(f"--server: {url} does not answer as an OpenAI-compatible server.") from error
        return found

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

    A server that writes one placeholder for each image (vLLM before it ran the processor for ``/tokenize``) is compared
    with one for each, which says nothing of sizes and frames; prompts with videos are not compared with it then.
    """
    if plan.rendering.whole:
        return [Finding("prompt ids", "not compared", "the conversation is trained as rendered, not behind prompts")]
    if reason := not_for_requests(medium.item for medium in plan.media):
        return [Finding("prompt ids", "not compared", reason)]
    trained = plan.tokens.input_ids[: plan.tokens.starts[-1]]
    try:
        locate = serving.sources(sample).locate
        messages = [as_request(message, locate) for message in asked(serving, plan)]
        served = server.prompt_ids(messages, plan.conversation.tools, arguments_of(serving, plan))
    except SampleError as error:
        return [Finding("prompt ids", "different", error.reason)]
    return [_compare_ids(serving, plan, trained, torch.tensor(served))]


def not_for_requests(items: Iterable[ImageItem | VideoItem]) -> str:
    """Return why a request cannot hold media; empty where it can."""
    if any(isinstance(item.source, tuple) for item in items):
        return "a video is given as a list of frames, which a request does not hold"
    return ""


def _compare_ids(serving: Serving, plan: Plan, trained: Tensor, served: Tensor) -> Finding:
    item, pads = "prompt ids", [serving.config.image_token_id, serving.config.video_token_id]
    if torch.equal(trained, served):
        media = ", those of media among them" if plan.media else ""
        return Finding(item, "equal", f"{len(trained)} ids{media}")
    if torch.equal(trained, without_outer_markers(served, serving.processor)):
        return Finding(item, "known", f"{len(served) - len(trained)} more: {OUTER_MARKERS}")
    unexpanded = plan.media and int(torch.isin(served, torch.tensor(pads)).sum()) == len(plan.media)
    if unexpanded and any(isinstance(medium, VideoPlan) for medium in plan.media):
        return Finding(item, "not compared", "this server's /tokenize does not write the frames of videos")
    ours, theirs = trained.tolist(), served.tolist()
    if unexpanded:
        ours, theirs = _collapsed(ours, pads), _collapsed(theirs, pads)
        if ours == theirs:
            return Finding(item, "equal", f"{len(ours)} ids, images as one each")
    return _first_difference(serving, plan, ours, theirs)


def _first_difference(serving: Serving, plan: Plan, ours: Sequence[int], theirs: Sequence[int]) -> Finding:
    pairs = enumerate(zip(ours, theirs, strict=False))
    place = next((n for n, (a, b) in pairs if a != b), min(len(ours), len(theirs)))
    decode = serving.trained.tokenizer.decode
    shown = [repr(decode(ids[max(place - 8, 0) : place + 8])) for ids in (ours, theirs)]
    detail = f"from id {place} on: {shown[0]} in training, {shown[1]} at the server; {len(ours)} and {len(theirs)} ids"
    own = sorted({name for medium in plan.media for name in own_settings(medium.item)})
    if own:
        return Finding("prompt ids", "known", f"{detail}: the sample has {', '.join(own)} of its own")
    return Finding("prompt ids", "different", detail)


def as_request(message: Message, locate: Callable[[Source], str | bytes]) -> dict[str, Any]:
    """Return a turn in the form of OpenAI's protocol, media as ``data:`` URIs.

    Args:
        message: Turn, whose videos are files.
        locate: Function that finds a medium: its path or content.
    """
    content: list[dict[str, Any]] = []
    for part in message.parts:
        if isinstance(part, TextPart):
            content.append({"type": "text", "text": part.text})
        else:
            kind, mime = ("image", "image/*") if isinstance(part, ImageItem) else ("video", "video/mp4")
            url = f"data:{mime};base64,{_base64_of(part, locate)}"
            content.append({"type": f"{kind}_url", f"{kind}_url": {"url": url}})
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


def _base64_of(item: ImageItem | VideoItem, locate: Callable[[Source], str | bytes]) -> str:
    assert not isinstance(item.source, tuple)
    located = locate(item.source)
    data = located if isinstance(located, bytes) else Path(located).read_bytes()
    return base64.b64encode(data).decode()


def _as_call(number: int, call: Mapping[str, Any]) -> dict[str, Any]:
    function = call.get("function", call)
    arguments = function.get("arguments", {})
    text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return {"id": f"call_{number}", "type": "function", "function": {"name": function["name"], "arguments": text}}


def _collapsed(ids: Sequence[int], pads: Sequence[int]) -> list[int]:
    """Return ids with every run of a placeholder as one."""
    found: list[int] = []
    for number, group in groupby(ids):
        found += [number] if number in pads else list(group)
    return found


def _models(url: str) -> dict[str, str]:
    """Return the names of the models that a server lists, with the folders that it says they are from.

    Raises:
        UserError: The server does not answer.
    """
    found = _answer(url)
    try:
        return {str(one["id"]): str(one.get("root") or one["id"]) for one in found["data"]}
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(f"--server: {url} does not answer as an OpenAI-compatible server.") from error


def _answer(url: str, request: Mapping[str, Any] | None = None, seconds: float = _SECONDS) -> Any:
    data = None if request is None else json.dumps(request).encode()
    headers = {"Content-Type": "application/json"}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=seconds) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise RefusedError(url, error.code, _reason(error.read().decode(errors="replace"))) from error
    except (OSError, ValueError, HTTPException) as error:
        raise UserError(f"--server: {url} does not answer as an OpenAI-compatible server: {error}.") from error


def _reason(body: str) -> str:
    """Return the message of an error as vLLM, SGLang, llama.cpp and transformers write it; else the body's start."""
    try:
        found = json.loads(body)
        told = found.get("error", found)
        return str(told["message"] if "message" in told else told["detail"])[:1000]
    except (ValueError, TypeError, KeyError, AttributeError):
        return body.strip()[:300] or "without a reason"
