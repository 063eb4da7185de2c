#!/usr/bin/env python
"""Score answers: by dataset, with intervals, as a table, JSON and a page of the worst; and: does the model look?"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any directory
from qwenvl.cli.evaluate.command import main

if __name__ == "__main__":
    sys.exit(main())
