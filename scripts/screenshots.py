#!/usr/bin/env python
"""Take the README's screenshots of the demo (``bash scripts/demo.sh``): viewer, run report, evaluation.

    DEMO_DIR=demo python scripts/screenshots.py [--output docs/images]

Needs Chromium on the PATH. Writes ``viewer.png``, ``report.png`` and ``evaluation.png``.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
SIZE = (1280, 860)
ASKED = "demo_digits_heldout,demo_comparisons_heldout,demo_grounding_heldout"
LIMITS = ("--min_pixels", "64*64", "--max_pixels", "128*128")  # the limits of configs/demo.yaml


def main() -> int:
    """Read the command line, make the pages and take their screenshots; return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=REPOSITORY / "docs" / "images")
    output: Path = parser.parse_args().output
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    demo = Path(os.environ.get("DEMO_DIR", REPOSITORY / "demo")).resolve()
    if chromium is None or not (demo / "model" / "report.html").is_file():
        sys.stderr.write(f"Needs Chromium on the PATH, and the demo in {demo}: bash scripts/demo.sh\n")
        return 1
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        pages = {
            "viewer": _page(demo, Path(scratch) / "view", "view_data", "demo_grounding_heldout", "index.html"),
            "report": demo / "model" / "report.html",
            "evaluation": _page(demo, Path(scratch) / "eval", "evaluate", ASKED, "evaluation.html"),
        }
        for name, page in pages.items():
            _shoot(chromium, page, output / f"{name}.png", Path(scratch) / "profile")
    return 0


def _page(demo: Path, folder: Path, tool: str, dataset: str, file: str) -> Path:
    """Run a tool on the demo's model and data; return the page it wrote."""
    command = [sys.executable, str(REPOSITORY / "tools" / f"{tool}.py"), "--model_name_or_path", str(demo / "model")]
    command += ["--dataset_use", dataset, "--output", str(folder), *LIMITS]
    subprocess.run(command, check=True, env=os.environ | {"DEMO_DIR": str(demo), "HF_HUB_OFFLINE": "1"})
    return folder / file


def _shoot(chromium: str, page: Path, file: Path, profile: Path) -> None:
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=8000"]
    options += [f"--user-data-dir={profile}", f"--window-size={SIZE[0]},{SIZE[1]}", f"--screenshot={file}"]
    subprocess.run([chromium, *options, page.as_uri()], check=True, capture_output=True)


if __name__ == "__main__":
    sys.exit(main())
