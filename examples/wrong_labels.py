#!/usr/bin/env python
"""Exchange the labels of some of the demo's handwritten digits, to see whether tools/rank_samples.py finds them.

    python examples/wrong_labels.py --data demo/data --output demo/wrong --percent 3 --seed 0

Writes ``digits.jsonl``, ``exchanged.json`` (the lines whose digit is another one now) and ``registry.py``, with the
datasets ``digits_wrong``, ``digits`` and ``digits_heldout``. docs/which_data.md goes on from there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np


def exchange_labels(annotations: Path, output: Path, percent: float, seed: int) -> list[int]:
    """Write digits with another digit as the answer of some of them.

    Args:
        annotations: ``digits_train.jsonl`` of tools/make_demo_data.py.
        output: File to write.
        percent: Share of the samples whose answer is exchanged.
        seed: Seed of the choice and of the new digits.

    Returns:
        The lines of the exchanged ones, from 1, ascending.
    """
    records = [json.loads(line) for line in annotations.read_text(encoding="utf-8").splitlines()]
    rng = np.random.default_rng(seed)
    chosen = sorted(rng.choice(len(records), round(percent / 100 * len(records)), replace=False).tolist())
    for place in chosen:
        digit = (records[place]["label"] + int(rng.integers(1, 10))) % 10
        records[place]["label"] = digit
        records[place]["conversations"][1]["value"] = str(digit)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return [place + 1 for place in chosen]


def main(argv: Sequence[str] | None = None) -> int:
    """Write the files; return the exit code."""
    parser = argparse.ArgumentParser(description="Exchange the labels of some of the demo's handwritten digits.")
    parser.add_argument("--data", required=True, type=Path, help="folder of tools/make_demo_data.py")
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument("--percent", default=3.0, type=float, help="share of the training samples")
    parser.add_argument("--seed", default=0, type=int)
    arguments = parser.parse_args(argv)
    data, output = arguments.data.resolve(), arguments.output.resolve()
    lines = exchange_labels(data / "digits_train.jsonl", output / "digits.jsonl", arguments.percent, arguments.seed)
    (output / "exchanged.json").write_text(json.dumps(lines) + "\n", encoding="utf-8")
    files = {
        "digits_wrong": output / "digits.jsonl",
        "digits": data / "digits_train.jsonl",
        "digits_kept": output / "ranking" / "digits_wrong_kept.jsonl",
        "digits_heldout": data / "digits_heldout.jsonl",
    }
    entries = {name: {"annotation_path": str(file), "data_path": str(data)} for name, file in files.items()}
    (output / "registry.py").write_text(f"data_dict = {entries!r}\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
