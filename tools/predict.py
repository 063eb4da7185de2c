#!/usr/bin/env python
"""Ask a model: the samples of datasets, one question, or a chat."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any directory
from qwenvl.cli.predict.command import main

if __name__ == "__main__":
    sys.exit(main())
