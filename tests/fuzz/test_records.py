"""Samples whose fields hold anything: a reason a person can read, never a crash."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from qwenvl.train.train_qwen import main
from tests.e2e.runs import flags
from tests.fuzz.doors import Doors
from tests.fuzz.fuzz import EFFORTS, VALUES, fuzz, json_values

SHAREGPT: dict[str, Any] = {
    "id": "one",
    "image": [{"image": "good.png", "min_pixels": 1024, "max_pixels": 4096}],
    "video": [{"video": "good.mp4", "fps": 2.0, "video_start": 0.0, "video_end": 0.6, "min_frames": 2}],
    "bbox_format": "relative_1000",
    "system": "Be short.",
    "tools": [{"type": "function", "function": {"name": "look", "description": "?", "parameters": {}}}],
    "conversations": [{"from": "human", "value": "<image><video>What?"}, {"from": "gpt", "value": "A dog."}],
}
MESSAGES: dict[str, Any] = {
    "id": "two",
    "messages": [
        {"role": "user", "content": "Listen."},
        {"role": "assistant", "content": "A bark.", "reasoning_content": "It barks.", "loss": False},
        {
            "role": "user",
            "content": [
                {"type": "image", "image": "good.png", "max_pixels": 4096},
                {"type": "video", "video": ["good.png", "good.png"], "sample_fps": 1.0},
                {"type": "text", "text": "What?"},
            ],
        },
        {
            "role": "assistant",
            "content": "A dog.",
            "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {"bbox_2d": [1, 2, 3, 4]}}}],
        },
    ],
}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place inside nested values."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inner:
        yield (*path, key)
        yield from places(item, (*path, key))


def replaced(record: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(record)
    holder: Any = changed
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    return changed


def write(doors: Doors, records: list[Any]) -> Path:
    # A number of 4000 digits stands for itself in JSON: Python's own limit is on longer ones.
    return doors.write("a.jsonl", "".join(json.dumps(record) + "\n" for record in records).encode())


PLACES = [(record, path) for record in (SHAREGPT, MESSAGES) for path in places(record)]
EVERY = [replaced(*place, value) for place in PLACES for value in VALUES]


def test_the_samples_are_good_as_they_are(doors: Doors) -> None:
    annotations = write(doors, [SHAREGPT, MESSAGES])
    assert doors.train(annotations) == []
    assert doors.check(annotations) == 0


def test_every_field_holds_every_kind_of_value(doors: Doors) -> None:
    annotations = write(doors, EVERY)
    said = doors.train(annotations, many=len(EVERY))
    assert len(EVERY) / 2 < len(said) < len(EVERY), "most are wrong, some are not"
    assert doors.check(annotations) == 1


@EFFORTS
def test_fields_hold_anything(doors: Doors, effort: int) -> None:
    def check(record: Any) -> None:
        annotations = write(doors, [record, SHAREGPT])
        doors.train(annotations)
        doors.check(annotations)

    changed = st.builds(lambda place, value: replaced(*place, value), st.sampled_from(PLACES), json_values)
    fuzz(check, st.one_of(changed, json_values), 120, effort)


@pytest.mark.parametrize("workers", [0, 1])
def test_training_skips_what_is_hostile_and_learns_the_rest(
    doors: Doors, tiny_checkpoint: Callable[..., Path], tmp_path: Path, workers: int
) -> None:
    annotations = write(doors, [*EVERY[:: len(EVERY) // 150], SHAREGPT, MESSAGES])
    entry = {"annotation_path": str(annotations), "data_path": str(tmp_path / "media")}
    (tmp_path / "registry.py").write_text(f"data_dict = {{'mixed': {entry!r}}}")
    settings = {"on_bad_sample": "skip", "per_device_train_batch_size": 8, "max_steps": None, "num_train_epochs": 1}
    settings |= {"dataloader_num_workers": workers}
    output = tmp_path / "run"
    assert main(flags(tiny_checkpoint("qwen3_vl"), output, tmp_path / "registry.py", **settings)) == 0
    bad = [json.loads(line) for line in (output / "bad_samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(bad) > 50 and all(record["reason"] for record in bad)
    settings["on_bad_sample"] = "raise"
    assert main(flags(tiny_checkpoint("qwen3_vl"), tmp_path / "strict", tmp_path / "registry.py", **settings)) == 1
