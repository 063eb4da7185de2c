#!/usr/bin/env python
"""Does the image reach the language model, and through what? Runs the experiments of a recipe, and compares them."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any directory
from qwenvl.cli.connector_lab.command import main

if __name__ == "__main__":
    sys.exit(main())
