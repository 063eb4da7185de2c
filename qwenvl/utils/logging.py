"""Logging to standard error: messages of process 0, and warnings of all processes."""

from __future__ import annotations

import logging
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from qwenvl.utils.distributed import is_first_to_say, rank
from qwenvl.utils.errors import UserError

LEVELS = {
    "debug": logging.DEBUG,
    "detail": logging.DEBUG,
    "info": logging.INFO,
    "passive": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}
_COLOURS = {logging.WARNING: "\033[33m", logging.ERROR: "\033[31m", logging.CRITICAL: "\033[31m"}


def setup_logging(level: str = "info", replica: str = "warning") -> None:
    """Send messages of the trainer, transformers and datasets to one handler on standard error.

    Process 0 logs from ``level`` on, the others from ``replica`` on (not below ``level`` where ``replica`` is the
    default), with ``[rank k]`` in front; a warning that several processes have is logged by one of them. The libraries
    log from warnings on, or from ``info`` on with ``debug``: their ``info`` is a page per model. Calling this again
    replaces the handler. Progress bars are drawn only on a terminal and with ``info`` (:func:`shows_bars`).

    Args:
        level: Level of process 0, a name of ``--log_level`` of transformers; ``passive`` means ``info``.
        replica: Level of the other processes, a name of ``--log_level_replica``.

    Raises:
        UserError: a name is unknown.
    """
    for name in (level, replica):
        if name not in LEVELS:
            raise UserError(f"log level {name!r} is not one of {', '.join(LEVELS)}.")
    of_others = max(LEVELS[level], LEVELS[replica]) if replica == "warning" else LEVELS[replica]
    own = LEVELS[level] if rank() == 0 else of_others
    library = max(own, logging.INFO if own == logging.DEBUG else logging.WARNING)
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _Handler)]:
        root.removeHandler(handler)
    root.addHandler(_Handler())
    logging.getLogger("qwenvl").setLevel(own)
    transformers_logging.set_verbosity(library)
    _join("transformers")
    for name in ("datasets", "DeepSpeed"):
        logging.getLogger(name).setLevel(library)
        _join(name)
    # These include the bars of huggingface_hub. Loading and saving weights draw one on every rank.
    (transformers_logging.enable_progress_bar if shows_bars() else transformers_logging.disable_progress_bar)()


@contextmanager
def held_back() -> Iterator[None]:
    """Hold back messages until the block ends; then log the ones that the level allows.

    For messages before ``--log_level`` is known.
    """
    root, waiting = logging.getLogger(), _Waiting()
    for handler in [handler for handler in root.handlers if isinstance(handler, _Handler)]:
        root.removeHandler(handler)
    root.addHandler(waiting)
    try:
        yield
    finally:
        root.removeHandler(waiting)
        speaking = next((handler for handler in root.handlers if isinstance(handler, _Handler)), None)
        if speaking is None:
            speaking = _Handler()
            root.addHandler(speaking)
        for record in waiting.records:
            if logging.getLogger(record.name).isEnabledFor(record.levelno):
                speaking.handle(record)


def shows_bars() -> bool:
    """Return whether to draw progress bars: on a terminal, in process 0, with level ``info`` or below.

    In a file, every change of a bar would add text.
    """
    return rank() == 0 and sys.stderr.isatty() and logging.getLogger("qwenvl").isEnabledFor(logging.INFO)


def _join(library: str) -> None:
    """Send messages of a library to our handler instead of its own, unless it is not imported yet."""
    logger = logging.getLogger(library)
    logger.propagate = library.lower() in sys.modules
    for handler in [handler for handler in logger.handlers if type(handler) is logging.StreamHandler]:
        logger.removeHandler(handler)


@contextmanager
def collected_warnings(most: int = 200) -> Iterator[list[str]]:
    """Yield a list that collects the warnings of this process, each text once.

    Args:
        most: Most warnings to keep.
    """
    collector = _Collector(most)
    logger = logging.getLogger("qwenvl")
    logger.addHandler(collector)
    try:
        yield collector.texts
    finally:
        logger.removeHandler(collector)


class _Collector(logging.Handler):
    def __init__(self, most: int) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []
        self._most = most

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if text not in self.texts and len(self.texts) < self._most:
            self.texts.append(text)


class _AboveProgressBars:
    """Stream to the current standard error that writes above progress bars of tqdm."""

    def write(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr, end="")

    def flush(self) -> None:
        sys.stderr.flush()


class _Waiting(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


class _SaidByOne(logging.Filter):
    """Filter that logs a warning only in the first process that has it: most warnings arise in all processes."""

    def __init__(self) -> None:
        super().__init__()
        self._said: Counter[str] = Counter()

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno != logging.WARNING:
            return True
        text = record.getMessage()
        self._said[text] += 1  # each repetition counts as another warning
        return is_first_to_say(f"warning {self._said[text]}: {text}")


class _Handler(logging.StreamHandler):  # type: ignore[type-arg]  # Python 3.10 has no subscript of it when it runs
    def __init__(self) -> None:
        super().__init__(_AboveProgressBars())
        self.setFormatter(_Formatter("%(message)s"))
        self.addFilter(_SaidByOne())


class _Formatter(logging.Formatter):
    """``[rank 1] 12:30:59 warning: message``: rank above 0, level above info; coloured on a terminal only."""

    def format(self, record: logging.LogRecord) -> str:
        prefix = f"[rank {rank()}] " if rank() else ""
        label = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        text = f"{prefix}{self.formatTime(record, '%H:%M:%S')} {label}{super().format(record)}"
        colour = _COLOURS.get(record.levelno)
        if colour and sys.stderr.isatty() and "NO_COLOR" not in os.environ:
            return f"{colour}{text}\033[0m"
        return text
