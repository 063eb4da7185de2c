"""Pages as Chromium shows them, where it is installed."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.cli.pages import Figures

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--enable-logging=stderr",
    "--v=0",
    "--virtual-time-budget=5000",
)

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")


def dom(page: Path, fragment: str, profile: Path) -> Figures:
    """Return a page as Chromium has it after its scripts ran; fails where they complain."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "--dump-dom", f"{page.as_uri()}{fragment}"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert "CONSOLE" not in shown.stderr, shown.stderr
    assert shown.returncode == 0
    return Figures(shown.stdout)
