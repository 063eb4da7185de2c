#!/usr/bin/env python
"""Make the demo's data: real handwritten digits, comparisons of two of them, a drawn shape to locate, short clips."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any directory
from qwenvl.cli.make_demo_data.command import main

if __name__ == "__main__":
    sys.exit(main())
