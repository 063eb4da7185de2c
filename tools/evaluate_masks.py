#!/usr/bin/env python
"""Say how well the masks of a folder that ``--task grounding`` trained fit those of a dataset."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any directory
from qwenvl.cli.evaluate_masks import main

if __name__ == "__main__":
    sys.exit(main())
