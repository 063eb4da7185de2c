"""What a run uploads: to a server on this machine that takes what the hub's client sends."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.runs import REPOSITORY, flags


class _Hub(BaseHTTPRequestHandler):
    """Accepts a repository and commits; keeps the files."""

    def do_POST(self) -> None:
        server: Any = self.server
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        answer: dict[str, Any] = {}
        if self.path.endswith("/repos/create"):
            answer = {"url": f"http://127.0.0.1:{server.server_port}/me/model", "name": "me/model", "id": "me/model"}
        elif "/preupload/" in self.path:
            named = [file["path"] for file in json.loads(body)["files"]]
            answer = {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in named]}
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            files = [line["value"] for line in lines if line["key"] == "file"]
            header = next(line["value"]["summary"] for line in lines if line["key"] == "header")
            server.commits.append((header, {file["path"]: base64.b64decode(file["content"]) for file in files}))
            answer = {"commitUrl": f"http://127.0.0.1:{server.server_port}/me/model/commit/1", "commitOid": "1"}
        self._answer(answer)

    def do_GET(self) -> None:
        self._answer({"id": "me/model", "sha": "0", "siblings": [], "tags": []})

    def do_HEAD(self) -> None:
        self._answer({})

    def _answer(self, value: dict[str, Any]) -> None:
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def hub() -> Iterator[Any]:
    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), _Hub)
    server.commits = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.mark.slow
def test_the_model_alone_is_pushed(
    hub: Any, tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    """The hub's client reads its address when it is imported: in a process of its own."""
    output = tmp_path / "run"
    asked = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "report_to": "tensorboard"}
    pushed = {"push_to_hub": True, "hub_model_id": "me/model", "hub_token": "hf_secret", "save_dtype": "bfloat16"}
    command = flags(tiny_checkpoint("qwen3_vl"), output, registry, **asked, **pushed, dataset_use="text")
    environment = os.environ | {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HUB_DISABLE_XET": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-m", "qwenvl.train.train_qwen", *command], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    headers = [header for header, _ in hub.commits]
    assert headers == ["Training in progress, step 1", "Training in progress, step 2", "Model save"]
    last = hub.commits[-1][1]
    expected = {"README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"}
    expected |= {"original_processor_limits.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json"}
    expected |= {"preprocessor_config.json", "video_preprocessor_config.json", "chat_template_videos.jinja"}
    assert set(last) == expected | {"training_args.yaml", "versions.json", "data.json", "serving.json"}
    assert all(last[name] == (output / name).read_bytes() for name in last)
    assert json.loads(last["config.json"])["dtype"] == "bfloat16"
    assert not [name for _, files in hub.commits for name in files if "/" in name or name.endswith((".pt", ".bin"))]
    assert not [name for name, content in last.items() if b"hf_secret" in content]
