"""GGUF copies without llama.cpp: what is refused, and why. tests/clients/test_llama_cpp.py makes and asks real ones."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qwenvl.cli.export.command import main
from qwenvl.cli.export.gguf import CONVERTER, require_convertible
from qwenvl.utils.errors import UserError
from tests.data.media.video.test_decode import make_video

WHOLE = ["--min_pixels", "4*32*32", "--max_pixels", "9*32*32"]


@pytest.fixture
def flags(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> list[str]:
    """Flags of an export whose converter writes nothing, and whose server ends at once."""
    Image.fromarray(np.zeros((64, 96, 3), np.uint8)).save(tmp_path / "a.png")
    make_video(tmp_path / "clip.mp4")
    for name, medium in (("a.png", "image"), ("clip.mp4", "video")):
        turns = [{"from": "human", "value": f"<{medium}>What?"}, {"from": "gpt", "value": "A thing."}]
        (tmp_path / f"{medium}.json").write_text(json.dumps([{medium: name, "conversations": turns}]))
    (tmp_path / "llama.cpp").mkdir()
    (tmp_path / "llama.cpp" / CONVERTER).write_text("pass\n")
    folder = str(tiny_checkpoint("qwen3_vl"))
    data = ["--annotation_path", str(tmp_path / "image.json"), "--data_path", str(tmp_path)]
    given = ["--to", "gguf", "--model_name_or_path", folder, "--output", str(tmp_path / "gguf"), *data]
    return [*given, "--llama_cpp", str(tmp_path / "llama.cpp"), "--llama_server", "false", "--device", "cpu"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--llama_cpp", "none"], f"--llama_cpp none has no {CONVERTER}"),
        (["--llama_server", "none-here"], "--llama_server none-here is no command here"),
        (["--min_pixels", "12544"], "Give limits that it can have, which the copy is then compared and served with: "),
        ([*WHOLE, "--llama_python", "none-here"], "--llama_python none-here does not run"),
        ([*WHOLE, "--to", "fp8"], "--llama_cpp has no effect with --to fp8"),
        (WHOLE, "--llama_server false ends without opening the files"),
    ],
)
def test_what_is_missing_is_said(
    more: list[str], message: str, flags: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert main([*flags, *more]) == 1
    assert message in caplog.text
    assert not [path for path in tmp_path.iterdir() if "gguf" in path.name]


def test_limits_in_whole_tokens_are_named(flags: list[str], caplog: pytest.LogCaptureFixture) -> None:
    assert main([*flags, "--min_pixels", "12544", "--max_pixels", "451584"]) == 1
    assert "--min_pixels 13*32*32 --max_pixels 441*32*32" in caplog.text


def test_without_the_converter_its_flag_is_named(flags: list[str], caplog: pytest.LogCaptureFixture) -> None:
    place = flags.index("--llama_cpp")
    assert main(flags[:place] + flags[place + 2 :]) == 1
    assert f"--to gguf needs llama.cpp's source, whose {CONVERTER} writes the files: --llama_cpp FOLDER" in caplog.text


def test_a_failing_converter_is_quoted(flags: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "llama.cpp" / CONVERTER).write_text("import none_such\n")
    assert main([*flags, *WHOLE, "--llama_python", sys.executable]) == 1
    assert "No module named 'none_such'" in caplog.text


def test_videos_are_not_sent(flags: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert main([*flags, *WHOLE, "--annotation_path", str(tmp_path / "video.json")]) == 1
    assert "All samples have videos" in caplog.text


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llava"}, "has model_type 'llava', whose GGUF files llama.cpp was not tried with"),
        ({"model_type": "qwen3_5", "text_config": {"rope_parameters": {"rope_type": "yarn"}}}, "has rope_type 'yarn'"),
        ({"model_type": "qwen2_5_vl", "rope_scaling": {"rope_type": "dynamic"}}, "has rope_type 'dynamic'"),
    ],
)
def test_families_and_contexts_that_were_not_tried(config: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        require_convertible(config, "folder")


def test_experts_as_stock_transformers_saves_them(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_checkpoint("qwen3_vl_moe"), folder)
    with pytest.raises(UserError, match=r"stores its experts as \[experts, out, in\]"):
        require_convertible(json.loads((folder / "config.json").read_text()), str(folder))
