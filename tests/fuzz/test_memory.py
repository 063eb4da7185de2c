"""What hostile input may cost in memory, measured in a process of its own."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.data.images import encoded, picture
from tests.e2e.runs import REPOSITORY
from tests.fuzz.test_annotations import repeating
from tests.fuzz.test_media import jpeg_of, png_of, webp_of

BOUND_MIB = 400
"""Above what the same command takes for one harmless row. Measured: 250, most of it for the line of 64 MB."""

CHECK = """
import sys
from qwenvl.cli.check_image.command import main

def peak():  # of this program; ru_maxrss starts with that of the one that forked it
    line = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) // 1024

registry, output = sys.argv[1:]
for name in ("harmless", "hostile", "repeating"):
    main(["--dataset_use", name, "--dataset_registry", registry, "--output", f"{output}/{name}", "--decode",
          "--workers", "0"])
    print("peak", peak())
"""


def row(image: str, text: str = "What?") -> str:
    turns = [{"from": "human", "value": f"<image>\n{text}"}, {"from": "gpt", "value": "Noise."}]
    return json.dumps({"image": image, "conversations": turns})


def hostile_rows(folder: Path) -> list[str]:
    """Write files that claim or hold far too much, and return rows that name them."""
    bombs = {"a.png": png_of(60_000, 60_000), "b.jpg": jpeg_of(65_500, 65_500), "c.webp": webp_of(16_000, 16_000)}
    for name, content in bombs.items():
        (folder / name).write_bytes(content)
    with (folder / "sparse.png").open("wb") as file:  # a picture, then nothing for 40 GB
        file.write(encoded(picture(), "PNG"))
        file.truncate(40 << 30)
    with (folder / "sparse.mp4").open("wb") as file:
        file.write(b"\x00\x00\x00\x18ftypmp42\x00\x00\x00\x00mp42isom")
        file.truncate(40 << 30)
    video = {
        "video": "sparse.mp4",
        "conversations": [{"from": "human", "value": "<video>"}, {"from": "gpt", "value": "x"}],
    }
    embedded = "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + bytes(8 << 20)).decode()
    deep = "[" * 100_000 + "]" * 100_000
    return [
        *map(row, [*bombs, "sparse.png", embedded]),
        json.dumps(video),
        row("good.png", "x" * (64 << 20)),
        f'{{"image": {deep}, "conversations": []}}',
        f'{{"image": "good.png", "conversations": {"9" * 100_000}}}',
    ]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc")
def test_memory_is_bounded(tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(encoded(picture(), "PNG"))
    sets = {"harmless": [row("good.png")], "hostile": hostile_rows(tmp_path)}
    for name, rows in sets.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    files = {name: tmp_path / f"{name}.jsonl" for name in sets} | {"repeating": tmp_path / "repeating.parquet"}
    files["repeating"].write_bytes(repeating(length=8 << 20, times=300))
    entries = {name: {"annotation_path": str(file), "data_path": str(tmp_path)} for name, file in files.items()}
    (tmp_path / "registry.py").write_text(f"data_dict = {entries!r}")
    command = [sys.executable, "-c", CHECK, str(tmp_path / "registry.py"), str(tmp_path / "out")]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    before, *after = (int(line.split()[1]) for line in done.stdout.splitlines() if line.startswith("peak"))
    assert len(after) == 2 and after[-1] - before < BOUND_MIB, (before, after)
    found = [
        json.loads(line) for line in (tmp_path / "out" / "hostile" / "hostile_problems.jsonl").read_text().splitlines()
    ]
    assert {problem["line"] for problem in found} >= {1, 2, 3, 4, 5, 6, 8, 9}, done.stdout[-2000:]
