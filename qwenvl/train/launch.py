"""``torchrun`` without its own traceback if a process fails, because that process has already logged the reason.

    python qwenvl/train/launch.py --nproc_per_node 8 qwenvl/train/train_qwen.py recipe.yaml

takes the arguments of ``torchrun``. SIGTERM and SIGUSR1 are forwarded to the processes, which save a checkpoint and
end. Plain ``torchrun`` would kill them 30 seconds after a SIGTERM, and would itself end immediately on SIGUSR1.
"""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import psutil
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun

if __package__ in (None, ""):  # started as a file: the package lies two folders up
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from qwenvl.utils.logging import setup_logging

logger = logging.getLogger("qwenvl")


def main(argv: Sequence[str] | None = None) -> int:
    """Start the processes and wait for them; return the exit code of the first one that failed, or 0."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _forward)
    try:
        torchrun(["--signals-to-handle", "SIGINT,SIGHUP,SIGQUIT", *(sys.argv[1:] if argv is None else argv)])
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode
        killer = signal.Signals(-failure.exitcode)
        setup_logging("info")
        advice = "; often because the machine ran out of memory (see dmesg)" if killer == signal.SIGKILL else ""
        logger.error("Rank %d was killed by %s%s. The other ranks were ended.", rank, killer.name, advice)
        return 128 + killer
    return 0


def _forward(number: int, frame: FrameType | None) -> None:
    """Forward a signal to the processes; exit if there are none yet."""
    del frame
    children = psutil.Process().children()
    if not children:
        sys.exit(128 + number)
    for child in children:
        child.send_signal(number)


if __name__ == "__main__":
    sys.exit(main())
