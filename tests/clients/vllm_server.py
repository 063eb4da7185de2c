"""A real vLLM on the CPU, started with the command that ``check_serving`` prints, and asked over loopback."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SETTINGS = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}


def printed_command(printed: str) -> list[str]:
    """Return the words of the vLLM command among the lines of ``check_serving``."""
    (command,) = re.findall(r"^vllm serve (?:.*\\\n)*.*", printed, flags=re.MULTILINE)
    return shlex.split(command.replace("\\\n", " "))


@contextmanager
def serving(environment: Path, command: Sequence[str], log: Path, dtype: str = "float32") -> Iterator[str]:
    """Start a server; yield its address once it answers.

    Args:
        environment: Virtual environment with vLLM.
        command: Words of :func:`printed_command`.
        log: File for what it prints.
        dtype: Type that it computes with.
    """
    words = [str(environment / "bin" / command[0]), *command[1:], "--enforce-eager", "--dtype", dtype]
    with running(words, log) as address:
        yield address


@contextmanager
def running(command: Sequence[str], log: Path, **variables: str) -> Iterator[str]:
    """Start a server; yield its address once it answers.

    Args:
        command: Words that take further flags of ``vllm serve``.
        log: File for what it prints.
        variables: Environment variables.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [*command, "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as file:
        process = subprocess.Popen(words, env=os.environ | SETTINGS | variables, stdout=file, stderr=subprocess.STDOUT)
    try:
        address = f"http://127.0.0.1:{port}"
        while not _is_up(address):
            assert process.poll() is None, f"vLLM ended: {log.read_text()[-4000:]}"
            time.sleep(1)
        yield address
    finally:
        process.terminate()
        process.wait()


def _is_up(address: str) -> bool:
    try:
        read(f"{address}/health")
    except OSError:
        return False
    return True


def read(url: str) -> str:
    """Return the text at an address."""
    with urllib.request.urlopen(url, timeout=5) as reply:
        text: str = reply.read().decode()
    return text


def counted(metrics: str, name: str) -> float:
    """Return the sum of a counter of the page ``/metrics``."""
    return sum(float(line.split()[-1]) for line in metrics.splitlines() if line.startswith(f"{name}{{"))


def ask(
    address: str, model: str, messages: Sequence[Mapping[str, Any]], arguments: Mapping[str, Any], tokens: int = 16
) -> dict[str, Any]:
    """Return ``prompt`` and ``answer``, lists of ids, and ``logprobs`` of the answer, of a greedy request."""
    request = {
        "model": model,
        "messages": list(messages),
        "temperature": 0,
        "max_tokens": tokens,
        "logprobs": True,
        "return_token_ids": True,
        "chat_template_kwargs": dict(arguments),
    }
    headers = {"Content-Type": "application/json"}
    body = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(request).encode(), headers)
    try:
        with urllib.request.urlopen(body, timeout=600) as reply:
            found = json.load(reply)
    except urllib.error.HTTPError as error:
        raise AssertionError(error.read().decode()) from error
    choice = found["choices"][0]
    return {
        "prompt": found["prompt_token_ids"],
        "answer": choice["token_ids"],
        "logprobs": [one["logprob"] for one in choice["logprobs"]["content"]],
    }
