"""Peak memory of a training step by the flags that are there to save it.

    python benchmarks/memory.py [--size tiny|2b|4b|8b] [--pack_length 8192] [--samples 48] [--device cuda]

The step is that of ``benchmarks/step.py``, all parts trained unless a row says otherwise; each row runs in a process of
its own. Memory is the device's, on the CPU the process's with all that Python takes. Prints a line of JSON a row: its
flags, GiB, the share of the first row's, seconds a step and the share of the first row's.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any directory

from benchmarks.step import in_new_process, measure
from benchmarks.step_samples import SIZES

ROWS: dict[str, dict[str, Any]] = {
    "padded, full logits": {"way": "plain", "checkpointing": None},
    "packed, logits in chunks": {"checkpointing": None},
    "--gradient_checkpointing vision": {"checkpointing": "vision"},
    "--gradient_checkpointing language": {"checkpointing": "language"},
    "--gradient_checkpointing both": {"checkpointing": "both"},
    "both, --tune_mm_vision False": {"checkpointing": "both", "frozen_vision": True},
    "both, --lora_enable True --lora_r 16": {"checkpointing": "both", "lora_r": 16},
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="tiny")
    parser.add_argument("--pack_length", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    first: tuple[float, float] | None = None
    for name, changes in ROWS.items():
        settings = {"steps": 1, "frozen_vision": False, "lora_r": 0, **vars(arguments), **changes}
        result = in_new_process(measure, settings.pop("way", "ours"), argparse.Namespace(**settings))
        seconds = statistics.median(result.seconds)
        first = first or (result.peak_gib, seconds)
        row = {
            "row": name,
            "peak_gib": round(result.peak_gib, 2),
            "share_of_memory": round(result.peak_gib / first[0], 2),
            "seconds_a_step": round(seconds, 2),
            "share_of_time": round(seconds / first[1], 2),
        }
        sys.stdout.write(json.dumps(row) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
