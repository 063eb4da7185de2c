#!/usr/bin/env python
"""Make a site of samples as the model gets them, and of the datasets they come from."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any directory
from qwenvl.cli.view_data.command import main

if __name__ == "__main__":
    sys.exit(main())
