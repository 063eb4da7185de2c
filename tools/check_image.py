#!/usr/bin/env python
"""Find every problem of every sample before training: files, texts, tags, boxes, lengths, duplicates."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any directory
from qwenvl.cli.check_image.command import main

if __name__ == "__main__":
    sys.exit(main())
