#!/usr/bin/env python
"""Write a quantized copy of a trained model, checked against it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any directory
from qwenvl.cli.export.command import main

if __name__ == "__main__":
    sys.exit(main())
