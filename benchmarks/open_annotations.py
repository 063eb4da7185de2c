"""Time and memory of opening annotation files, the first time and from a cache.

    python benchmarks/open_annotations.py [--rows 1000000] [--row_bytes 600] [--runs 3] [--full]

Writes one JSON Lines file and one JSON array of conversations to a temporary folder (1.2 GB by default), and opens each
in fresh processes, in turn: by ``json`` into a list, as the official recipe does (a fifth of the rows, unless --full);
by ``datasets.load_dataset("json")``; and by this package. ``first`` starts from an empty cache, ``later`` from that of
``first``; the files are in the machine's page cache. Prints one line of JSON with medians of the runs:

``seconds``, ``cpu_seconds``   from the call to the table, without imports: wall time, and CPU time of all threads
``peak_mib``                   peak memory, minus the memory of the process before the call
``own_mib``                    memory at the end that other processes cannot share: all but pages of mapped files

Ratios are another way's seconds (scaled to the same number of rows) or memory / ours. Needs Linux, as memory is read
from /proc.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sized
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a file, from any directory

WAYS = ("json", "datasets first", "datasets later", "ours first", "ours later")
SHARE = 5  # json parses one of this many rows
WORDS = "a the is on in red small apple table picture left of and shows near large blue two dogs street sign".split()


def write_files(folder: Path, rows: int, row_bytes: int) -> None:
    """Write ``a.jsonl`` and ``a.json``, with the same rows, and ``a_share.*`` with the first of them."""
    generator = random.Random(0)
    for name, count in (("a", rows), ("a_share", rows // SHARE)):
        with open(folder / f"{name}.jsonl", "w") as lines, open(folder / f"{name}.json", "w") as array:
            for number in range(count):
                row = conversation(number, row_bytes, generator)
                lines.write(row + "\n")
                array.write(("[\n" if number == 0 else ",\n") + row)
            array.write("\n]\n")


def conversation(number: int, row_bytes: int, generator: random.Random) -> str:
    """Return one row of JSON of ``row_bytes`` bytes, its newline included."""
    user = {"from": "human", "value": '<image>\nWhat is "this"?'}
    start = json.dumps({"id": f"{number:08d}", "image": f"images/{number:08d}.jpg", "conversations": [user]})
    start = start.removesuffix("]}") + ', {"from": "gpt", "value": "'
    text = " ".join(generator.choices(WORDS, k=row_bytes // 4))
    return start + text[: row_bytes - len(start) - len('"}]}\n')] + '"}]}'


def open_by_json(path: Path, cache: Path) -> Sized:
    """Parse a file into a list, as the official recipe does."""
    with open(path) as file:
        rows: list[Any] = [json.loads(line) for line in file] if path.suffix == ".jsonl" else json.load(file)
    return rows


def open_by_datasets(path: Path, cache: Path) -> Sized:
    """Open a file with the ``datasets`` library, which converts it and maps the result."""
    import datasets

    table: Sized = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(cache))
    return table


def open_by_us(path: Path, cache: Path) -> Sized:
    """Open a file as training does, its hash included."""
    from qwenvl.data.sources.table import open_annotations
    from qwenvl.data.types import DatasetSpec

    table = open_annotations(DatasetSpec("benchmark", (str(path),), ""), str(cache))
    assert table.fingerprint
    return table


OPENERS: dict[str, Callable[[Path, Path], Sized]] = {
    "json": open_by_json,
    "datasets": open_by_datasets,
    "ours": open_by_us,
}


def kibibytes(file: str, key: str) -> int:
    """Return the value of a line in a status file of /proc, in KiB."""
    with open(f"/proc/self/{file}") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def measure_here(opener: Callable[[Path, Path], Sized], path: Path, cache: Path) -> dict[str, float]:
    """Open a file in this process."""
    small = path.with_name(f"warm_up{path.suffix}")
    opener(small, cache / "warm_up")  # imports, and the library's work once per process
    before, own_before = kibibytes("status", "VmRSS"), kibibytes("smaps_rollup", "Anonymous")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak counts from here
    start, start_cpu = time.perf_counter(), time.process_time()
    table = opener(path, cache)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - start_cpu
    return {
        "rows": len(table),
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_mib": (kibibytes("status", "VmHWM") - before) / 1024,
        "own_mib": (kibibytes("smaps_rollup", "Anonymous") - own_before) / 1024,
    }


def measure_apart(way: str, path: Path, cache: Path) -> dict[str, float]:
    """Open a file in a fresh process."""
    command = [sys.executable, __file__, "--measure", way.split()[0], str(path), str(cache)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, float] = json.loads(done.stdout)
    print(f"{path.name} {way}: {measured['seconds']:.2f} s, {measured['peak_mib']:.0f} MiB", file=sys.stderr)
    return measured


def compare(folder: Path, suffix: str, runs: int, full: bool) -> dict[str, Any]:
    """Measure all ways in turn, and return medians and ratios."""
    write_warm_up(folder, suffix)
    measured: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for run in range(runs):
        for way in WAYS:
            share = way == "json" and not full
            path = folder / f"{'a_share' if share else 'a'}{suffix}"
            measured[way].append(measure_apart(way, path, folder / f"cache {run} {suffix}"))
    result: dict[str, Any] = {
        way: {key: round(statistics.median(one[key] for one in all_runs), 3) for key in all_runs[0]}
        for way, all_runs in measured.items()
    }
    rows = result["ours first"]["rows"]
    ratios = {}
    for other, ours in (
        ("json", "ours first"),
        ("datasets first", "ours first"),
        ("json", "ours later"),
        ("datasets later", "ours later"),
    ):
        scale = rows / result[other]["rows"]
        ratios[f"{other} / {ours}"] = {
            key: round(scale * result[other][key] / max(result[ours][key], 0.001), 1)
            for key in ("seconds", "cpu_seconds", "peak_mib")
        }
    return {**result, "ratios": ratios}


def write_warm_up(folder: Path, suffix: str) -> None:
    """Write a file of a few rows."""
    rows = [conversation(number, 300, random.Random(0)) for number in range(3)]
    text = "\n".join(rows) if suffix == ".jsonl" else "[" + ",\n".join(rows) + "]"
    (folder / f"warm_up{suffix}").write_text(text)


def main() -> None:
    """Run the benchmark, or one measurement of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--row_bytes", type=int, default=600)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--full", action="store_true", help="let json parse all rows: 2 GB of memory for a million")
    parser.add_argument("--folder", default=None, help="folder for the files; a temporary one if left out")
    parser.add_argument("--measure", nargs=3, metavar=("WAY", "PATH", "CACHE"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        way, path, cache = arguments.measure
        print(json.dumps(measure_here(OPENERS[way], Path(path), Path(cache))))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="open_annotations_") as name:
        print("Writing the files.", file=sys.stderr)
        write_files(Path(name), arguments.rows, arguments.row_bytes)
        result = {suffix: compare(Path(name), suffix, arguments.runs, arguments.full) for suffix in (".jsonl", ".json")}
    sizes = {"rows": arguments.rows, "row_bytes": arguments.row_bytes, "runs": arguments.runs}
    print(json.dumps({"benchmark": "open_annotations", **sizes, **result}))


if __name__ == "__main__":
    main()
