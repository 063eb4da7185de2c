#!/usr/bin/env python
"""Put training runs side by side: what differs between them, their scores and their curves."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any directory
from qwenvl.cli.compare_runs.command import main

if __name__ == "__main__":
    sys.exit(main())
