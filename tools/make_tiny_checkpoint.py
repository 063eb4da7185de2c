#!/usr/bin/env python
"""Make a random-weight checkpoint of any supported family, small enough for tests or for the demo."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any directory
from qwenvl.cli.make_tiny_checkpoint.command import main

if __name__ == "__main__":
    sys.exit(main())
