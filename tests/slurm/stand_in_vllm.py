"""Takes the command line of ``vllm serve`` and serves the folder by stock transformers, until it is ended.

python -m tests.slurm.stand_in_vllm serve FOLDER ... --port PORT
"""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

from tests.serving.chat_server import StockModel, listening


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("serve")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int)
    arguments, _ = parser.parse_known_args()
    model = StockModel(arguments.folder)
    with listening([str(arguments.folder)], model.answer, port=arguments.port):
        signal.sigwait({signal.SIGTERM})


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    main()
