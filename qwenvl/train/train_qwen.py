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
from collections.abc import Sequence
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the package lies two folders up
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from qwenvl.config import parse_arguments, wants_debug
from qwenvl.utils.allocator import use_expandable_segments
from qwenvl.utils.distributed import is_first_to_say, lost_contact, run_program, shut_down
from qwenvl.utils.errors import UserError
from qwenvl.utils.logging import held_back, setup_logging

logger = logging.getLogger("qwenvl")

_LOST_CONTACT = (
    "Lost the connection to another rank; training stopped. See the log of that rank or of its machine for the reason. "
    "Run the same command again to resume from the newest checkpoint. Error on this rank: %s"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Train; return the exit code.

    A user's mistake is logged as one message without a traceback, any other error with a traceback. Only the first
    rank that fails logs it, since others fail for the same reason or because that rank is gone; a rank that only lost
    the connection to another one logs one message. With ``--debug`` every rank logs its error with a traceback. A run
    stopped by SIGTERM or SIGUSR1 has saved a checkpoint and returns 75.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader processes fork after the tokenizer was used
    use_expandable_segments()
    debug = wants_debug(arguments)
    setup_logging("info")
    try:
        with held_back():
            parsed = parse_arguments(arguments)
            levels = parsed.training.log_level, parsed.training.log_level_replica
            setup_logging(*levels)
        debug = parsed.debug
        if parsed.training.use_cpu:  # or DeepSpeed, once imported, prints on every rank that it found no accelerator
            os.environ.setdefault("DS_ACCELERATOR", "cpu")
        from qwenvl.train.run import run  # takes seconds; --help and mistakes in flags need not wait

        setup_logging(*levels)  # after all imports, as some libraries add handlers of their own
        code = run(parsed)
    except UserError as error:
        if debug or is_first_to_say("error"):
            logger.error("%s", error, exc_info=error if debug else None)
        return 1
    except Exception as error:
        if debug or is_first_to_say("error"):
            if debug or not lost_contact(error):
                raise
            logger.error(_LOST_CONTACT, error)
        return 1
    shut_down()  # only here: after an error, other ranks may be waiting for this one in a collective
    return code


if __name__ == "__main__":
    run_program(main)
