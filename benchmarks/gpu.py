"""Prove on one GPU what a CPU cannot: the same numbers, no waits, every engine and method, speed and memory.

    python benchmarks/gpu.py --output DIR [--minutes 8] [--part NAME ...] [--rehearse]

Is meant to take 25 minutes at most on an H100 or H200, no network, and nothing but the repository and its packages.
Every item of a part runs in a process of its own; one that fails is written down with its error, and the others go on.
Items that are done stand in ``DIR/state.json`` and are not run again: with ``--minutes 8`` the call ends after 8
minutes, an item that would not be done by then is left out, and the same command goes on where it stopped.
``report.md`` and ``report.json``, written after each item, have device and versions, a verdict by target, and a table
of all items. ``--part`` runs the named parts anew. Checkpoints and data of a run are in ``--work``, which takes 40 GB;
what later calls do not find there, they make again.

``--rehearse`` runs tiny sizes on the CPU: whether the parts work, not how fast.

    doctor     tools/doctor.py
    equality   loss and gradients in float32, CPU against GPU, of tiny models of each family
    waits      waits of the host in a micro-batch: the sync counter, and torch.cuda.set_sync_debug_mode("error")
    attention  sample by sample, by one varlen call, and by flash-attention: outputs, gradients, seconds
    step       an optimizer step at 2B, 4B and 8B: ours, the stock path, and the stock path with sorted samples
    train      training at 2B and 8B by the command line: speed, peak memory against --dry_run, seconds of saving
    engines    tiny training by every engine on one rank, stopped by SIGTERM and resumed, against one not stopped
    methods    LoRA, QLoRA, 8-bit AdamW, Liger, torch.compile, flash-attention 2 and 3, where installed

Exit code 1 if an item failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any directory

from benchmarks.gpu_parts import attention, correctness, engines, methods, runs, steps
from benchmarks.gpu_parts.base import REPOSITORY, Part, Place, Row, SkippedError
from benchmarks.gpu_parts.verdict import as_markdown, describe_machine, ratios, verdicts
from qwenvl.utils.cores import available_cores

PARTS: dict[str, Part] = {
    "doctor": correctness.MACHINE,
    "equality": correctness.EQUALITY,
    "waits": correctness.WAITS,
    "attention": attention.PART,
    "step": steps.PART,
    "train": runs.PART,
    "engines": engines.PART,
    "methods": methods.PART,
}
"""Parts in their order, so that a run that is cut short has what only a GPU can tell."""
_RESULT = "QWENVL_RESULT "
"""Start of the line on which the process of an item prints its figures."""


def parse() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", required=True, type=Path, help="folder of state.json, report.md and report.json")
    parser.add_argument("--work", type=Path, help="folder of checkpoints and data; default: in the temporary folder")
    parser.add_argument(
        "--part", nargs="+", choices=PARTS, metavar="NAME", help=f"parts to run anew: {', '.join(PARTS)}"
    )
    parser.add_argument("--minutes", type=float, default=30.0, help="end after this time; at least 8")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes on the CPU")
    parser.add_argument("--item", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Run what is not done, write the report, and return the exit code."""
    arguments = parse()
    kind = "rehearsal" if arguments.rehearse else "gpu"
    place = Place(arguments.work or Path(tempfile.gettempdir()) / f"qwenvl-{kind}", arguments.rehearse)
    if arguments.item:
        run_item(place, arguments.item)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that processes of items end, too
    arguments.output.mkdir(parents=True, exist_ok=True)
    state = arguments.output / "state.json"
    items: dict[str, Row] = json.loads(state.read_text()) if state.exists() else {}
    ends = time.monotonic() + 60 * arguments.minutes
    machine = describe_machine()
    left = []
    for group in _groups(place, arguments.part, items):
        if time.monotonic() + PARTS[_part_of(group[0])].usual > ends:
            left += group
            continue
        for name, row in zip(group, at_once(place, group, ends), strict=True):
            if row is None:
                left.append(name)
            else:
                items[name] = row
                print(f"{name}: {row['status']}", flush=True)
        state.write_text(json.dumps(items, indent=1))
        write_report(arguments.output, items, machine)
    if left:
        print(f"The time is over; run the same command again for {', '.join(left)}.")
    write_report(arguments.output, items, machine)
    return int(any(row["status"] == "failed" for row in items.values()))


def _groups(place: Place, anew: Sequence[str] | None, done: Mapping[str, Row]) -> Iterator[list[str]]:
    """Yield the names of items to run at the same time, of the parts to run anew or else of what is not done."""
    for part in anew or PARTS:
        wanted = [item for item in PARTS[part].items_at(place) if anew or f"{part}/{item}" not in done]
        yield from ([f"{part}/{item}" for item in group] for group in PARTS[part].groups(wanted, available_cores()))


def _part_of(name: str) -> str:
    return name.partition("/")[0]


def at_once(place: Place, names: Sequence[str], ends: float) -> list[Row | None]:
    """Run items at the same time; return their figures, or their errors; None for one that had too little time.

    Args:
        place: Where to run.
        names: Items, as ``part/item``.
        ends: Time at which all have to be done, by the monotonic clock.
    """
    started = time.monotonic()
    processes = [_start(place, name) for name in names]
    try:
        with ThreadPoolExecutor(len(names)) as pool:
            waiting = [
                pool.submit(wait_for, process, PARTS[_part_of(name)].seconds, started, ends)
                for name, process in zip(names, processes, strict=True)
            ]
            return [one.result() for one in waiting]
    finally:
        for process in processes:
            _end(process)


def _start(place: Place, name: str) -> subprocess.Popen[str]:
    """Start an item in a process of its own."""
    command = [sys.executable, __file__, "--output", os.devnull, "--work", str(place.work), "--item", name]
    command += ["--rehearse"] if place.rehearsal else []
    paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]  # packages may lie on the second
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(paths)}
    if place.rehearsal:
        environment |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command,
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for(process: subprocess.Popen[str], limit: float, started: float, ends: float) -> Row | None:
    """Return the figures of an item, or its error; None if it was stopped as the time of all is over."""
    try:
        printed, _ = process.communicate(timeout=max(0.0, min(started + limit, ends) - time.monotonic()))
        row = _read(printed, process.returncode)
    except subprocess.TimeoutExpired:
        _end(process)
        if started + limit > ends:
            return None
        row = {"status": "failed", "error": f"stopped after its limit of {limit:g} s"}
    return {**row, "seconds": round(time.monotonic() - started, 1)}


def _end(process: subprocess.Popen[str]) -> None:
    """End a process and what it started, if it runs."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def _read(printed: str, code: int) -> Row:
    found = [line for line in printed.splitlines() if line.startswith(_RESULT)]
    if code or not found:
        return {"status": "failed", "error": f"exit code {code}: {printed[-2000:]}"}
    row: Row = json.loads(found[-1].removeprefix(_RESULT))
    status = "skipped" if "skipped" in row else "failed" if row.get("passed") is False else "done"
    return {"status": status, **row}


def run_item(place: Place, name: str) -> None:
    """Run an item in this process, and print its figures."""
    part, _, item = name.partition("/")
    place.work.mkdir(parents=True, exist_ok=True)
    try:
        row = PARTS[part].run(place, item)
    except SkippedError as reason:
        row = {"skipped": str(reason)}
    print(f"\n{_RESULT}{json.dumps(row)}", flush=True)


def write_report(output: Path, items: Mapping[str, Row], machine: Row) -> None:
    """Write the report as Markdown and as JSON."""
    ordered = {name: row for part in PARTS for name, row in items.items() if name.startswith(f"{part}/")}
    report: dict[str, Any] = {
        "machine": machine,
        "verdicts": [list(row) for row in verdicts(ordered, machine["device"])],
        "ratios": ratios(ordered),
        "items": ordered,
    }
    (output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (output / "report.md").write_text(as_markdown(report))


if __name__ == "__main__":
    sys.exit(main())
