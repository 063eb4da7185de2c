"""Changes the package in one place at a time, and counts which changes the mirrored tests notice.

    python -m tests.mutation [FILE ...] [--per-file 12] [--seed 0]

FILE is one of the package (``qwenvl/data/media/resize.py``); without any, the files of ``core.yaml`` are taken. The
tests are those of the mirrored file (``tests/data/media/test_resize.py``) and of others that ``core.yaml`` names.
Prints each change that no test notices, and a table; ends with status 1 where less than 90% are noticed. Changes that
make no difference stand in ``core.yaml`` with the reason, and do not count.
"""

from __future__ import annotations

import argparse
import ast
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.mutation.operators import Mutant, mutants, sample
from tests.mutation.running import ROOT, measure, notices, prepare

SETTINGS = Path(__file__).with_name("core.yaml")
NEEDED = 0.9  # share of the changes that the tests must notice


@dataclass(frozen=True)
class Tally:
    """What became of the changes of a file."""

    file: str
    total: int
    survivors: list[Mutant]
    equivalent: int

    @property
    def killed(self) -> int:
        """How many were noticed."""
        return self.total - len(self.survivors)

    @property
    def rate(self) -> float:
        """Share of the changes that were noticed."""
        return self.killed / self.total if self.total else 1.0


def mirrored(file: str, others: dict[str, list[str]]) -> list[str]:
    """Return the test files of a file of the package: its mirror, and those that the settings name beside it."""
    path = Path(file)
    folder = Path("tests", *path.parent.parts[path.parts[0] == "qwenvl" :])
    mirror = str(folder / f"test_{path.name}")
    return [*([mirror] if (ROOT / mirror).is_file() else []), *(others.get(file) or [])]


def is_equivalent(mutant: Mutant, file: str, known: list[dict[str, str]]) -> bool:
    """Return whether the settings say that a change makes no difference."""
    texts = (file, mutant.function, mutant.before, mutant.after)
    return any(texts == (one["file"], one["function"], one["before"], one["after"]) for one in known)


def examine(file: str, settings: dict[str, Any], options: argparse.Namespace) -> Tally:
    """Try a sample of the changes of a file, and print those that nothing notices."""
    path, tests = ROOT / file, mirrored(file, settings["core"])
    if not tests:
        raise SystemExit(f"error: {file} has no mirrored tests; name its test files in {SETTINGS.relative_to(ROOT)}.")
    baseline = measure(path, tests)
    for name in baseline.failed:
        print(f"left out, as it fails without a change: {name}", flush=True)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    # The sample is drawn before the equivalent ones are taken out: naming one does not draw another in its place.
    drawn = sample(mutants(tree), options.per_file, options.seed)
    meaningful = [mutant for mutant in drawn if not is_equivalent(mutant, file, settings["equivalent"])]
    survivors = []
    for mutant in meaningful:
        chosen = baseline.reaching(mutant.lines)
        limit = options.patience + 5 * sum(baseline.seconds[name] for name in chosen)
        if not chosen or not notices(path, mutant.compiled(tree, str(path)), tests, chosen, limit):
            survivors.append(mutant)
            print(report(mutant, file, len(chosen)), flush=True)
    return Tally(file, len(meaningful), survivors, len(drawn) - len(meaningful))


def report(mutant: Mutant, file: str, tests: int) -> str:
    """Return what a change that nothing notices does."""
    lines = [f"- {line}" for line in mutant.before.splitlines()] + [f"+ {line}" for line in mutant.after.splitlines()]
    noticed = f"{tests} tests run it" if tests else "no test runs it"
    return "\n".join([f"\n{file}:{mutant.lines[0]} {mutant.function or 'module'}: {mutant.kind}, {noticed}", *lines])


def table(tallies: list[Tally]) -> str:
    """Return the counts of each file and of all of them."""
    rows = [f"{'file':40}{'changes':>8}{'killed':>8}{'survived':>10}{'rate':>6}{'equivalent':>12}"]
    for one in [*tallies, together(tallies)]:
        counts = f"{one.total:8}{one.killed:8}{len(one.survivors):10}{one.rate:6.0%}{one.equivalent:12}"
        rows.append(f"{one.file:40}{counts}")
    return "\n".join(rows)


def together(tallies: list[Tally]) -> Tally:
    """Return the sum."""
    survivors = [mutant for tally in tallies for mutant in tally.survivors]
    return Tally("all", sum(t.total for t in tallies), survivors, sum(t.equivalent for t in tallies))


def main() -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", metavar="FILE", help="files of the package; default: those of core.yaml")
    parser.add_argument("--per-file", type=int, default=12, help="changes of a file; 0 for all (default: 12)")
    parser.add_argument("--seed", type=int, default=0, help="another number draws other changes (default: 0)")
    waits = "seconds for tests that do not end, beside five times what they take (default: 20)"
    parser.add_argument("--patience", type=float, default=20.0, help=waits)
    arguments = parser.parse_args()
    settings = yaml.safe_load(SETTINGS.read_text(encoding="utf-8"))
    tallies = []
    with tempfile.TemporaryDirectory(prefix="mutation-") as cache:
        prepare(Path(cache))
        for file in arguments.files or settings["core"]:
            started = time.monotonic()
            tallies.append(examine(file, settings, arguments))
            print(f"{file}: {tallies[-1].rate:.0%} in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    print("\n" + table(tallies))
    return int(together(tallies).rate < NEEDED)


if __name__ == "__main__":
    sys.exit(main())
