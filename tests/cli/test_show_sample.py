"""The tool that shows samples as the model sees them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qwenvl.cli.show_sample import main
from tests.data.media.video.test_decode import make_video

PICTURE = {
    "id": "one",
    "image": "a.png",
    "conversations": [{"from": "human", "value": "<image>\nWhat [bold]is[/bold] it?"}, {"from": "gpt", "value": "It."}],
}
CLIP = {
    "id": "two",
    "video": "a.mp4",
    "conversations": [{"from": "human", "value": "<video>Where?"}, {"from": "gpt", "value": "There."}],
}
BAD = {**PICTURE, "id": "three", "image": "none.png"}
Show = Callable[..., tuple[int, str, str]]


@pytest.fixture
def show(
    tmp_path: Path,
    tiny_checkpoint: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Show:
    """Function of flags that returns the exit code, the output and the messages."""
    monkeypatch.setenv("COLUMNS", "200")
    Image.new("RGB", (64, 96)).save(tmp_path / "a.png")
    make_video(tmp_path / "a.mp4")
    lines: list[Any] = [json.dumps(PICTURE), json.dumps(CLIP), json.dumps(BAD), '{"id": 4, ', json.dumps(PICTURE)]
    (tmp_path / "set.jsonl").write_text("\n".join(lines))
    entry = {"annotation_path": str(tmp_path / "set.jsonl"), "data_path": str(tmp_path)}
    (tmp_path / "registry.py").write_text(f"data_dict = {{'set': {entry!r}}}")

    def run(*flags: str, model: Path | None = None) -> tuple[int, str, str]:
        folder = model or tiny_checkpoint("qwen3_vl")
        code = main(["--model_name_or_path", str(folder), "--dataset_registry", str(tmp_path / "registry.py"), *flags])
        return code, *capsys.readouterr()

    return run


def test_a_picture(show: Show) -> None:
    code, output, _ = show("--dataset_use", "set", "--min_pixels", "32*32", "--max_pixels", "64*64")
    assert code == 0
    assert "dataset 'set'" in output
    assert "(id 'one')" in output
    assert "[<|image_pad|> x 2]" in output  # a run of placeholders is one piece
    assert "What [bold]is[/bold] it?" in output  # markup of users is text
    assert "image a.png: 32 x 64 pixels, grid_thw [1, 4, 2]" in output
    assert re.search(r"\d+ tokens, \d+ trained \(green\), 2 of media; positions up to temporal \d+", output)


def test_trained_tokens_are_green(show: Show, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    _, output, _ = show("--dataset_use", "set")
    green, end = "\x1b[1;32m", "\x1b[0m"
    assert [piece.partition(end)[0] for piece in output.split(green)[1:]] == ["It.<|im_end|>"]


def test_a_video(show: Show) -> None:
    code, output, _ = show("--dataset_use", "set", "--index", "1")
    assert code == 0
    assert "video a.mp4: " in output
    assert "source frames [0, 5, 9, 14, 18, 23] at 8 fps; timestamps 0.3, 1.4, 2.6 s" in output
    assert " seconds><|vision_start|>" in output


def test_a_sample_that_cannot_be_used(show: Show) -> None:
    code, output, _ = show("--dataset_use", "set", "--index", "2")
    assert code == 1
    assert "error (missing_file): " in output
    assert "none.png does not exist" in output


def test_every_row_is_shown_though_some_cannot_be(show: Show) -> None:
    code, output, _ = show("--dataset_use", "set", "--all")
    assert code == 1
    assert [output.count(text) for text in ("(id 'one')", "(id 'two')", "(id 'three')", "error (bad_json)")] == [
        2,
        1,
        1,
        1,
    ]


def test_json_has_a_line_for_every_sample(show: Show, tmp_path: Path) -> None:
    target = tmp_path / "out.jsonl"
    flags = ["--annotation_path", str(tmp_path / "set.jsonl"), "--data_path", str(tmp_path), "--all"]
    assert show(*flags, "--json", str(target))[0] == 1
    records = [json.loads(line) for line in target.read_text().splitlines()]
    assert [record["id"] for record in records] == ["one", "two", "three", None, "one"]
    assert ["error" in record for record in records] == [False, False, True, True, False]
    one, two = records[:2]
    length = len(one["input_ids"])
    assert len(one["labels"]) == length
    assert [len(row) for row in one["position_ids"]] == [length] * 3
    assert one["pixel_values"]["shape"][0] == one["image_grid_thw"][0][1] * one["image_grid_thw"][0][2]
    assert set(one["pixel_values"]) == {"shape", "mean", "std"}
    assert one["video_grid_thw"] is one["pixel_values_videos"] is two["image_grid_thw"] is two["pixel_values"] is None
    code, _, messages = show(*flags, "--json", str(tmp_path / "none" / "out.jsonl"))
    assert code == 1
    assert "--json" in messages
    assert "cannot be written" in messages


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--dataset_use", "set", "--index", "5"], ["--index 5", "5 rows, 0 to 4"]),
        (["--dataset_use", "sat"], ["'sat'", "Did you mean 'set'?"]),
        ([], ["Name the data"]),
        (["--dataset_use", "set", "--indx", "5"], ["--indx", "Did you mean 'index'"]),
        (["--annotation_path", "none.jsonl"], ["none.jsonl", "does not exist"]),
    ],
)
def test_mistakes_are_one_message(show: Show, flags: list[str], parts: list[str]) -> None:
    code, output, messages = show(*flags)
    assert code == 1
    assert output == ""
    assert messages.count("error: ") == 1
    for part in parts:
        assert part in messages


def test_help_is_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    page = capsys.readouterr().out
    assert page.startswith("usage: show_sample.py --model_name_or_path MODEL")
    assert "train_qwen" not in page
    assert "--annotation_path" in page


def test_a_name_on_the_hub_is_shown_with_its_own_config(
    show: Show, tmp_path: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    """Found in the cache of downloads. Seconds count otherwise here than by the defaults of the family."""
    snapshot = tmp_path / "home" / "hub" / "models--some--model" / "snapshots" / "0123"
    shutil.copytree(tiny_checkpoint("qwen2_5_vl"), snapshot)
    config = json.loads((snapshot / "config.json").read_text())
    config["vision_config"]["tokens_per_second"] = 7
    (snapshot / "config.json").write_text(json.dumps(config))
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("0123")
    chosen = ["--dataset_use", "set", "--index", "1", "--video_fps", "1", "--json"]
    assert show(*chosen, str(tmp_path / "folder.jsonl"), model=snapshot)[0] == 0
    named = ["--model_name_or_path", "some/model", "--dataset_registry", str(tmp_path / "registry.py")]
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_HUB_CACHE", None)
    tool = Path(__file__).resolve().parents[2] / "tools" / "show_sample.py"
    command = [sys.executable, str(tool), *named, *chosen, str(tmp_path / "named.jsonl")]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr
    assert (tmp_path / "named.jsonl").read_text() == (tmp_path / "folder.jsonl").read_text()


def test_a_folder_with_a_processor_alone_counts_seconds_as_published(
    show: Show, tmp_path: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    shutil.copytree(tiny_checkpoint("qwen2_5_vl"), tmp_path / "processor")
    (tmp_path / "processor" / "config.json").unlink()
    flags = ["--dataset_use", "set", "--index", "1", "--video_fps", "1", "--json", str(tmp_path / "out.jsonl")]
    assert show(*flags, model=tmp_path / "processor")[0] == 0
    record = json.loads((tmp_path / "out.jsonl").read_text())
    pad = max(set(record["input_ids"]), key=record["input_ids"].count)
    temporal = sorted(
        {t for t, token in zip(record["position_ids"][0], record["input_ids"], strict=True) if token == pad}
    )
    assert len(temporal) > 1
    assert temporal[1] - temporal[0] == pytest.approx(2 * 2, abs=1)  # two frames, a second apart; 8 by the default


def test_each_training_row_is_a_line_with_its_turns_and_arguments(
    tmp_path: Path, tiny_checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [("user", "1?"), ("assistant", "<think>\na\n</think>\n\n1"), ("user", "2?"), ("assistant", "2")]
    messages = [{"role": role, "content": text} for role, text in turns]
    (tmp_path / "d.jsonl").write_text(json.dumps({"id": "x", "messages": messages}) + "\n")
    flags = ["--annotation_path", str(tmp_path / "d.jsonl"), "--data_path", str(tmp_path), "--all"]
    flags += ["--model_name_or_path", str(tiny_checkpoint("qwen3_5"))]
    assert main([*flags, "--json", str(tmp_path / "o.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "o.jsonl").read_text().splitlines()]
    assert [(row["id"], row["turns"], row["chat_template_kwargs"]) for row in rows] == [
        ("x", [1], {"enable_thinking": True}),
        ("x", [3], {"enable_thinking": False}),
    ]
    capsys.readouterr()
    assert main(flags) == 0
    shown = capsys.readouterr().out
    assert "training row 2 of 2" in shown and 'message 3: template arguments {"enable_thinking": false}' in shown
