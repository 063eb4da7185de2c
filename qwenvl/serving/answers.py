"""Answers of a running OpenAI-compatible server to the rows of datasets, by concurrent requests.

A request holds the turns before the answer as the sample has them, its media as they are on disk, and its tools and
template arguments. Limits, frames and the template are the server's own: tools/check_serving.py compares them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from typing import Any

from qwenvl.data.encoding.encoder import SampleEncoder
from qwenvl.data.media.locate import MediaSources
from qwenvl.data.types import Conversation, Source
from qwenvl.inference.answer_rows import Job, Progress, open_row, with_answer
from qwenvl.inference.generate import Answer, Decoding
from qwenvl.inference.prompts import EvalExample
from qwenvl.metrics.predictions import Prediction
from qwenvl.serving.compare import own_settings
from qwenvl.serving.server import RefusedError, Server, as_request, not_for_requests
from qwenvl.utils.errors import SampleError

CATEGORY = "server"
"""Category of the errors of samples that a request cannot hold, or that the server refuses."""

_OF_THE_REQUEST = (400, 413, 422)
"""Status codes that refuse one request, not the server's client."""


def answer_by_server(
    job: Job,
    indices: Sequence[int],
    server: Server,
    write: Callable[[Iterable[Prediction]], None],
    told: Progress = lambda _: None,
    *,
    requests: int = 16,
) -> None:
    """Answer rows by a server; a row is written once it is answered, in any order.

    Args:
        job: Rows and settings.
        indices: Numbers of the rows.
        server: Server to ask.
        write: Function called with the lines of each row.
        told: Function called with the number of rows that were written.
        requests: Maximum number of concurrent requests.

    Raises:
        UserError: The server does not answer, or refuses more than a single request.
    """

    def finish(futures: set[Future[list[Prediction]]], most: int) -> set[Future[list[Prediction]]]:
        while len(futures) > most:
            done, futures = wait(futures, return_when=FIRST_COMPLETED)
            for future in done:
                write(future.result())
                told(1)
        return futures

    with ThreadPoolExecutor(requests) as pool:
        waiting: set[Future[list[Prediction]]] = set()
        try:
            for index in indices:
                lines = [_ready(job, *line) for line in open_row(job, index)]
                waiting = finish(waiting | {pool.submit(_ask_row, job, server, lines)}, requests)
            finish(waiting, 0)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _ready(job: Job, line: Prediction, example: EvalExample | None) -> tuple[Prediction, dict[str, Any] | None]:
    """Return a line and its request; with an error where a request cannot hold the sample."""
    if example is None:
        return line, None
    try:
        return line, request_of(job, line, example)
    except SampleError as error:
        return replace(line, error=f"{error.category}: {error.reason}"), None


def request_of(job: Job, line: Prediction, example: EvalExample) -> dict[str, Any]:
    """Return the chat request of a sample, without the model's name.

    Args:
        job: Settings of its answer.
        line: Line of the sample.
        example: Opened sample.

    Raises:
        SampleError: A request cannot hold its media.
    """
    items = [plan.item for plan in example.prompt.plans]
    own = sorted({name for item in items for name in own_settings(item)})
    reason = f"the sample has {', '.join(own)} of its own, which a request does not hold" if own else ""
    if reason := not_for_requests(items) or reason:
        raise SampleError(CATEGORY, f"{reason}. Ask the model without --server.")
    request = asking(job.encoder, example, locate_of(job.encoder, example), job.decoding)
    if job.decoding.temperature:  # top_k: a folder's own may be set, and is not used without a server either
        request |= {"top_p": job.decoding.top_p, "top_k": 0, "seed": job.seed + line.index}
    return request


def locate_of(encoder: SampleEncoder, example: EvalExample) -> Callable[[Source], str | bytes]:
    """Return the function that finds the media of a sample."""
    sample = example.sample
    return MediaSources(sample.data_path, encoder.allow_remote, sample.allow_absolute).locate


def asking(
    encoder: SampleEncoder, example: EvalExample, locate: Callable[[Source], str | bytes], decoding: Decoding
) -> dict[str, Any]:
    """Return the chat request of a sample without settings of token sampling.

    Args:
        encoder: Encoder that opened the sample.
        example: Sample.
        locate: Function that finds a medium; called for each of them, in order.
        decoding: Length of the answer, and its temperature.
    """
    prompt = example.prompt
    conversation = Conversation(prompt.messages, prompt.tools, template_kwargs=prompt.arguments)
    request = {
        "messages": [as_request(message, locate) for message in prompt.messages],
        "max_tokens": decoding.max_new_tokens,
        "temperature": decoding.temperature,
        "chat_template_kwargs": encoder.template.arguments(conversation, None),
    }
    if prompt.tools:  # the call stays text, as the template writes it
        request |= {"tools": [dict(tool) for tool in prompt.tools], "tool_choice": "none"}
    return request


def _ask_row(job: Job, server: Server, lines: Sequence[tuple[Prediction, dict[str, Any] | None]]) -> list[Prediction]:
    return [line if request is None else _ask(job, server, line, request) for line, request in lines]


def _ask(job: Job, server: Server, line: Prediction, request: dict[str, Any]) -> Prediction:
    """Return a line with the server's answer, or with the reason why it refuses this request.

    Raises:
        UserError: See :func:`answer_by_server`.
    """
    try:
        choice = server.chat(request)
    except RefusedError as error:
        if error.status not in _OF_THE_REQUEST:
            raise
        return replace(line, error=f"{CATEGORY}: refused ({error.status}): {error.reason}")
    message, cut = choice["message"], choice.get("finish_reason") == "length"
    text = message.get("content") or ""
    if thought := message.get("reasoning") or message.get("reasoning_content"):  # of a server that takes it apart
        text = thought if cut and not text else f"{thought}</think>\n\n{text}"
    thinking = cut and job.encoder.template.opens_thinking and "</think>" not in text
    return with_answer(line, Answer(text, "length" if cut else "stop", thinking))
