"""What happened to the data: samples left out, cut or unusual, counted by dataset over all ranks."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from qwenvl.data.collation import Event
from qwenvl.utilities.distributed import gather_objects

logger = logging.getLogger(__name__)

_MEANING = {
    "bad": "left out: cannot be used",
    "overlength": "left out: longer than --model_max_length",
    "truncated": "shortened by whole turns to --model_max_length",
    "thinking_mismatch": "answers whose <think> block does not fit the chat template",
}
_THINKING_ADVICE = (
    "The answer of %s does not fit the checkpoint's chat template: it has a <think> block where the template opens "
    "none, or none where it opens one. It is trained as the template renders it; this is said once, and counted."
)


class DataReport:
    """Counts events, each sample once however many epochs there are.

    Args:
        output_dir: ``bad_samples.jsonl`` is written there, a line for each sample left out.
    """

    def __init__(self, output_dir: str) -> None:
        self._file = Path(output_dir) / "bad_samples.jsonl"
        self._seen: set[tuple[str, str]] = set()
        self._counts: Counter[tuple[str, str]] = Counter()

    def add(self, events: Iterable[Event]) -> None:
        """Take note of the events of a batch."""
        for event in events:
            key = (event.kind, event.message)
            if key in self._seen:
                continue
            self._seen.add(key)
            self._counts[event.kind, event.dataset] += 1
            if event.record:
                self._write(event)
            if self._counts[event.kind, event.dataset] > 1:
                continue
            if event.kind == "thinking_mismatch":
                logger.warning(_THINKING_ADVICE, event.message)
            else:
                logger.warning("%s (more like it are counted, see the end of the run)", event.message)

    def summary(self) -> list[str]:
        """Return a line for each kind and dataset, summed over all ranks. Every rank has to call it."""
        total: Counter[tuple[str, str]] = Counter()
        for counts in gather_objects(self._counts):
            total.update(counts)
        return [
            f"dataset {dataset!r}: {count} samples {_MEANING[kind]}" for (kind, dataset), count in sorted(total.items())
        ]

    def _write(self, event: Event) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with self._file.open("a", encoding="utf-8") as file:  # appended in one write, so ranks do not mix lines
            file.write(json.dumps(event.record, ensure_ascii=False) + "\n")
