"""Files per second that tools/check_image.py checks, by their headers and decoded.

    python benchmarks/check_image.py [--files 20000] [--runs 3]

Writes JPEG files of 320 x 240 pixels, copies of eight drawn ones, with an annotation file, into a temporary folder,
and runs the tool on them: all its work except the start of Python, with files in the page cache and one process per
core. Prints one line of JSON: files per second, and the ratio to a plain loop over the same annotations in the same
run, which parses each line and opens and loads the image with Pillow. Files per CPU-second (of all processes together)
are steadier if others use the machine; on an idle machine they are files per second and core.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image, ImageFilter

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run as a file, from any directory

from qwenvl.cli.check_image.command import main as check_image
from qwenvl.utils.cores import available_cores

ORIGINALS = 8
BASELINE_FILES = 2000


def write_data(folder: Path, files: int) -> None:
    """Write ``files`` images and ``a.jsonl`` with a question about each."""
    (folder / "media").mkdir()
    originals = []
    for number in range(ORIGINALS):
        stream = io.BytesIO()
        noise = Image.effect_noise((320 + 16 * number, 240), 90).filter(ImageFilter.GaussianBlur(3))
        noise.convert("RGB").save(stream, "JPEG", quality=85)
        originals.append(stream.getvalue())
    with (folder / "a.jsonl").open("w") as annotations:
        for number in range(files):
            (folder / "media" / f"{number}.jpg").write_bytes(originals[number % ORIGINALS])
            turns = [
                {"from": "human", "value": f"<image>\nWhat does picture {number} show? Answer in a sentence."},
                {"from": "gpt", "value": f"Grey noise of no particular shape, the {number}th of its kind in this set."},
            ]
            row = {"id": str(number), "image": f"{number}.jpg", "conversations": turns}
            annotations.write(json.dumps(row) + "\n")


def run_tool(folder: Path, *flags: str) -> tuple[float, float]:
    """Return the seconds and the CPU-seconds of a check.

    Raises:
        RuntimeError: It reported a problem, although there is none.
    """
    paths = ["--annotation_path", str(folder / "a.jsonl"), "--data_path", str(folder / "media")]
    started, used = time.perf_counter(), cpu_seconds()
    with contextlib.redirect_stdout(io.StringIO()) as output:
        code = check_image([*paths, "--output", str(folder), "--data_cache_dir", str(folder / "cache"), *flags])
    if code:
        raise RuntimeError(output.getvalue())
    return time.perf_counter() - started, cpu_seconds() - used


def cpu_seconds() -> float:
    """Return the CPU-seconds of this process and its ended children."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def run_plainly(folder: Path) -> tuple[float, float]:
    """Return the seconds and CPU-seconds that Pillow takes to open and load the first images, one by one."""
    started, used = time.perf_counter(), cpu_seconds()
    with (folder / "a.jsonl").open() as lines:
        for _, line in zip(range(BASELINE_FILES), lines, strict=False):
            with Image.open(folder / "media" / json.loads(line)["image"]) as image:
                image.load()
    return time.perf_counter() - started, cpu_seconds() - used


def main() -> None:
    """Measure, and print the figures."""
    parser = argparse.ArgumentParser(description="Files per second that tools/check_image.py checks.")
    parser.add_argument("--files", type=int, default=20_000)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    files, cores = arguments.files, available_cores()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_data(folder, files)
        run_tool(folder)  # imports, the index of the annotations, the page cache
        runs = []
        for number in range(arguments.runs):
            runs.append((run_tool(folder), run_tool(folder, "--decode"), run_plainly(folder)))
            print(f"run {number + 1} of {arguments.runs}", file=sys.stderr)
    headers, decoded, plain = (
        [count / statistics.median(run[mode][clock] for run in runs) for clock in (0, 1)]
        for mode, count in enumerate((files, files, min(BASELINE_FILES, files)))
    )
    figures = {
        "benchmark": "check_image",
        "files": files,
        "cores": cores,
        "files_per_second": round(headers[0]),
        "files_per_second_decoded": round(decoded[0]),
        "pillow_open_and_load_per_second": round(plain[0]),
        "files_per_cpu_second": round(headers[1]),
        "files_per_cpu_second_decoded": round(decoded[1]),
        "pillow_open_and_load_per_cpu_second": round(plain[1]),
        "ratio": round(headers[0] / plain[0], 2),
        "ratio_of_cpu_seconds": round(headers[1] / plain[1], 2),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
