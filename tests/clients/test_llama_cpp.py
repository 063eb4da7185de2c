"""GGUF copies of saved folders in llama.cpp's server: prompts of training, and answers of the unquantized model.

Images are sent in the size of training: llama.cpp gives others black edges, which the model card has figures of.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwenvl.cli.check_serving import main as check_serving
from qwenvl.cli.export.command import main as export
from qwenvl.cli.export.llama_server import llama_server
from qwenvl.cli.merge_lora import main as merge
from tests.clients.reference import Row, rows_of
from tests.e2e.runs import LORA

pytestmark = [
    pytest.mark.slow,
    pytest.mark.client(
        "llama.cpp of xllamacpp",
        result="the same number of prompt tokens; log-probabilities within 0.02 on average, images resized beforehand",
        arguments="those of the copy's model card",
    ),
]

Export = Callable[..., tuple[Path, str]]
TRAINING: dict[str, Any] = {"dataset_use": "rows", "max_steps": 60, "learning_rate": 2e-3}
"""Settings that make a model know its images by heart, so that its answers differ."""


YARN = {"rope_scaling": "yarn", "rope_factor": 4, "rope_native_length": 64, "model_max_length": 256}


def limits(family: str) -> dict[str, str]:
    """Return limits of images in whole tokens, which llama.cpp counts them in."""
    side = 28 if family.startswith("qwen2") else 32
    return {"min_pixels": f"4*{side}*{side}", "max_pixels": f"9*{side}*{side}"}


@pytest.fixture
def exported(llama_cpp: Path, registry: Path, tmp_path: Path) -> Export:
    """Return a function of a folder that makes a GGUF copy; returns its folder and its model card."""

    def function(folder: Path, *more: str, code: int = 0) -> tuple[Path, str]:
        flags = ["--to", "gguf", "--model_name_or_path", str(folder), "--output", str(tmp_path / "copy")]
        flags += ["--dataset_registry", str(registry), "--dataset_use", "rows", "--samples", "0", "--device", "cpu"]
        flags += ["--max_new_tokens", "12", "--llama_python", str(llama_cpp / "bin/python")]
        flags += ["--llama_cpp", str(converter(llama_cpp, folder, tmp_path / "llama.cpp"))]
        assert export([*flags, "--llama_server", str(llama_cpp / "bin/llama-server"), *more]) == code
        return tmp_path / "copy", (tmp_path / "copy/README.md").read_text() if code == 0 else ""

    return function


def converter(environment: Path, folder: Path, target: Path) -> Path:
    """Return a copy of the converter that knows a folder's tokenizer.

    It recognises the published tokenizers by a hash of ids, and users add others with its own update script.
    """
    shutil.copytree(environment / "llama.cpp", target)
    command: list[str | Path] = [environment / "bin/python", target / "convert_hf_to_gguf.py", folder, "--vocab-only"]
    done = subprocess.run([*command, "--outfile", target / "none.gguf"], check=False, capture_output=True, text=True)
    (found,) = re.findall(r"chkhsh: +(\w{64})", done.stderr)
    file = target / "conversion/base.py"
    text, start = file.read_text(), "        res = None\n"
    assert text.count(start) == 1
    file.write_text(text.replace(start, f'{start}        if chkhsh == "{found}":\n            res = "qwen2"\n'))
    return target


def as_published(folder: Path, copy: Path) -> Path:
    """Return a copy of a folder with what its family's published checkpoints have and tiny ones have not."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    if config["model_type"] == "qwen2_5_vl":  # every n-th layer of the tower attends to the whole image
        config["vision_config"]["fullatt_block_indexes"] = [1, 3]
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def require_same(card: str) -> None:
    """Require the answers of the unquantized model, and a small difference, where images have the size of training."""
    figures = dict(re.findall(r"^\| (.+?) \| (.+?) \|", card, re.MULTILINE))
    assert figures["same number of prompt tokens"] == "20 (100.0%)"
    assert int(figures["same first token"].split()[0]) >= 18  # two tokens may be almost as likely
    assert float(figures["log-probability of a token, mean difference"].split()[0]) < 0.02


@pytest.mark.client(kind="whole, GGUF in q8_0, images")
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"])
def test_copies_stand_for_the_model(
    family: str, trained: Callable[..., Path], exported: Export, tmp_path: Path
) -> None:
    folder = as_published(trained(family, **TRAINING, **limits(family)), tmp_path / "model")
    copy, card = exported(folder)
    assert {file.name for file in copy.iterdir()} == {"README.md", "copy.gguf", "mmproj-copy.gguf"}
    assert "--image-min-tokens 4 --image-max-tokens 9" in card
    require_same(card)


@pytest.mark.client(family="qwen3_vl", kind="whole, served with other limits", result="the copy is refused")
def test_a_server_with_other_limits_is_noticed(
    llama_cpp: Path,
    trained: Callable[..., Path],
    exported: Export,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = tmp_path / "llama-server"
    server.write_text(f'#!/bin/sh\nexec "{llama_cpp}/bin/llama-server" "$@" --image-max-tokens 5\n')
    server.chmod(0o755)
    folder = trained("qwen3_vl", **TRAINING, **limits("qwen3_vl"))
    copy, _ = exported(folder, "--llama_server", str(server), code=1)
    assert "its reader has other limits or another template. It is not kept." in caplog.text
    assert not copy.exists()


@pytest.mark.client(family="qwen3_vl")
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"bf16": True}, id="bf16", marks=pytest.mark.client(kind="trained in bf16, GGUF in q8_0")),
        pytest.param(
            {"additional_tokens": "slowly"}, id="token", marks=pytest.mark.client(kind="a new token, GGUF in q8_0")
        ),
    ],
)
def test_other_kinds_of_training(settings: dict[str, Any], trained: Callable[..., Path], exported: Export) -> None:
    require_same(exported(trained("qwen3_vl", **TRAINING, **limits("qwen3_vl"), **settings))[1])


@pytest.mark.client(kind="whole, with YaRN, GGUF in q8_0")
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_longer_context(family: str, trained: Callable[..., Path], exported: Export, tmp_path: Path) -> None:
    folder = trained(family, **TRAINING, **limits(family), **YARN)
    require_same(exported(as_published(folder, tmp_path / "model"))[1])


@pytest.mark.client(family="qwen3_vl", kind="merged LoRA, GGUF in q8_0")
def test_merged_adapters(trained: Callable[..., Path], exported: Export, tmp_path: Path) -> None:
    settings = {**TRAINING, **LORA, "learning_rate": 5e-3}
    adapter = trained("qwen3_vl", **settings, **limits("qwen3_vl"))
    assert merge(["--adapter", str(adapter), "--output", str(tmp_path / "merged")]) == 0
    require_same(exported(tmp_path / "merged")[1])


@pytest.mark.client(
    family="qwen3_vl",
    kind="whole, GGUF in f32",
    result="the same prompt ids",
    arguments="those that `check_serving` prints",
)
def test_the_line_of_check_serving(
    llama_cpp: Path,
    trained: Callable[..., Path],
    exported: Export,
    registry: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A server started by the printed line makes the ids of training of a conversation, image tokens among them."""
    folder = trained("qwen3_vl", **TRAINING, **limits("qwen3_vl"))
    copy, _ = exported(folder, "--gguf_type", "f32")
    data = ["--dataset_registry", str(registry), "--dataset_use", "rows"]
    capsys.readouterr()
    assert check_serving(["--model_name_or_path", str(folder), *data]) == 0
    (line,) = re.findall(r"^llama.cpp: llama-server (.*)", capsys.readouterr().out, re.MULTILINE)
    line = line.replace("MODEL.gguf", str(copy / "copy.gguf")).replace("MMPROJ.gguf", str(copy / "mmproj-copy.gguf"))
    with llama_server(str(llama_cpp / "bin/llama-server"), shlex.split(line)) as server:
        for row in rows_of(folder, *data):
            assert prompt_ids(server.url, row) == row.inputs().input_ids.tolist(), row.name


def prompt_ids(address: str, row: Row) -> list[int]:
    """Return the ids of the server's prompt, whose images llama.cpp puts between the ids of their markers."""
    config = row.serving.config
    media = iter([medium.grid for medium in row.encoded.media])
    marker = re.escape(_post(f"{address}/props")["media_marker"])
    prompt = _post(f"{address}/apply-template", {"messages": row.messages(), "chat_template_kwargs": row.arguments()})
    first, *others = re.split(marker, prompt["prompt"])
    ids = _tokenize(address, first)
    for text in others:
        time, height, width = next(media)
        image = [config.image_token_id] * (time * height * width // 4)
        ids += [config.vision_start_token_id, *image, config.vision_end_token_id, *_tokenize(address, text)]
    return ids


def _tokenize(address: str, text: str) -> list[int]:
    asked = {"content": text, "add_special": False, "parse_special": True}
    return list(_post(f"{address}/tokenize", asked)["tokens"])


def _post(url: str, asked: dict[str, Any] | None = None) -> dict[str, Any]:
    data = None if asked is None else json.dumps(asked).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=600) as reply:
        return dict(json.load(reply))
