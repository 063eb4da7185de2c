"""The demo's drawn images and clips: shapes on a coarse grid, and a moving square."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

SHAPE_PIXELS = 128  # 4 x 4 merged patches
GRID_PIXELS = 16  # a grid, so that boxes contain few different numbers
CLIP_PIXELS = 64
CLIP_FRAMES = 8
CLIP_FPS = 4

COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 90, 200),
    "yellow": (240, 200, 20),
    "purple": (130, 50, 160),
    "black": (0, 0, 0),
}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

Box = tuple[int, int, int, int]


def draw_box(rng: np.random.Generator) -> Box:
    """Draw one square box (left, top, right, bottom; pixels), two or three steps of the grid wide."""
    side = GRID_PIXELS * int(rng.integers(2, 4))
    left, top = (GRID_PIXELS * int(rng.integers(0, (SHAPE_PIXELS - side) // GRID_PIXELS + 1)) for _ in range(2))
    return left, top, left + side, top + side


def draw_shape(shape: str, colour: tuple[int, int, int], box: Box) -> Image.Image:
    """Return an RGB image of 128 x 128 pixels with one shape in it."""
    image = Image.new("RGB", (SHAPE_PIXELS, SHAPE_PIXELS), (245, 245, 245))
    fill(ImageDraw.Draw(image), shape, colour, box)
    return image


def fill(draw: ImageDraw.ImageDraw, shape: str, colour: tuple[int, int, int] | int, box: Box) -> None:
    """Fill a shape that touches all four edges of its box; the last row and column of pixels are inside."""
    left, top, right, bottom = box[0], box[1], box[2] - 1, box[3] - 1
    if shape == "circle":
        draw.ellipse((left, top, right, bottom), fill=colour)
    elif shape == "square":
        draw.rectangle((left, top, right, bottom), fill=colour)
    else:
        draw.polygon([((left + right) / 2, top), (left, bottom), (right, bottom)], fill=colour)


def moving_square(direction: str, colour: tuple[int, int, int], rng: np.random.Generator) -> np.ndarray:
    """Return the frames of a clip, uint8 [8, 64, 64, 3]; the square crosses most of the image."""
    side, speed = int(rng.integers(14, 19)), 6
    travel = speed * (CLIP_FRAMES - 1)
    step_x, step_y = DIRECTIONS[direction]
    frames = np.full((CLIP_FRAMES, CLIP_PIXELS, CLIP_PIXELS, 3), 245, dtype=np.uint8)
    left, top = (
        int(rng.integers(travel if step < 0 else 0, CLIP_PIXELS - side - (travel if step > 0 else 0) + 1))
        for step in (step_x, step_y)
    )
    for index, frame in enumerate(frames):
        x, y = left + step_x * speed * index, top + step_y * speed * index
        frame[y : y + side, x : x + side] = colour
    return frames


def write_clip(path: Path, frames: np.ndarray) -> None:
    """Encode frames as H.264 by the encoder inside PyAV, which needs no FFmpeg on the system."""
    # No look-ahead: with it, x264 sometimes encodes the same small frames to different bytes.
    options = {"crf": "18", "threads": "1", "x264-params": "rc-lookahead=0:sync-lookahead=0:mbtree=0"}
    with av.open(str(path), mode="w") as container:
        stream = container.add_stream("libx264", rate=Fraction(CLIP_FPS), options=options)
        stream.width, stream.height, stream.pix_fmt = CLIP_PIXELS, CLIP_PIXELS, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
