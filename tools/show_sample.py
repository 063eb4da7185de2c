#!/usr/bin/env python
"""Show samples as the model sees them: rendered text with trained tokens in colour, grids, positions, timestamps."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any directory
from qwenvl.cli.show_sample import main

if __name__ == "__main__":
    sys.exit(main())
