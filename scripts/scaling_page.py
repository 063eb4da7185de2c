#!/usr/bin/env python
"""Write the tables of docs/scaling.md: ``python scripts/scaling_page.py CONFIGS [MODEL ...]``.

CONFIGS is a folder with the published ``config.json`` files, named after their models. The text around the tables is
written by hand; each table follows a line ``<!-- MODEL -->``. Takes some minutes, as the step of each model is run on
torch's meta device.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any directory
from qwenvl.cli.advise.choice import Limits, choose
from qwenvl.cli.advise.command import AdviseArguments, limits_of, open_estimator
from qwenvl.cli.advise.estimate import Estimate

PAGE = Path(__file__).resolve().parents[1] / "docs" / "scaling.md"
MODELS = (
    *("Qwen3-VL-2B-Instruct", "Qwen3-VL-8B-Instruct", "Qwen3-VL-32B-Instruct"),
    *("Qwen3-VL-30B-A3B-Instruct", "Qwen3-VL-235B-A22B-Instruct", "Qwen3.5-9B"),
)
COUNTS = (1, 8, 64)
GPUS = ("RTX-4090-24G", "L40S-48G", "H100-80G", "H200-141G")
KINDS = ("all parts", "language, merger", "LoRA", "QLoRA")


def table_of(config: Path) -> str:
    """Return the Markdown table of a model."""
    lines = ["| GPUs | " + " | ".join(KINDS) + " |", "|---|" + "---|" * len(KINDS)]
    first = AdviseArguments(model=str(config), gpus=GPUS[0], options=1)
    estimator = open_estimator(first)
    for count in COUNTS:
        for gpu in GPUS:
            limits = limits_of(AdviseArguments(model=str(config), gpus=f"{count}x{gpu}", options=1))
            advice = choose(estimator, limits, KINDS)
            cells = [
                _cell(advice.fitting[kind][0], limits) if kind in advice.fitting else f"*{advice.missing[kind]}*"
                for kind in KINDS
            ]
            lines.append(f"| {count} x {gpu} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(estimate: Estimate, limits: Limits) -> str:
    candidate = estimate.candidate
    parts = [candidate.engine.name, f"{estimate.all / 2**30:.0f} GiB"]
    parts += [f"+ {estimate.host / 2**30:.0f} on the host"] if estimate.host else []
    parts += [] if candidate.recompute else ["no checkpointing"]
    parts += [f"packs of {candidate.pack:,}"] if candidate.pack != limits.pack else []
    return ", ".join([*parts, f"{estimate.hours:.2g} h"])


def replace_table(page: str, model: str, table: str) -> str:
    """Return the page with another table of a model."""
    pattern = rf"(<!-- {re.escape(model)} -->\n)(?:\|.*\n)*"
    return re.sub(pattern, lambda found: f"{found[1]}{table}\n", page)


def main() -> None:
    """Write the page's tables."""
    folder, *models = sys.argv[1:]
    for model in models or MODELS:
        table = table_of(Path(folder) / f"{model}.json")
        PAGE.write_text(replace_table(PAGE.read_text(encoding="utf-8"), model, table), encoding="utf-8")


if __name__ == "__main__":
    main()
