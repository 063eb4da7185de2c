"""The ranking through its front door: lists, decisions, the scoring pass and the page."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from qwenvl.cli.inference_args import AskArguments, open_job, open_model
from qwenvl.cli.rank_samples.command import main
from qwenvl.inference.answer_rows import open_row
from qwenvl.inference.loss import example_loss
from qwenvl.inference.other_images import find_partners, key_of
from qwenvl.train.records.sample_losses import FILE_NAME, SCHEMA
from tests.browser import dom, needs_chromium
from tests.e2e.runs import REPOSITORY, kill_tree, torchrun

SCRIPT = """
import sys
from qwenvl.cli.rank_samples.command import main

sys.exit(main(sys.argv[1:]))
"""
HANGING = """
import sys, time

written = []


def hang(event, arguments):
    if event == "open" and "losses_blank.jsonl.part-" in str(arguments[0]) and arguments[1] == "a":
        written.append(1)
        time.sleep(6000 if len(written) == 3 else 0)


sys.addaudithook(hang)
"""
"""Lines before :data:`SCRIPT` that let it hang before its third sample with a blank image is written."""

CLICK = """
const observer = new MutationObserver(() => {
  const button = document.querySelector(".ranked button.keep");
  if (!button) return;
  observer.disconnect();
  button.click();
});
observer.observe(document.body, { childList: true, subtree: true });
"""
"""A script that keeps the first sample of the page, which the list drops."""

COUNT = 12
WRONG = 5
"""Line of the sample whose loss stays high."""


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A registry of a JSONL file with blank lines, odd spaces and an array with a packed row; images beside it."""
    rng, lines = np.random.default_rng(0), []
    for number in range(COUNT):
        side = 40 + 8 * (number % 3)
        Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
        talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a cat " * (1 + number % 4)}]
        record: dict[str, Any] = {"id": f"s{number}", "image": f"{number}.png", "conversations": talk, "note": None}
        lines.append(json.dumps(record, separators=(" ,", ":  ") if number % 2 else None))
    (tmp_path / "pets.jsonl").write_text("\n".join([*lines[:2], "", *lines[2:]]) + "\n")
    pack = [{"id": f"p{number}", "conversations": talk} for number in range(3) for talk in [[*talk_of(number)]]]
    (tmp_path / "packs.json").write_text(json.dumps([pack]))
    entries = {
        "pets": {"annotation_path": str(tmp_path / "pets.jsonl"), "data_path": str(tmp_path)},
        "packs": {"annotation_path": str(tmp_path / "packs.json"), "data_path": str(tmp_path)},
    }
    (tmp_path / "registry.py").write_text(f"data_dict = {entries!r}\n")
    return tmp_path


def talk_of(number: int) -> list[dict[str, str]]:
    return [{"from": "human", "value": f"Say {number}."}, {"from": "gpt", "value": str(number)}]


def line_of(number: int) -> int:
    return number + 1 + (number >= 2)  # the third line is blank


def write_losses(data: Path, file: Path, packs: bool = False) -> Path:
    """Write losses of four epochs, in which line :data:`WRONG` and the second member of the pack stay high."""
    rows = []
    for epoch in range(4):
        for number in range(COUNT):
            high = line_of(number) == WRONG
            place = {"dataset": "pets", "file": str(data / "pets.jsonl"), "line": line_of(number), "member": None}
            rows.append(place | {"id": f"s{number}", "loss": 9.0 if high else 0.3 + 0.01 * number})
        for member in (1, 2, 3) if packs else ():
            place = {"dataset": "packs", "file": str(data / "packs.json"), "line": 1, "member": member}
            rows.append(place | {"id": f"p{member - 1}", "loss": 9.0 if member == 2 else 0.3})
        for row in rows[-(COUNT + 3 * packs) :]:
            row |= {"epoch": epoch, "step": epoch + 1, "tokens": 3.0}
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), file)
    return file


def ranking(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "ranking.jsonl").read_text().splitlines()]


@pytest.fixture
def rank(data: Path) -> Callable[..., Path]:
    """Return a function of flags that ranks and returns the output folder."""

    def function(*given: object, output: str = "ranking") -> Path:
        fixed = ["--dataset_registry", data / "registry.py", "--output", data / output]
        assert main([str(one) for one in (*fixed, *given)]) == 0
        return data / output

    return function


@pytest.fixture
def fails(data: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function of flags that returns the one message of a call that fails."""

    def function(*given: object) -> str:
        assert main([*map(str, given), "--output", str(data / "none")]) == 1
        printed = "".join(capsys.readouterr())
        assert "Traceback" not in printed
        (message,) = re.findall(r"error: (.*)", printed)
        return str(message)

    return function


def test_the_list_has_a_line_for_each_sample_and_the_worst_first(data: Path) -> None:
    """Without a registry, as the interface names: the file itself is opened."""
    file = write_losses(data, data / "losses.parquet")
    assert main(["--sample_losses", str(file), "--output", str(data / "out")]) == 0
    lines = ranking(data / "out")
    assert len(lines) == COUNT and {line["line"] for line in lines} == {line_of(number) for number in range(COUNT)}
    assert list(lines[0])[:6] == ["dataset", "file", "line", "id", "score", "reasons"]
    assert lines[0]["line"] == WRONG and lines[0]["id"] == "s3"
    assert set(lines[0]["reasons"]) >= {"far_above_like", "never_learned"}
    assert all(not line["reasons"] for line in lines[1:])
    assert json.loads((data / "out/ranking.json").read_text())["pets"]["samples_dropped"] == 1


def test_kept_rows_are_copied_byte_for_byte(data: Path, rank: Callable[..., Path]) -> None:
    output = rank("--sample_losses", write_losses(data, data / "losses.parquet", packs=True))
    before = (data / "pets.jsonl").read_bytes().splitlines()
    kept = (output / "pets_kept.jsonl").read_bytes().splitlines()
    assert kept == [line for number, line in enumerate(before, start=1) if line and number != WRONG]
    (pack,) = [json.loads(line) for line in (output / "packs_kept.jsonl").read_text().splitlines()]
    assert pack == [json.loads((data / "packs.json").read_text())[0][place] for place in (0, 2)]


def test_decisions_and_reasons_change_what_is_dropped(data: Path, rank: Callable[..., Path]) -> None:
    losses = write_losses(data, data / "losses.parquet")
    place = {"dataset": "pets", "file": str(data / "pets.jsonl")}
    decisions = [{**place, "line": WRONG, "keep": True}, {**place, "line": 1, "keep": False}]
    (data / "decisions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in decisions))
    output = rank("--sample_losses", losses, "--decisions", data / "decisions.jsonl")
    ids = [json.loads(line)["id"] for line in (output / "pets_kept.jsonl").read_text().splitlines()]
    assert ids == [f"s{number}" for number in range(1, COUNT)]
    output = rank("--sample_losses", losses, "--drop", "forgotten", output="other")
    assert len((output / "pets_kept.jsonl").read_text().splitlines()) == COUNT


def test_a_scoring_pass_has_the_losses_of_single_samples_and_goes_on(
    data: Path, rank: Callable[..., Path], tiny_checkpoint: Callable[[str], Path]
) -> None:
    model = tiny_checkpoint("qwen3_vl")
    flags = ("--model_name_or_path", model, "--dataset_use", "pets", "--batch_size", 5, "--limit", 0)
    output = rank(*flags)
    shown, blank, swapped = (
        [json.loads(line) for line in (output / f"losses_{view}.jsonl").read_text().splitlines()]
        for view in ("shown", "blank", "swapped")
    )
    asking = AskArguments(model_name_or_path=str(model), dataset_use="pets", dataset_registry=str(data / "registry.py"))
    job = open_job(asking)
    chat_model = open_model(asking, job.encoder)
    opened = [next(open_row(job, index)) for index in range(COUNT)]
    expected = [example_loss(chat_model, example) for _, example in opened if example is not None]
    assert [line["loss"] for line in shown] == pytest.approx([loss for loss, _ in expected], rel=1e-4)
    assert [line["trained_tokens"] for line in shown] == [tokens for _, tokens in expected]
    assert len(find_partners([line for line, _ in opened])) == COUNT and key_of(opened[0][0]) == (0, None)
    assert [line["loss"] for line in blank] != [line["loss"] for line in shown] != [line["loss"] for line in swapped]
    lines = ranking(output)
    assert all({"loss", "loss_blank", "loss_swapped"} <= line.keys() for line in lines)
    written = (output / "losses_shown.jsonl").read_text().splitlines(keepends=True)
    (output / "losses_shown.jsonl").unlink()
    (output / "losses_shown.jsonl.part-0").write_text("".join(written[:7]))  # as after a kill
    rank(*flags)
    assert (output / "losses_shown.jsonl").read_text().splitlines()[:7] == [line.strip() for line in written[:7]]
    assert [line["line"] for line in ranking(output)] == [line["line"] for line in lines]


@pytest.mark.slow
def test_two_processes_rank_as_one_and_go_on_after_they_were_killed(
    data: Path, rank: Callable[..., Path], tiny_checkpoint: Callable[[str], Path]
) -> None:
    given = ["--model_name_or_path", tiny_checkpoint("qwen3_vl"), "--dataset_use", "pets,packs", "--batch_size", 1]
    given += ["--limit", 2]
    alone = rank(*given, output="alone")
    (data / "rank.py").write_text(SCRIPT)
    (data / "hang.py").write_text(HANGING + SCRIPT)
    flags = {
        name: list(map(str, [*given, "--dataset_registry", data / "registry.py", "--output", data / name]))
        for name in ("shared", "killed")
    }
    torchrun(data / "rank.py", *flags["shared"])
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    parts = [data / f"killed/losses_blank.jsonl.part-{number}" for number in (0, 1)]
    with subprocess.Popen([*command, str(data / "hang.py"), *flags["killed"]], env=environment) as process:
        try:
            deadline = time.monotonic() + 900
            while not all(part.exists() and part.stat().st_size for part in parts):
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.02)
        finally:
            kill_tree(process)
    assert not (data / "killed/ranking.jsonl").exists() and (data / "killed/losses_shown.jsonl").exists()
    begun = [line for part in parts for line in part.read_text().splitlines()]
    assert 2 <= len(begun) < COUNT
    torchrun(data / "rank.py", *flags["killed"])
    names = [path.relative_to(alone) for path in alone.rglob("*") if path.is_file()]
    assert Path("ranking.jsonl") in names and Path("page/index.html") in names
    for name in names:
        for other in ("shared", "killed"):
            assert (data / other / name).read_bytes() == (alone / name).read_bytes(), (other, name)
    assert not list(data.rglob("*.part-*"))


@needs_chromium
def test_the_page_shows_samples_losses_of_tokens_and_buttons(
    data: Path, rank: Callable[..., Path], tiny_checkpoint: Callable[[str], Path]
) -> None:
    run = data / "run"
    shutil.copytree(tiny_checkpoint("qwen3_vl"), run)
    output = rank("--sample_losses", write_losses(data, run / FILE_NAME))
    shown = dom(output / "page/index.html", "", data / "profile")
    assert "1. score" in shown.text and "never_learned" in shown.text and "a cat" in shown.text
    assert shown.tags.count("img") == 10 and "Save decisions.jsonl" in shown.text
    assert "heat h" in (output / "page/index.html").read_text()
    index = (output / "page/data/samples_0.js").read_text()
    pieces = re.findall(r'\["[^"]*","\d+",[01],([\d.]+)\]', index)
    assert len(pieces) > COUNT and all(float(loss) > 0 for loss in pieces)


@needs_chromium
def test_the_browser_remembers_the_decisions_of_a_ranking_and_of_no_other(
    data: Path, rank: Callable[..., Path], tiny_checkpoint: Callable[[str], Path]
) -> None:
    """One click on a copy of the page; then the page is opened anew, and that of another list."""
    run = data / "run"
    shutil.copytree(tiny_checkpoint("qwen3_vl"), run)
    losses = write_losses(data, run / FILE_NAME)
    page = rank("--sample_losses", losses) / "page/index.html"
    other = rank("--sample_losses", losses, "--drop", "forgotten", output="other") / "page/index.html"
    clicking = page.read_text().replace("</body>", '<script src="click.js"></script></body>')
    (page.parent / "click.html").write_text(clicking)
    (page.parent / "click.js").write_text(CLICK)
    told = []
    for opened in (page, page.parent / "click.html", page, other):
        told += re.findall(r"\d+ decided against.*", dom(opened, "", data / "profile").text)
    none, one = "0 decided against the list", "1 decided against the list, remembered by this browser"
    assert told == [none, one, one, none]


def test_bad_input_is_named(data: Path, fails: Callable[..., str]) -> None:
    assert "Give --sample_losses" in fails()
    assert "cannot be read" in fails("--sample_losses", data / "absent.parquet")
    losses = write_losses(data, data / "losses.parquet")
    assert "--drop nonsense is not one of" in fails("--sample_losses", losses, "--drop", "nonsense")
    (data / "bad.jsonl").write_text('{"line": 1}\n')
    assert "bad.jsonl:1 is no decision" in fails("--sample_losses", losses, "--decisions", data / "bad.jsonl")
    (data / "pets.jsonl").write_text('{"id": "new", "conversations": []}\n')
    assert "was changed after the losses" in fails("--sample_losses", losses)
