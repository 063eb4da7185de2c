#!/usr/bin/env python
"""Check that serving gives the model what training gave it, and print the arguments of vLLM and SGLang that do."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any directory
from qwenvl.cli.check_serving import main

if __name__ == "__main__":
    sys.exit(main())
