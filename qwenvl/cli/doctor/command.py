"""Check whether this machine is ready to train, and print a verdict that can be pasted into an issue.

    python tools/doctor.py [--skip_training]
    torchrun --nproc_per_node=8 tools/doctor.py

Checks package versions against the tested ranges and known faults, devices and limits, and runs two training steps on a
tiny checkpoint; under torchrun it also measures the connection between the ranks. Exit code 1 if training would fail or
be wrong.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from qwenvl import __version__
from qwenvl.cli.doctor.findings import Finding, Level
from qwenvl.cli.doctor.machine import check_compilers, check_devices, check_host, check_launcher
from qwenvl.cli.doctor.packages import check_known_bad, check_optional, check_python, check_required, check_video
from qwenvl.cli.doctor.trial import check_network, check_training
from qwenvl.utils.logging import setup_logging
from qwenvl.utils.tables import as_text, table

STYLES: dict[Level, str] = {"good": "green", "note": "cyan", "warning": "yellow", "bad": "bold red"}
NAMED = ("Python", "torch", "transformers", "accelerate", "peft", "deepspeed", "flash-attn")
"""Packages whose versions are part of the verdict."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks and print the results; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--skip_training", action="store_true", help="skip the training run")
    arguments = parser.parse_args(argv)
    setup_logging("warning")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    findings = list(check_network())
    if int(os.environ.get("RANK", "0")):
        return 0
    console = Console(highlight=False, soft_wrap=False)
    with console.status("Running the checks, and two training steps on a tiny model ..."):
        findings = [*examine(train=not arguments.skip_training), *findings]
    sys.stdout.write(as_text(as_table(findings), stream=sys.stdout) + "\n")
    console.print(verdict(findings), markup=False, soft_wrap=True)
    return int(any(finding.level == "bad" for finding in findings))


def examine(*, train: bool) -> Iterator[Finding]:
    """Yield the results of all checks that need one process."""
    for check in (check_python, check_required, check_known_bad, check_optional, check_video):
        yield from check()
    for check in (check_devices, check_host, check_compilers, check_launcher):
        yield from check()
    if train:
        yield from check_training()


def as_table(findings: Sequence[Finding]) -> Table:
    """Return a table of all results."""
    rows = [
        (Text("ok" if one.level == "good" else one.level, STYLES[one.level]), one.what, one.found, one.advice)
        for one in findings
    ]
    return table("Checks", ("", "what", "found", "advice"), rows, words=range(4))


def verdict(findings: Sequence[Finding]) -> str:
    """Return the text to paste into an issue: verdict, versions, GPUs, warnings and errors."""
    counts = {level: sum(finding.level == level for finding in findings) for level in STYLES}
    if counts["bad"]:
        word = "not ready"
    else:
        word = f"ready, with {counts['warning']} warning(s)" if counts["warning"] else "ready"
    found = {one.what: one.found for one in findings}
    versions = ", ".join(f"{name} {found[name]}" for name in NAMED if name in found)
    lines = [f"Verdict: {word}", f"qwenvl {__version__}, {versions}"]
    lines += [f"{one.what}: {one.found}" for one in findings if one.what.startswith("GPU")]
    for one in findings:
        if one.level in ("warning", "bad"):
            lines.append(f"{one.level}: {one.what}: {one.found}. {one.advice}")
    return "\n".join(lines)
