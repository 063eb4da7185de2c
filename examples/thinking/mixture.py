"""Make a mixture of plain and thinking data: two digits to compare, with a thinking block in every other sample.

    python examples/thinking/mixture.py --data DIR [--count 2000]

``DIR`` is a folder written by ``tools/make_demo_data.py``. Writes ``compare_train.jsonl`` (half of it with thinking)
and, from digits that are in no training sample, ``compare_plain_heldout.jsonl`` and ``compare_thinking_heldout.jsonl``:
the same questions with the two kinds of answers.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

QUESTION = "<image>\n<image>\nWhich picture shows the larger digit, the first or the second?"


def main() -> None:
    """Read the command line and write the files."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", required=True, type=Path, help="folder that tools/make_demo_data.py wrote")
    parser.add_argument("--count", type=int, default=2000, help="training samples; a twentieth of them is held out")
    arguments = parser.parse_args()
    train = _pairs(arguments.data / "digits_train.jsonl", arguments.count)
    _write(arguments.data / "compare_train.jsonl", (_record(*pair, n % 2 == 0) for n, pair in enumerate(train)))
    held_out = list(_pairs(arguments.data / "digits_heldout.jsonl", arguments.count // 20))
    for name, thinks in (("plain", False), ("thinking", True)):
        _write(arguments.data / f"compare_{name}_heldout.jsonl", (_record(*pair, thinks) for pair in held_out))


def _pairs(digits: Path, count: int) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Yield ``count`` pairs of samples with different digits, the same ones on every call."""
    records = [json.loads(line) for line in digits.read_text(encoding="utf-8").splitlines()]
    generator = random.Random(0)
    if len({record["label"] for record in records}) < 2:
        raise SystemExit(f"{digits} holds one digit alone: make more of them.")
    while count:
        first, second = generator.sample(records, 2)
        if first["label"] != second["label"]:
            yield first, second
            count -= 1


def _record(first: dict[str, Any], second: dict[str, Any], thinks: bool) -> dict[str, Any]:
    answer = "first" if int(first["label"]) > int(second["label"]) else "second"
    thought = f"<think>\n{first['label']} and {second['label']}\n</think>\n\n" if thinks else ""
    return {
        "image": [first["image"], second["image"]],
        "conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": thought + answer}],
    }


def _write(path: Path, records: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


if __name__ == "__main__":
    main()
