"""scripts/serve.sh: the command that check_serving prints, run."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from qwenvl.cli.main import main
from qwenvl.serving.commands import DRAFTS, WITHOUT_PREFIXES
from tests.e2e.runs import LORA, REPOSITORY, train


def serve(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(REPOSITORY / "scripts" / "serve.sh"), *arguments]
    variables = os.environ | {"PYTHON": sys.executable, "DRY_RUN": "1"} | environment
    return subprocess.run(command, env=variables, capture_output=True, text=True, timeout=600)


def test_a_folder_is_served_with_the_arguments_that_it_needs(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    folder = train(tiny_checkpoint("qwen3_vl"), tmp_path / "my run", registry, max_steps=1)
    done = serve(str(folder), "--port", "8001", VLLM="/opt/vllm")
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    assert words[:5] == ["/opt/vllm", "serve", str(folder), "--max-model-len", "2048"]
    assert "--mm-processor-kwargs" not in words  # the folder's processor has the limits
    frames = {"fps": 2.0, "min_frames": 2, "max_frames": 4}
    assert json.loads(words[words.index("--media-io-kwargs") + 1]) == {"video": frames}
    assert words[words.index("--chat-template") + 1] == str(folder / "chat_template_videos.jinja")
    assert words[words.index("--port") + 1] == "8001"
    done = serve(str(folder), DRY_RUN="", VLLM="/opt/vllm")
    assert done.returncode == 1
    assert done.stderr.startswith("There is no command '/opt/vllm'. Install vLLM into an environment of its own")
    done = serve(str(folder), DRY_RUN="", VLLM="echo")  # it becomes the command
    assert done.returncode == 0
    assert done.stdout.startswith(f"serve {folder} --max-model-len 2048")
    assert main(["serve", "--help"]) == 0
    assert serve().returncode == 2


def test_adapters_are_served_beside_their_base_or_refused(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    base = tiny_checkpoint("qwen3_vl")
    folder = train(base, tmp_path / "adapter", registry, max_steps=1, **LORA)
    words = shlex.split(serve(str(folder)).stdout)
    assert words[:3] == ["vllm", "serve", str(base)]
    assert words[words.index("--lora-modules") + 1] == f"adapter={folder}"
    tower = train(base, tmp_path / "tower", registry, max_steps=1, **LORA, lora_target="vision")
    done = serve(str(tower))
    assert done.returncode == 1
    assert "adapters of the vision tower or its merger: merge the adapter" in done.stderr
    assert "Traceback" not in serve(str(tmp_path / "none")).stderr


def test_drafts_come_without_cached_prefixes_where_there_is_no_gpu(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    """tests/clients asks such a server."""
    base = tiny_checkpoint("qwen3_5")
    whole = train(base, tmp_path / "whole", registry, max_steps=1)
    adapter = train(base, tmp_path / "adapter", registry, max_steps=1, **LORA)
    alone = shutil.which("nvidia-smi") is None
    for folder, flags, expected in ((whole, DRAFTS, alone), (whole, (), False), (adapter, DRAFTS, alone)):
        words = shlex.split(serve(str(folder), *flags).stdout)
        assert (WITHOUT_PREFIXES in words) == expected
        assert words[len(words) - len(flags) :] == list(flags)
