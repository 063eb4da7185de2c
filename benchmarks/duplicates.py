r"""Near duplicates: images hashed per second of a core, and the search among a million of them.

    python benchmarks/duplicates.py [--images 2000] [--entries 1000000]

Writes JPEG files of 640 x 480 and one question about each, with copies that are smaller, mirrored or turned, and
reads them as ``tools/check_image.py --duplicates`` does, once afresh and once from the cache. Then searches
``--entries`` images and texts at random with some copies planted. CPU seconds are those of this process alone.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from qwenvl.data.dataset import SampledTable
from qwenvl.data.duplicates.contents import PERMUTATIONS, Contents, read_contents
from qwenvl.data.duplicates.find import find_matches
from qwenvl.data.duplicates.image_hashes import FEATURES, IMAGE, SIDE, VIEWS, features_of_image, in_view
from qwenvl.data.sources.table import open_annotations
from qwenvl.data.types import DatasetSpec

_COPIES = 100
WORDS = np.array([f"word{number}" for number in range(5000)])


def main() -> None:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000, help="number of JPEG files")
    parser.add_argument("--entries", type=int, default=1_000_000, help="number of images in the search")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        reading = time_reading(Path(folder), options.images)
    print(json.dumps({**reading, **time_search(options.entries)}))


def time_reading(folder: Path, count: int) -> dict[str, float]:
    """Return CPU milliseconds of an image and its question, afresh and from the cache, and what is found."""
    rng = np.random.default_rng(0)
    answers = list[str]()
    with (folder / "rows.jsonl").open("w") as file:
        for index in range(count + _COPIES):
            if index < count:
                small = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
                image = Image.fromarray(small).resize((640, 480), Image.Resampling.BICUBIC)
            else:
                copied = Image.open(folder / f"{index - count}.jpg").resize((600, 450))
                image = copied.transpose(list(Image.Transpose)[index % 7])
            image.save(folder / f"{index}.jpg", quality=85)
            words = " ".join(WORDS[rng.integers(0, len(WORDS), 60)])
            answers.append(words if index < count else answers[index - count])
            turns = [{"from": "human", "value": "<image>Describe it."}, {"from": "gpt", "value": answers[-1]}]
            file.write(json.dumps({"image": f"{index}.jpg", "conversations": turns}) + "\n")
    table = open_annotations(DatasetSpec("rows", (str(folder / "rows.jsonl"),), str(folder)), str(folder / "index"))
    rows = SampledTable(table, np.arange(len(table)))
    seconds, contents = [], None
    for _ in range(2):
        started = time.process_time()
        contents = read_contents(rows, (), False, folder / "cache", 0)
        seconds.append((time.process_time() - started) / len(table))
    assert contents is not None
    return {
        "cpu_ms_afresh": round(seconds[0] * 1e3, 3),
        "cpu_ms_from_cache": round(seconds[1] * 1e3, 3),
        "minutes_of_a_million_on_2_cores": round(seconds[0] * 1e6 / 2 / 60, 1),
        "planted": _COPIES,
        "found": len(find_matches([contents])),
    }


def time_search(count: int) -> dict[str, float]:
    """Return the seconds of a search, and what is found of the planted copies."""
    rng = np.random.default_rng(1)
    features = np.zeros(count, FEATURES)
    features["key"], features["kind"] = np.arange(count), IMAGE
    for start in range(0, count, 1 << 16):
        block = features[start : start + (1 << 16)]
        block["hashes"] = rng.integers(0, 256, block["hashes"].shape, dtype=np.uint8)
        block["thumbnail"] = rng.integers(0, 256, block["thumbnail"].shape, dtype=np.uint8)
    for place in range(_COPIES):
        pixels = rng.integers(0, 256, (8, 8), dtype=np.uint8)
        image = Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        features[place] = features_of_image(place, image)
        seen = in_view(np.asarray(image)[None], place % len(VIEWS))[0]
        features[count - _COPIES + place] = features_of_image(count - _COPIES + place, Image.fromarray(seen.copy()))
    signatures = rng.integers(0, 1 << 32, (count, PERMUTATIONS), dtype=np.uint32)
    signatures[count - _COPIES :] = signatures[:_COPIES]
    everything = np.arange(count)
    contents = Contents(
        *(everything, np.zeros(count, np.int64), rng.permutation(count).astype(np.uint64), signatures),
        *(everything.astype(np.uint64), np.ones(count, np.int64), features),
    )
    started, cpu = time.perf_counter(), time.process_time()
    found = len(find_matches([contents]))
    return {
        "entries": count,
        "search_seconds": round(time.perf_counter() - started, 1),
        "search_cpu_seconds": round(time.process_time() - cpu, 1),
        "planted_entries": _COPIES,
        "found_entries": found,
    }


if __name__ == "__main__":
    main()
