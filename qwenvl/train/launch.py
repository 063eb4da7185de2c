"""``torchrun`` without its own traceback when a process that it started fails: that process has said why.

    python qwenvl/train/launch.py --nproc_per_node 8 qwenvl/train/train_qwen.py recipe.yaml

takes the arguments of ``torchrun``.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main as torchrun


def main(argv: Sequence[str] | None = None) -> int:
    """Start the processes and wait for them; return the exit code of the first one that failed, or 0."""
    try:
        torchrun(list(sys.argv[1:] if argv is None else argv))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else 128 - failure.exitcode  # killed by a signal
    return 0


if __name__ == "__main__":
    sys.exit(main())
