r"""Make the demo's data: real handwritten digits, comparisons of two of them, a drawn shape to locate, short clips.

    python tools/make_demo_data.py --output DIR [--kind demo] [--seed 0] [--limit N]

Writes ``digits``, ``comparisons``, ``grounding`` and ``motion``, each as ``NAME_train.jsonl`` and
``NAME_heldout.jsonl`` (fields ``id``, ``image`` or ``video``, ``conversations``, for digits also ``label``; media paths
are relative to DIR). ``--kind lab`` writes the data of the connector lab instead: drawn scenes in ``captions``,
``questions`` and ``chats``, and ``texts``, the same tasks about scenes described in words.
No media file of a held-out sample appears in training. The same seed gives the same files; a complete folder is not
written again.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from qwenvl.cli.make_demo_data import scenes
from qwenvl.cli.make_demo_data.drawing import (
    COLOURS,
    DIRECTIONS,
    SHAPE_PIXELS,
    SHAPES,
    draw_box,
    draw_shape,
    moving_square,
    write_clip,
)

VERSION = 4  # raise when the samples change, so that older folders are made again
MANIFEST = "manifest.json"

Kind = Literal["demo", "lab"]
Split = Literal["train", "heldout"]
SPLITS: tuple[Split, Split] = ("train", "heldout")
Record = dict[str, Any]

DIGIT_PIXELS = 64  # 2 x 2 merged patches of Qwen3-VL
HELDOUT_DIGITS = 300


@dataclass(frozen=True, slots=True)
class Task:
    """One kind of sample.

    Args:
        name: Prefix of the names of its annotation files.
        counts: Number of samples of each split.
        write: Function ``write(output, split, count, rng)`` that writes the media and yields the records.
    """

    name: str
    counts: dict[Split, int]
    write: Callable[[Path, Split, int, np.random.Generator], Iterator[Record]]


def make_demo_data(output: Path, *, kind: Kind = "demo", seed: int = 0, limit: int | None = None) -> bool:
    """Write the demo data into a folder.

    Args:
        output: Folder to write.
        kind: ``demo`` for the demo, ``lab`` for the connector lab.
        seed: Seed of the random generators.
        limit: Most samples of a task and split; None for all.

    Returns:
        Whether anything was written; False if the folder is already complete for this seed and limit.
    """
    settings = {"version": VERSION, "kind": kind, "seed": seed, "limit": limit}
    if _is_complete(output, settings):
        return False
    output.mkdir(parents=True, exist_ok=True)
    (output / MANIFEST).unlink(missing_ok=True)
    files: dict[str, int] = {}
    for number, task in enumerate(TASKS[kind]):
        for split in SPLITS:
            count = task.counts[split] if limit is None else min(limit, task.counts[split])
            rng = np.random.default_rng([seed, number, SPLITS.index(split)])
            annotations = output / f"{task.name}_{split}.jsonl"
            files[annotations.name] = _write_jsonl(annotations, task.write(output, split, count, rng))
    manifest = {"settings": settings, "samples": files, "media": _count_media(output)}
    (output / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return True


def _is_complete(output: Path, settings: Record) -> bool:
    """Return whether an earlier run with the same settings finished and all of its files still exist."""
    if not (output / MANIFEST).is_file():
        return False
    manifest = json.loads((output / MANIFEST).read_text(encoding="utf-8"))
    return bool(
        manifest["settings"] == settings
        and all((output / name).is_file() for name in manifest["samples"])
        and manifest["media"] == _count_media(output)
    )


def _count_media(output: Path) -> int:
    """Return the number of image and video files below the folder."""
    return sum(1 for suffix in ("png", "mp4") for _ in output.glob(f"media/*/*.{suffix}"))


def _write_jsonl(path: Path, records: Iterator[Record]) -> int:
    """Write one record per line; return their number."""
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return len(lines)


def _conversation(question: str, answer: str) -> list[dict[str, str]]:
    """Return one question and its answer in ShareGPT form."""
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


def _media_path(output: Path, name: str) -> Path:
    """Return the path of a media file, and create its folder."""
    path = output / "media" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


# Digits -------------------------------------------------------------------------------------------------------------


def _digit_split(split: Split) -> list[tuple[int, int]]:
    """Return (index in scikit-learn's data, digit) of a split. The split itself never depends on the seed."""
    labels = load_digits().target
    order = np.random.default_rng(0).permutation(len(labels))
    chosen = order[:HELDOUT_DIGITS] if split == "heldout" else order[HELDOUT_DIGITS:]
    return [(int(index), int(labels[index])) for index in chosen]


def _digit_name(split: Split, index: int) -> str:
    """Return the media path of a digit, relative to the output folder."""
    return f"media/digits_{split}/{index:04d}.png"


def write_digits(output: Path, split: Split, count: int, rng: np.random.Generator) -> Iterator[Record]:
    """Write handwritten digits (UCI Optical Recognition of Handwritten Digits, as shipped by scikit-learn)."""
    digits = load_digits().images  # float64 [1797, 8, 8], ink from 0 to 16
    for index, digit in _digit_split(split)[:count]:
        paper = (255 - digits[index] * (255 / 16)).astype(np.uint8)
        image = Image.fromarray(paper).convert("RGB").resize((DIGIT_PIXELS, DIGIT_PIXELS), Image.Resampling.BICUBIC)
        name = _digit_name(split, index)
        image.save(_media_path(output, name.removeprefix("media/")))
        yield {
            "id": f"digit-{index:04d}",
            "image": name,
            "conversations": _conversation("<image>\nWhich digit is written?", str(digit)),
            "label": digit,  # for --task classification
        }


def write_comparisons(output: Path, split: Split, count: int, rng: np.random.Generator) -> Iterator[Record]:
    """Pair different digits of the split, with the images that :func:`write_digits` wrote."""
    digits = [item for item in _digit_split(split) if (output / _digit_name(split, item[0])).is_file()]
    question = "<image>\n<image>\nWhich picture shows the larger digit, the first or the second?"
    if len({digit for _, digit in digits}) < 2:
        return
    for number in range(count):
        first, second = _draw_pair(digits, rng)
        yield {
            "id": f"comparison-{split}-{number:04d}",
            "image": [_digit_name(split, first[0]), _digit_name(split, second[0])],
            "conversations": _conversation(question, "first" if first[1] > second[1] else "second"),
        }


def _draw_pair(digits: list[tuple[int, int]], rng: np.random.Generator) -> tuple[tuple[int, int], tuple[int, int]]:
    """Draw two samples that show different digits."""
    while True:
        first, second = (digits[index] for index in rng.integers(len(digits), size=2))
        if first[1] != second[1]:
            return first, second


# Drawn shapes -------------------------------------------------------------------------------------------------------


def write_grounding(output: Path, split: Split, count: int, rng: np.random.Generator) -> Iterator[Record]:
    """Draw a coloured shape; the question names it, the answer is its box.

    Boxes are integers from 0 to 1000 relative to the image, as in Qwen3-VL. There is only one shape: with two, a model
    with random weights would have to train several times longer than the demo's few minutes.
    """
    for number in range(count):
        colour, shape = str(rng.permutation(list(COLOURS))[0]), str(rng.permutation(list(SHAPES))[0])
        box = draw_box(rng)
        path = _media_path(output, f"grounding_{split}/{number:04d}.png")
        draw_shape(shape, COLOURS[colour], box).save(path)
        label = f"{colour} {shape}"
        answer = {"bbox_2d": [round(edge * 1000 / SHAPE_PIXELS) for edge in box], "label": label}
        yield {
            "id": f"grounding-{split}-{number:04d}",
            "image": path.relative_to(output).as_posix(),
            "conversations": _conversation(f"<image>\nLocate the {label}.", json.dumps(answer)),
        }


# Clips --------------------------------------------------------------------------------------------------------------


def write_motion(output: Path, split: Split, count: int, rng: np.random.Generator) -> Iterator[Record]:
    """Write clips of 8 frames (2 seconds) in which one square moves at a steady speed."""
    for number in range(count):
        direction = str(rng.permutation(list(DIRECTIONS))[0])
        colour = COLOURS[str(rng.permutation(list(COLOURS))[0])]
        path = _media_path(output, f"motion_{split}/{number:04d}.mp4")
        write_clip(path, moving_square(direction, colour, rng))
        yield {
            "id": f"motion-{split}-{number:04d}",
            "video": path.relative_to(output).as_posix(),
            "conversations": _conversation("<video>\nWhich way does the square move?", direction),
        }


_DEMO = (
    Task("digits", {"train": 1497, "heldout": HELDOUT_DIGITS}, write_digits),
    Task("comparisons", {"train": 400, "heldout": 100}, write_comparisons),
    Task("grounding", {"train": 1200, "heldout": 100}, write_grounding),
    Task("motion", {"train": 240, "heldout": 40}, write_motion),
)
_LAB = (
    Task("captions", {"train": 1600, "heldout": 120}, scenes.write_captions),
    Task("questions", {"train": 1600, "heldout": 120}, scenes.write_questions),
    Task("chats", {"train": 1600, "heldout": 120}, scenes.write_chats),
    Task("texts", {"train": 5000, "heldout": 120}, scenes.write_texts),
)
TASKS: dict[Kind, tuple[Task, ...]] = {"demo": _DEMO, "lab": _LAB}


def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line and write the data; return the exit code."""
    parser = argparse.ArgumentParser(description="Make the demo's data.")
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument("--kind", choices=list(TASKS), default="demo", help="data of the demo or of the connector lab")
    parser.add_argument("--seed", default=0, type=int)
    parser.add_argument("--limit", type=int, help="most samples of a task and split; default: all")
    arguments = parser.parse_args(argv)
    written = make_demo_data(arguments.output, kind=arguments.kind, seed=arguments.seed, limit=arguments.limit)
    sys.stdout.write(f"{arguments.output} {'written' if written else 'is already complete'}\n")
    return 0
