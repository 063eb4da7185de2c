"""llama.cpp's own server for a check: started on this machine, asked for answers with their log-probabilities."""

from __future__ import annotations

import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Any

from PIL import Image

from qwenvl.cli.export.check import Heard
from qwenvl.data.encoding.encoder import SampleEncoder
from qwenvl.data.types import Source
from qwenvl.inference.generate import Decoding
from qwenvl.inference.prompts import EvalExample
from qwenvl.serving.answers import asking, locate_of
from qwenvl.serving.server import Server
from qwenvl.utils.errors import UserError

_PAUSE = 0.2


@contextmanager
def llama_server(command: str, flags: Sequence[str]) -> Iterator[Server]:
    """Start the server on a free port of the loopback interface; end it on leaving the context.

    Args:
        command: Command of the server.
        flags: Its arguments.

    Raises:
        UserError: It cannot be started, or ends before it answers.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [command, *flags, "--host", "127.0.0.1", "--port", str(port), "-np", "1"]
    with tempfile.TemporaryFile() as log:
        try:
            process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)
        except OSError as error:
            raise UserError(
                f"--llama_server {command} does not run ({error.strerror}): the check needs llama.cpp's server. Name "
                "its command, as build/bin/llama-server of its folder."
            ) from error
        try:
            address = f"http://127.0.0.1:{port}"
            while not _is_up(address):
                if process.poll() is not None:
                    log.seek(0)
                    said = "\n".join(log.read().decode(errors="replace").strip().splitlines()[-8:])
                    raise UserError(f"--llama_server {command} ends without opening the files. Its last lines:\n{said}")
                time.sleep(_PAUSE)
            yield Server.at(address)
        finally:
            process.terminate()
            process.wait()


def _is_up(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5):
            return True
    except OSError:
        return False


def listen(server: Server, encoder: SampleEncoder, example: EvalExample, tokens: int, *, as_trained: bool) -> Heard:
    """Return the server's greedy answer to a sample.

    Args:
        server: llama.cpp's server.
        encoder: Encoder that opened the sample.
        example: Sample with images or none.
        tokens: Most tokens of the answer.
        as_trained: Send images in the sizes of training, with its pixels, in place of the files.

    Raises:
        UserError: The server refuses the request, or does not say what its answers' tokens are.
    """
    locate = _pixels_of(example) if as_trained else locate_of(encoder, example)
    request = asking(encoder, example, locate, Decoding(tokens))
    found = server.complete(request | {"logprobs": True, "top_logprobs": 1, "cache_prompt": False})
    choice: Any = found["choices"][0]
    try:
        said = [(int(one["id"]), float(one["logprob"])) for one in choice["logprobs"]["content"]]
        prompt_tokens = int(found["usage"]["prompt_tokens"])
    except (KeyError, TypeError) as error:
        raise UserError(
            f"--llama_server: its answers lack {error}: it is another server, or an older release than the "
            "tried ones (docs/compatibility.md)."
        ) from error
    said = said[:-1] if choice.get("finish_reason") == "stop" else said  # the token that ends the turn
    return Heard(tuple(token for token, _ in said), tuple(value for _, value in said), prompt_tokens)


def _pixels_of(example: EvalExample) -> Callable[[Source], bytes]:
    """Return a function that gives the images of a sample one by one, as training resizes them."""
    frames = iter(example.prompt.frames)

    def locate(_: Source) -> bytes:
        stream = BytesIO()
        Image.fromarray(next(frames)[0].cpu().numpy()).save(stream, "PNG")
        return stream.getvalue()

    return locate
