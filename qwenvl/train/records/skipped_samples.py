"""Count skipped, cut and unusual samples by dataset, over all ranks."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from qwenvl.data.encoding.encoded import Event
from qwenvl.data.sample_stats import REMARKS
from qwenvl.utils.distributed import gather_objects, is_main_process
from qwenvl.utils.errors import Origin, SampleError

logger = logging.getLogger(__name__)

BAD_SAMPLES = "bad_samples.jsonl"
MEANING = {
    "bad": f"left out: cannot be used (see {BAD_SAMPLES})",
    "overlength": f"left out: longer than --model_max_length (see {BAD_SAMPLES})",
    "truncated": "shortened by whole turns to --model_max_length",
    **REMARKS,
}
SAID_ONCE = "unread_key"
"""Kind of events that are not counted per sample; their message is logged once."""
_THINKING_ADVICE = (
    "The answer of %s does not fit the checkpoint's chat template: it has a <think> block where the template opens "
    "none, or none where it opens one. It is trained as the template renders it. This is logged once per dataset, and "
    "counted."
)


class DataReport:
    """Counts events; each sample counts once, however many epochs and ranks read it.

    Args:
        output_dir: Folder for ``bad_samples.jsonl``, which gets a line for each skipped sample.
    """

    def __init__(self, output_dir: str) -> None:
        self._file = Path(output_dir) / BAD_SAMPLES
        self._events: dict[tuple[str, str], Event] = {}
        self._news: dict[tuple[str, str], Event] = {}  # events that other ranks may not know yet
        self._said: set[tuple[str, str]] = set()
        self._gathered: dict[tuple[str, str], Event] = {}

    def start_over(self) -> None:
        """Remove the file of an earlier run in the folder; do not call it in a resumed run."""
        if is_main_process():
            self._file.unlink(missing_ok=True)

    def take_up(self) -> None:
        """Count the samples that a resumed run had skipped before."""
        if not self._file.exists():
            return
        for line in self._file.read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            origin = Origin(*(record[name] for name in ("dataset", "file", "line", "id", "member")))
            kind = "overlength" if record["category"] == "overlength" else "bad"
            message = str(SampleError(record["category"], record["reason"], origin))
            self._events[kind, message] = self._news[kind, message] = Event(kind, origin.dataset, message, record)

    def add(self, events: Iterable[Event], *, common: bool = False) -> None:
        """Record the events of a batch; the first of each kind is logged immediately.

        Args:
            events: Events to record.
            common: Whether every rank has these events, so that only process 0 logs and writes them.
        """
        speaks = is_main_process() or not common
        for event in events:
            key = (event.kind, event.message)
            if key in self._events:
                continue
            group = (event.kind, event.dataset if event.kind in REMARKS else "")
            if speaks and (event.kind == SAID_ONCE or group not in self._said):
                self._say(event)
            self._said.add(group)
            self._events[key] = event
            (self._gathered if common else self._news)[key] = event
            if speaks and event.record:
                self._write([_as_line(event)], "a")  # immediately, as the run may be stopped

    def gather(self) -> list[Event]:
        """Return the events of all ranks, each once. Every rank must call it."""
        for of_rank in gather_objects(self._news):
            self._gathered |= of_rank
        self._news = {}
        return list(self._gathered.values())

    def summary(self) -> list[str]:
        """Return a line for each dataset and kind, over all ranks, and complete the file. Every rank must call it."""
        events = self.gather()
        if is_main_process():
            self._complete_file(events)
        return [
            f"Dataset {name!r}: {count} sample{'s' * (count != 1)} {MEANING[kind]}."
            for (name, kind), count in sorted(count_events(events).items())
        ] + sorted(f"{event.message[0].upper()}{event.message[1:]}." for event in events if event.kind == SAID_ONCE)

    def _say(self, event: Event) -> None:
        if event.kind == SAID_ONCE:
            if is_main_process():
                logger.warning("%s.", event.message)
        elif event.kind != "thinking_mismatch":
            logger.warning("%s (The first one; all are counted at the end of the run.)", event.message)
        elif is_main_process():
            logger.warning(_THINKING_ADVICE, event.message)

    def _complete_file(self, events: Iterable[Event]) -> None:
        """Add the lines of ranks on other disks, and remove lines that several ranks wrote."""
        lines = [_as_line(event) for event in events if event.record]
        if not lines:
            return
        written = self._file.read_text(encoding="utf-8").splitlines(keepends=True) if self._file.exists() else []
        self._write(dict.fromkeys([*written, *lines]), "w")

    def _write(self, lines: Iterable[str], mode: str) -> None:
        # Half of a surrogate pair is not valid UTF-8; it becomes its escape, which is valid JSON. A line is one write,
        # so that lines of several ranks do not mix.
        with self._file.open(mode, encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(lines)


def count_events(events: Iterable[Event]) -> Counter[tuple[str, str]]:
    """Return the number of samples of each (dataset, kind)."""
    return Counter((event.dataset, event.kind) for event in events if event.kind != SAID_ONCE)


def _as_line(event: Event) -> str:
    return json.dumps(event.record, ensure_ascii=False) + "\n"
