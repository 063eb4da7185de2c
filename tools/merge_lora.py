#!/usr/bin/env python
"""Merge adapters into the checkpoint they were trained on, and check the folder that results."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any directory
from qwenvl.cli.merge_lora import main

if __name__ == "__main__":
    sys.exit(main())
