#!/usr/bin/env python
"""Rank training samples by how suspect they are; write lists to train on and a page to look at."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any directory
from qwenvl.cli.rank_samples.command import main

if __name__ == "__main__":
    sys.exit(main())
