"""Drawn scenes of several shapes, with a mask of each shape."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from qwenvl.cli.make_demo_data.drawing import COLOURS, SHAPES, Box, fill

SCENE_SIZE = (128, 192)  # height, width: 4 x 6 merged patches of Qwen3-VL
_PAPER = (245, 245, 245)


@dataclass(frozen=True)
class Shape:
    """One shape of a scene.

    Args:
        name: Colour and shape, such as "red circle".
        mask: Pixels of the shape, bool [height, width].
    """

    name: str
    mask: np.ndarray


def draw_scene(rng: np.random.Generator, count: int) -> tuple[Image.Image, list[Shape]]:
    """Draw shapes of different colours that do not touch each other.

    Args:
        rng: Random generator.
        count: Number of shapes.

    Returns:
        The image, and its shapes in the order of drawing, which is independent of their places.
    """
    image = Image.new("RGB", (SCENE_SIZE[1], SCENE_SIZE[0]), _PAPER)
    boxes: list[Box] = []
    shapes = []
    for colour in rng.permutation(list(COLOURS))[:count]:
        box = _free_box(rng, boxes)
        boxes.append(box)
        shape = str(rng.choice(SHAPES))
        fill(ImageDraw.Draw(image), shape, COLOURS[str(colour)], box)
        alone = Image.new("L", image.size)
        fill(ImageDraw.Draw(alone), shape, 255, box)
        shapes.append(Shape(f"{colour} {shape}", np.asarray(alone) > 0))
    return image, shapes


def _free_box(rng: np.random.Generator, taken: list[Box]) -> Box:
    """Draw a square box (left, top, right, bottom; pixels) at least 5 pixels away from the others."""
    while True:
        side = int(rng.integers(36, 64))
        left = int(rng.integers(0, SCENE_SIZE[1] - side + 1))
        top = int(rng.integers(0, SCENE_SIZE[0] - side + 1))
        box = (left, top, left + side, top + side)
        if all(
            box[0] > other[2] + 4 or other[0] > box[2] + 4 or box[1] > other[3] + 4 or other[1] > box[3] + 4
            for other in taken
        ):
            return box
