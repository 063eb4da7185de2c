"""What a run says before its first step and while it trains: in the log of a job, and on a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import struct
import sys
import termios
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qwenvl.train.train_qwen import main
from tests.e2e.runs import LORA, flags, history, weights

BARS = {"disable_tqdm": None}
"""The Trainer's own choice of bars, which the settings of other tests turn off."""


@pytest.fixture
def start(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Return a function of settings that trains and returns all that was written, by Python or below it."""

    def run(**settings: Any) -> str:
        assert main(flags(tiny_checkpoint("qwen3_vl"), tmp_path / "out", registry, **BARS, **settings)) == 0
        return "".join(capfd.readouterr())

    return run


def rows(text: str, title: str) -> dict[str, list[str]]:
    """Return the lines of a table by their first cell."""
    lines = text.partition(f"\n{title}\n")[2].partition("\n\n")[0].splitlines()
    cells = [re.split(r" {2,}", line) for line in lines]
    assert cells, text
    return {line[0]: line[1:] for line in cells}


def test_a_run_says_what_it_is_before_its_first_step(start: Callable[..., str], tmp_path: Path) -> None:
    use = {"dataset_use": "mixed%50,text", "eval_dataset_use": "held_out", "eval_strategy": "steps", "eval_steps": 2}
    rates = {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 1, "vision_tower_lr": 1e-5}
    text = start(**use, **rates, max_steps=4, gradient_accumulation_steps=3)
    assert text.count("Training starts.") == 1
    assert text.index("Training starts.") < text.index("step 1 of 4: loss ")
    model = rows(text, "Model")
    assert model["family"] == ["qwen3_vl"]
    assert model["precision"] == ["weights float32; computed in float32"]
    assert model["attention"] == ["sdpa, one sample at a time"]
    parts = rows(text, "Trained parts")
    assert [parts[name][-1] for name in ("vision", "merger", "language", "all")] == ["1e-05", "0.001", "0.001", "-"]
    assert parts["all"][1] == model["parameters"][0]
    data = rows(text, "Data")
    assert data["mixed"] == ["11", "50%", "5", "-"]
    assert data["text"] == ["3", "100%", "3", "-"]
    assert data["held_out"] == ["4", "100%", "-", "4"]
    budget = rows(text, "Budget")
    assert budget["steps"] == ["4 in all, 2 per epoch: 2.00 epochs"]
    assert budget["per step"] == ["6 rows: 1 device (cpu) x batches of 2 x 3 accumulated"]
    assert budget["optimizer"] == ["adamw_torch, warmup of 1, then constant_with_warmup"]
    assert budget["evaluation"] == ["4 rows, every 2 steps"]
    assert (budget["checkpoints"], budget["engine"]) == (["none"], ["one process"])
    assert budget["output"] == [str(tmp_path / "out")]


def test_packs_and_what_is_left_out_are_counted(start: Callable[..., str]) -> None:
    text = start(data_packing=True, model_max_length=90, max_steps=1, eval_ratio=0.2, dataset_use="mixed")
    assert rows(text, "Data")["mixed"] == ["11", "100%", "9", "2"]
    samples, tokens, trained, _, longest, left_out = rows(text, "Samples to train on")["mixed"]
    found = re.search(r"^packs +(\d+) of up to 90 tokens, ([\d.]+)% full; no fewer than (\d+)$", text, re.MULTILINE)
    assert found is not None
    packs, fewest = int(found[1]), int(found[3])
    assert int(samples) + int(left_out.split()[0]) == 9 and left_out.endswith(" overlength")
    assert float(found[2]) == pytest.approx(100 * int(tokens) / (packs * 90), abs=0.01)
    assert fewest <= packs and int(longest) <= 90 and int(trained) < int(tokens)
    mean = int(tokens) / -(-packs // 2)
    assert rows(text, "Budget")["tokens"][0].startswith(f"{mean:,.0f} per step on average")


def test_adapters_are_told_apart(start: Callable[..., str], tmp_path: Path) -> None:
    text = start(**LORA, max_steps=1)
    layers = sum(".lora_A." in name for name in weights(tmp_path / "out"))
    assert rows(text, "Model")["adapters"] == [
        f"LoRA of rank 4, alpha 8, dropout 0, in {layers} linear layers (--lora_target language,experts)"
    ]
    language = rows(text, "Trained parts")["language"]
    assert language[0] == language[-1] != "0" and rows(text, "Trained parts")["vision"][0] == "0"


def test_a_file_gets_plain_lines_and_no_bars(start: Callable[..., str], tmp_path: Path) -> None:
    text = start(max_steps=2, dataset_use="text", data_packing=True, logging_steps=1)
    assert text.isascii() and "\033" not in text and "\r" not in text and "it/s" not in text
    lines = re.findall(r"step (\d) of 2: loss ([\d.]+), ", text)
    assert [(int(step), pytest.approx(float(loss), rel=1e-3)) for step, loss in lines] == list(
        enumerate(history(tmp_path / "out"), 1)
    )
    assert text.count("train_runtime") == 1


def test_nothing_is_said_with_the_level_of_warnings(start: Callable[..., str]) -> None:
    assert start(max_steps=1, dataset_use="text", log_level="warning", data_packing=True, base_interval=2) == ""


@contextlib.contextmanager
def terminal(columns: int) -> Iterator[list[bytes]]:
    """Let standard error be a terminal so wide; what was written to it is in the list at the end."""
    outer, inner = pty.openpty()
    fcntl.ioctl(inner, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    written: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # the other end is closed
            while part := os.read(outer, 1 << 16):
                written.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    with pytest.MonkeyPatch.context() as patch, os.fdopen(inner, "w", encoding="utf-8") as stream:
        for name in ("NO_COLOR", "FORCE_COLOR"):
            patch.delenv(name, raising=False)
        patch.setenv("TERM", "xterm-256color")
        patch.setenv("COLUMNS", str(columns))  # rich asks the terminal that the process was started on
        patch.setattr(sys, "stderr", stream)
        yield written
    reader.join()
    os.close(outer)


def test_a_terminal_gets_lines_colours_and_a_bar_as_wide_as_it(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    settings = {**BARS, "max_steps": 2, "dataset_use": "text,pictures", "data_packing": True}
    with terminal(72) as written:
        assert main(flags(tiny_checkpoint("qwen3_vl"), tmp_path / ("long" * 30), registry, **settings)) == 0
    text = b"".join(written).decode().replace("\r\n", "\n")
    assert re.search("\033\\[1mModel", text) and "────" in text and "2/2 [" in text
    tables = text.partition("Training starts.")[2].partition("0/2 [")[0].rpartition("\n\n")[0]
    lines = re.sub(r"\033\[[\d;]*m", "", tables).splitlines()
    assert max(map(len, lines)) <= 72
    assert any(line.startswith(" " * 9) and "longlong" in line for line in lines)  # folded in its column
