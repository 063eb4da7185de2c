"""Entry point of training.

    torchrun --nproc_per_node=N qwenvl/train/train_qwen.py recipe.yaml --learning_rate 1e-5
    torchrun --nproc_per_node=N -m qwenvl.train.train_qwen ...
    python qwenvl/train/train_qwen.py ...

work alike, from any directory.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the package lies two folders up
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from qwenvl.arguments import parse_arguments, wants_debug
from qwenvl.train.setup import run
from qwenvl.utilities.distributed import rank, shut_down
from qwenvl.utilities.errors import SampleError, UserError
from qwenvl.utilities.logging import setup_logging

logger = logging.getLogger("qwenvl")

_OTHER_RANKS_WAIT = 5.0
"""Seconds. A mistake that every rank finds ends rank 0 first, and torchrun then ends the others, before they speak."""


def main(argv: Sequence[str] | None = None) -> int:
    """Train; return the exit code. A user's mistake is one message on one rank, without a traceback."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader processes fork after the tokenizer was used
    setup_logging("info")
    try:
        parsed = parse_arguments(arguments)
        setup_logging(parsed.training.log_level)
        run(parsed)
    except UserError as error:
        _say(error, with_traceback=wants_debug(arguments))
        return 1
    shut_down()  # only here: after an error, other ranks may be waiting for this one in a collective
    return 0


def _say(error: UserError, with_traceback: bool) -> None:
    # What is wrong with one sample is known to one rank only, which must speak at once.
    if rank() > 0 and not isinstance(error, SampleError):
        time.sleep(_OTHER_RANKS_WAIT)
    logger.error("%s", error, exc_info=error if with_traceback else None)


if __name__ == "__main__":
    sys.exit(main())
