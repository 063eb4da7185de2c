#!/usr/bin/env python
"""Is this machine ready to train? Looks, tries, and ends in a verdict that can be pasted into an issue."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any directory
from qwenvl.cli.doctor.command import main

if __name__ == "__main__":
    sys.exit(main())
