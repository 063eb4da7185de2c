#!/usr/bin/env python
"""Draw the attention of the words of an answer to an image, over the image, on one HTML page."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any directory
from qwenvl.cli.show_attention.command import main

if __name__ == "__main__":
    sys.exit(main())
