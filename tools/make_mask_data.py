#!/usr/bin/env python
"""Make drawn scenes with a mask for each phrase of their captions, to learn grounding from."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any directory
from qwenvl.cli.make_mask_data import main

if __name__ == "__main__":
    sys.exit(main())
