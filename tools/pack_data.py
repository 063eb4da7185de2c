#!/usr/bin/env python
"""Plan packs before training: which samples make each row of up to ``--model_max_length`` tokens."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any directory
from qwenvl.cli.pack_data import main

if __name__ == "__main__":
    sys.exit(main())
