"""Drawn scenes with captions, questions and chats about them, and the same facts in words, for the connector lab."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from qwenvl.cli.make_demo_data.drawing import COLOURS, SHAPES, fill

SCENE_PIXELS = 64
PLACES = {"top left": (0, 0), "top right": (1, 0), "bottom left": (0, 1), "bottom right": (1, 1)}

DESCRIBE = "Describe the picture."
QUESTIONS = {"colour": "Which colour is it?", "shape": "Which shape is it?", "place": "Where is it?"}
REQUESTS = {
    "Name the colour, then the place.": "{colour}, {place}",
    "Name the place, then the shape.": "{place}, {shape}",
    "Name the shape, then the colour.": "{shape}, {colour}",
}

Record = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Scene:
    """Content of an image: one shape of a colour at a place."""

    colour: str
    shape: str
    place: str

    @property
    def caption(self) -> str:
        """Caption of the scene."""
        return f"a {self.colour} {self.shape} at the {self.place}"

    def say(self, pattern: str) -> str:
        """Return a pattern with the facts of the scene filled in."""
        return pattern.format(colour=self.colour, shape=self.shape, place=self.place)


def draw_scene(rng: np.random.Generator) -> Scene:
    """Choose the content of an image at random."""
    return Scene(*(str(rng.choice(list(names))) for names in (COLOURS, SHAPES, PLACES)))


def draw_image(scene: Scene, rng: np.random.Generator) -> Image.Image:
    """Return an RGB image of 64 x 64 pixels: one shape at a random place in its quarter, on light grey."""
    ground = int(rng.integers(215, 256))
    image = Image.new("RGB", (SCENE_PIXELS, SCENE_PIXELS), (ground, ground, ground))
    half = SCENE_PIXELS // 2
    side = int(rng.integers(18, 29))
    column, row = PLACES[scene.place]
    left, top = (half * step + int(rng.integers(0, half - side + 1)) for step in (column, row))
    fill(ImageDraw.Draw(image), scene.shape, COLOURS[scene.colour], (left, top, left + side, top + side))
    return image


def write_captions(output: Path, split: str, count: int, rng: np.random.Generator) -> Iterator[Record]:
    """Write scenes to be described."""
    for name, image, scene in _scenes(output, "captions", split, count, rng):
        yield _record(name, image, [(DESCRIBE, scene.caption)])


def write_questions(output: Path, split: str, count: int, rng: np.random.Generator) -> Iterator[Record]:
    """Write scenes with one question."""
    for name, image, scene in _scenes(output, "questions", split, count, rng):
        fact = str(rng.choice(list(QUESTIONS)))
        yield _record(name, image, [(QUESTIONS[fact], getattr(scene, fact))])


def write_chats(output: Path, split: str, count: int, rng: np.random.Generator) -> Iterator[Record]:
    """Write scenes with two requests that specify the form of the answer."""
    for name, image, scene in _scenes(output, "chats", split, count, rng):
        chosen = rng.permutation(list(REQUESTS))[:2]
        yield _record(name, image, [(str(request), scene.say(REQUESTS[str(request)])) for request in chosen])


def write_texts(output: Path, split: str, count: int, rng: np.random.Generator) -> Iterator[Record]:
    """Yield the same tasks about scenes described in words instead of an image, to train the language model.

    The facts come in random order, so that the model learns to find them.
    """
    del output
    for number in range(count):
        scene = draw_scene(rng)
        told = ", ".join(rng.permutation([scene.colour, scene.shape, scene.place]))
        asked = {DESCRIBE: scene.caption} | {QUESTIONS[fact]: getattr(scene, fact) for fact in QUESTIONS}
        asked |= {request: scene.say(pattern) for request, pattern in REQUESTS.items()}
        question = DESCRIBE if rng.random() < 0.4 else str(rng.choice(list(asked)))
        yield {"id": f"texts-{split}-{number:04d}", "conversations": _turns(f"{told}\n{question}", asked[question])}


def _scenes(
    output: Path, task: str, split: str, count: int, rng: np.random.Generator
) -> Iterator[tuple[str, str, Scene]]:
    """Draw and write scenes; yield the id, the image's path and the scene of each."""
    folder = output / "media" / f"{task}_{split}"
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        scene = draw_scene(rng)
        path = folder / f"{number:04d}.png"
        draw_image(scene, rng).save(path)
        yield f"{task}-{split}-{number:04d}", path.relative_to(output).as_posix(), scene


def _record(name: str, image: str, turns: list[tuple[str, str]]) -> Record:
    (question, answer), *others = turns
    more = [turn for pair in others for turn in _turns(*pair)]
    return {"id": name, "image": image, "conversations": _turns(f"<image>\n{question}", answer) + more}


def _turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
