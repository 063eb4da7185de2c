"""What the trainer says while it runs: lines on standard error, from process 0 unless they are warnings."""

from __future__ import annotations

import logging
import os
import sys

from tqdm.auto import tqdm
from transformers.utils import logging as transformers_logging

from qwenvl.utilities.distributed import rank
from qwenvl.utilities.errors import UserError

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


def setup_logging(level: str = "info") -> None:
    """Send messages of the trainer, transformers and datasets to one handler on standard error.

    Process 0 speaks from ``level`` on, the others from warnings on, with ``[rank k]`` in front. The libraries speak
    from warnings on, or from ``info`` on with ``debug``: their ``info`` is a page a model. Calling it again replaces
    the handler.

    Args:
        level: a name of ``--log_level`` of transformers; ``passive`` means ``info``.

    Raises:
        UserError: another name.
    """
    if level not in LEVELS:
        raise UserError(f"log level {level!r} is not one of {', '.join(LEVELS)}.")
    own = LEVELS[level] if rank() == 0 else max(LEVELS[level], logging.WARNING)
    library = max(own, logging.INFO if own == logging.DEBUG else logging.WARNING)
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _Handler)]:
        root.removeHandler(handler)
    root.addHandler(_Handler())
    logging.getLogger("qwenvl").setLevel(own)
    transformers_logging.set_verbosity(library)
    _join("transformers")
    logging.getLogger("datasets").setLevel(library)
    _join("datasets")


def _join(library: str) -> None:
    """Let a library speak through our handler, without its own; one not imported yet keeps the one it will bring."""
    logger = logging.getLogger(library)
    logger.propagate = library in sys.modules
    for handler in [handler for handler in logger.handlers if type(handler) is logging.StreamHandler]:
        logger.removeHandler(handler)


class _AboveProgressBars:
    """Standard error as it is at the time of writing, above any progress bar of tqdm."""

    def write(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr, end="")

    def flush(self) -> None:
        sys.stderr.flush()


class _Handler(logging.StreamHandler[_AboveProgressBars]):
    def __init__(self) -> None:
        super().__init__(_AboveProgressBars())
        self.setFormatter(_Formatter("%(message)s"))


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
