r"""Make drawn scenes with a mask for each phrase of their captions, as training data for grounding.

    python tools/make_mask_data.py --output DIR [--train 2000] [--heldout 200] [--seed 0]

Writes ``scenes_train.jsonl`` and ``scenes_heldout.jsonl``: images of two shapes, the question what is drawn, a caption
such as "a red circle and a blue square" (in either order) and ``masks``. The same arguments give the same files.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from qwenvl.cli.make_demo_data.masked_scenes import draw_scene
from qwenvl.tasks.grounding.masks import mask_of

QUESTION = "<image>\nWhat is drawn?"


def make_masks(output: Path, split: str, count: int, seed: int) -> None:
    """Write the images and annotations of one split.

    Args:
        output: Folder to write to.
        split: ``train`` or ``heldout``.
        count: Number of scenes.
        seed: Seed of the random generator; each split has its own stream.
    """
    rng = np.random.default_rng([seed, len(split)])
    folder = output / "media" / f"scenes_{split}"
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        image, shapes = draw_scene(rng, 2)
        path = folder / f"{number:04d}.png"
        image.save(path)
        caption = " and ".join(f"a {shape.name}" for shape in shapes)
        masks: list[dict[str, Any]] = []
        for shape in shapes:
            mask = mask_of(shape.mask)
            masks.append(
                {"phrase": f"a {shape.name}", "segmentation": {"size": list(mask.size), "counts": list(mask.runs)}}
            )
        turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": caption}]
        record = {"id": f"scene-{split}-{number:04d}", "image": path.relative_to(output).as_posix()}
        lines.append(json.dumps({**record, "conversations": turns, "masks": masks}) + "\n")
    (output / f"scenes_{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Write both splits."""
    parser = argparse.ArgumentParser(description="Make drawn scenes with masks.")
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument("--train", default=2000, type=int, help="training scenes")
    parser.add_argument("--heldout", default=200, type=int, help="held-out scenes")
    parser.add_argument("--seed", default=0, type=int, help="seed of the random generator")
    arguments = parser.parse_args(argv)
    for split, count in (("train", arguments.train), ("heldout", arguments.heldout)):
        make_masks(arguments.output, split, count, arguments.seed)
    sys.stdout.write(f"{arguments.output}: {arguments.train} training scenes, {arguments.heldout} held-out scenes\n")
    return 0
