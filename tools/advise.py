#!/usr/bin/env python
"""Say which settings train a model on given GPUs: memory by part, steps, hours and the command to copy."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any directory
from qwenvl.cli.advise.command import main

if __name__ == "__main__":
    sys.exit(main())
