"""The tool that asks a model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from qwenvl.cli.predict.command import main
from qwenvl.data.sampler import sample_rows
from tests.data.media.video.test_decode import make_video
from tests.e2e.runs import REPOSITORY, kill_tree, torchrun

Predict = Callable[..., tuple[int, str, str]]
SMALL = ("--min_pixels", "32*32", "--max_pixels", "64*64", "--video_max_frames", "4", "--max_new_tokens", "5")
GOOD = 7


HANGING = """
import sys, time
from qwenvl.cli.predict.command import main

written = []


def hang(event, arguments):
    if event == "open" and "killed.part-" in str(arguments[0]) and arguments[1] == "a":
        written.append(1)
        time.sleep(6000 if len(written) == 3 else 0)


sys.addaudithook(hang)
main(sys.argv[1:])
"""
"""Asks, but hangs before its third sample's line is written to the output named ``killed``."""


def _turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def write_set(folder: Path) -> Path:
    """Seven good samples, of all kinds, and two bad ones between them; returns the registry."""
    generator = torch.Generator().manual_seed(0)
    records: list[Any] = []
    for number in range(4):
        pixels = torch.randint(0, 256, (40, 60 + 8 * number, 3), dtype=torch.uint8, generator=generator)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")
        turns = _turns("<image>What is it?", f"Thing {number}.")
        records.append({"id": f"picture-{number}", "image": f"{number}.png", "conversations": turns})
    make_video(folder / "clip.mp4")
    records.insert(2, {"id": "gone", "image": "gone.png", "conversations": _turns("<image>?", "No.")})
    records.append({"id": "clip", "video": "clip.mp4", "conversations": _turns("<video>Where?", "There.")})
    records.append("no sample")
    records.append([{"conversations": _turns("One?", "1")}, {"conversations": _turns("Two?", "2")}])
    (folder / "set.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    entry = {"annotation_path": str(folder / "set.jsonl"), "data_path": str(folder)}
    (folder / "registry.py").write_text(f"data_dict = {{'set': {entry!r}}}")
    return folder / "registry.py"


@pytest.fixture
def flags(tmp_path: Path, tiny_checkpoint: Callable[..., Path]) -> list[str]:
    registry = write_set(tmp_path)
    model = str(tiny_checkpoint("qwen3_vl"))
    return ["--model_name_or_path", model, "--dataset_registry", str(registry), "--device", "cpu", *SMALL]


@pytest.fixture
def predict(flags: list[str], capsys: pytest.CaptureFixture[str]) -> Predict:
    def run(*more: str) -> tuple[int, str, str]:
        code = main([*flags, *more])
        return code, *capsys.readouterr()

    return run


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_sample_has_a_line_in_the_order_of_the_data(predict: Predict, tmp_path: Path) -> None:
    output = tmp_path / "out" / "answers.jsonl"
    code, printed, messages = predict("--dataset_use", "set", "--output", str(output), "--batch_size", "3")
    assert code == 1
    found = lines(output)
    wanted = ["picture-0", "picture-1", "gone", "picture-2", "picture-3", "clip", None, None, None]
    assert [line["id"] for line in found] == wanted
    assert [line["line"] for line in found] == [1, 2, 3, 4, 5, 6, 7, 8, 8]
    bad = [line for line in found if "error" in line]
    assert [line["line"] for line in bad] == [3, 7]
    assert bad[0]["error"].startswith("missing_file: ") and bad[1]["error"].startswith("bad_record: ")
    assert all(line["prediction"] is None for line in bad)
    good = [line for line in found if "error" not in line]
    assert [line["expected"] for line in good] == [*(f"Thing {n}." for n in range(4)), "There.", "1", "2"]
    assert all(isinstance(line["prediction"], str) for line in good)
    assert good[0]["question"] == "What is it?"
    assert good[0]["media"] == [["image", str(tmp_path / "0.png")]]
    assert {line["dataset"] for line in found} == {"set"} and {line["file"] for line in found} == {
        str(tmp_path / "set.jsonl")
    }
    cut = sum(line["finish_reason"] == "length" for line in good)
    assert cut > 0 and all("finish_reason" not in line for line in bad)
    assert f'7 answers ({cut} of them cut at --max_new_tokens: "finish_reason": "length"), 2 samples' in printed
    assert "1 x missing_file" in printed
    assert {path.name for path in output.parent.iterdir()} == {"answers.jsonl", "answers.jsonl.settings.json"}
    assert messages == ""  # no progress bar, no warning


def test_rows_are_those_that_training_samples(predict: Predict, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    predict("--dataset_use", "set%37.5", "--output", str(output))
    assert [line["line"] - 1 for line in lines(output)] == sample_rows(8, 37.5, "set", 0).tolist()


def test_an_interrupted_run_answers_what_is_missing(predict: Predict, tmp_path: Path) -> None:
    """Two parts, of other processes than now, one of which ends in half a line."""
    output = tmp_path / "answers.jsonl"
    data = ("--dataset_use", "set", "--output", str(output))
    predict(*data)
    whole = output.read_text()
    rows = whole.splitlines(keepends=True)
    kept = rows[0].replace(lines(output)[0]["prediction"].encode("unicode_escape").decode(), "")
    assert json.loads(kept)["id"] == "picture-0"
    marked = json.dumps({**json.loads(rows[0]), "prediction": "as it was"}, ensure_ascii=False) + "\n"
    output.unlink()
    # of the packed row, the second member is missing
    (tmp_path / "answers.jsonl.part-5").write_text(rows[5] + rows[7])
    (tmp_path / "answers.jsonl.part-0").write_text(marked + rows[1] + rows[3][:40])
    code, _, messages = predict(*data)
    assert code == 1
    assert output.read_text() == marked + "".join(rows[1:])
    assert "part-0 ends in half a line" in messages
    before = output.stat().st_mtime_ns
    assert predict(*data)[0] == 1  # nothing is missing: nothing is written
    assert output.stat().st_mtime_ns == before


def test_other_settings_are_not_mixed_in(predict: Predict, tmp_path: Path) -> None:
    output = tmp_path / "answers.jsonl"
    assert predict("--dataset_use", "set", "--output", str(output))[0] == 1
    for other, name in (
        (("--dataset_use", "set%50"), "rows"),
        (("--dataset_use", "set", "--max_new_tokens", "6"), "max_new_tokens: 5 then, 6 now"),
        (("--dataset_use", "set", "--max_pixels", "96*96"), "input"),
        (("--dataset_use", "set", "--temperature", "0.5"), "temperature"),
    ):
        code, _, messages = predict(*other, "--output", str(output))
        assert code == 2
        assert name in messages and "other settings" in messages
    (tmp_path / "answers.jsonl.settings.json").unlink()
    code, _, messages = predict("--dataset_use", "set", "--output", str(output))
    assert code == 2
    assert "nothing says what it was made with" in messages


def test_drawn_answers_are_the_same_again(predict: Predict, tmp_path: Path) -> None:
    drawn = ("--dataset_use", "set", "--temperature", "2", "--top_p", "0.9")
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        predict(*drawn, "--seed", seed, "--output", str(tmp_path / name))
    texts = [(tmp_path / name).read_text() for name in "abc"]
    assert texts[0] == texts[1] != texts[2]


def test_one_question_is_answered_in_the_terminal(predict: Predict, tmp_path: Path) -> None:
    image = str(tmp_path / "0.png")
    code, printed, _ = predict("--image", image, str(tmp_path / "1.png"), "--prompt", "What is this?")
    assert code == 0
    assert printed.strip()
    code, again, _ = predict("--image", image, str(tmp_path / "1.png"), "--prompt", "What is this?")
    assert again == printed
    assert predict("--prompt", "What is this?")[1] != printed
    assert predict("--video", str(tmp_path / "clip.mp4"), "--prompt", "Where?")[0] == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--dataset_use", "set"), "--output is missing"),
        (("--prompt", "?", "--dataset_use", "set", "--output", "a"), "not both"),
        (("--image", "a.png"), "--prompt is missing"),
        (("--output", "a"), "--output is for answers to datasets"),
        (("--prompt", "?", "--image", "none.png"), "none.png does not exist"),
        (("--prompt", "?", "--top_p", "0.5"), "--top_p has no effect"),
        (("--prompt", "?", "--max_new_tokens", "0"), "1 or more"),
        (("--prompt", "?", "--model_name_or_path", "/nowhere"), "there is no such folder"),
        (("--dataset_use", "none", "--output", "a"), "none"),
    ],
)
def test_mistakes_are_one_message(given: tuple[str, ...], message: str, predict: Predict) -> None:
    code, _, messages = predict(*given)
    assert code == 2
    assert message in messages
    assert messages.count("error:") == 1 and "Traceback" not in messages


def test_a_chat_has_turns_media_and_commands(predict: Predict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = [
        "",
        "/help",
        "/image none.png",
        f"/image {tmp_path / '0.png'}",
        f"/video {tmp_path / 'clip.mp4'}",
        "What is [red]this[/red]?",
        "And now?",
        "/dance",
        "/image",
        "/new",
        "Hello?",
    ]
    shown: list[str] = []

    def read_line(prompt: str) -> str:
        shown.append(prompt)
        if len(shown) > len(said):
            raise EOFError
        return said[len(shown) - 1]

    monkeypatch.setattr("builtins.input", read_line)
    code, printed, _ = predict()
    assert code == 0
    assert len(shown) == len(said) + 1
    assert printed.count("/video PATH") == 2  # at the start, and asked for
    assert "none.png does not exist" in " ".join(printed.split())
    assert "There is no /dance" in printed and "Name the file" in printed and "A new conversation" in printed
    assert shown[4:7] == ["[1 shown] > ", "[2 shown] > ", "> "]


def test_adapters_answer_as_the_model_they_are_in(
    predict: Predict, tmp_path: Path, tiny_checkpoint: Callable[..., Path]
) -> None:
    """A folder of stock PEFT, without a processor of its own, and one whose adapter is as if it were not there."""
    base = tiny_checkpoint("qwen3_vl")
    model = AutoModelForImageTextToText.from_pretrained(base)
    question = ("--image", str(tmp_path / "0.png"), "--prompt", "What is this?")
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    adapted.save_pretrained(tmp_path / "nothing")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in adapted.named_parameters():
            if "lora_B" in name:
                value.normal_(std=2)
    adapted.save_pretrained(tmp_path / "something")
    AutoProcessor.from_pretrained(base).save_pretrained(tmp_path / "something")
    plain = predict(*question)[1]
    assert predict(*question, "--model_name_or_path", str(tmp_path / "nothing"))[1] == plain
    assert predict(*question, "--model_name_or_path", str(tmp_path / "something"))[1] != plain


@pytest.mark.slow
def test_two_processes_that_are_killed_and_go_on_write_what_one_writes(
    predict: Predict, flags: list[str], tmp_path: Path
) -> None:
    alone, shared, killed = (tmp_path / name for name in ("alone", "shared", "killed"))
    data = ["--dataset_use", "set%400", "--batch_size", "1", "--output"]
    assert predict(*data, str(alone))[0] == 1
    script = tmp_path / "predict.py"
    script.write_text(HANGING)
    printed = torchrun(script, *flags, *data, str(shared))
    assert shared.read_text() == alone.read_text()
    assert printed.count("samples that could not be asked") == 1
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    parts = [tmp_path / f"killed.part-{rank}" for rank in (0, 1)]
    command += [*flags, *data, str(killed)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 900
            while not all(part.exists() and part.stat().st_size for part in parts):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            kill_tree(process)
    assert not killed.exists() and all(part.exists() for part in parts)
    assert predict(*data, str(killed))[0] == 1
    assert killed.read_text() == alone.read_text()
