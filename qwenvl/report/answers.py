"""Answers to the same questions at successive evaluations, beside the images and videos of their samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import chain, zip_longest

import numpy as np
from PIL import Image

from qwenvl.evaluate.answer_log import FILE_NAME, Answered
from qwenvl.inference.other_images import Key, key_of
from qwenvl.metrics.boxes import read_boxes
from qwenvl.metrics.predictions import Prediction
from qwenvl.metrics.text import final_answer
from qwenvl.report.html import shorten
from qwenvl.report.images import SHOWN_FRAMES, image_tag, with_boxes

SAMPLES = 8
"""Most samples that are shown."""

STEPS = 6
"""Most evaluations of which answers are shown: the first, the last, and some between them."""

LONGEST_TEXT = 300
"""Characters of a question or answer that are shown."""

_SIDE = 256  # pixels; the page draws images smaller than that


@dataclass(frozen=True)
class Medium:
    """An image or video of a sample.

    Args:
        frames: Frames as the model gets them; an image has one.
    """

    frames: tuple[Image.Image, ...]


OpenMedia = Callable[[Prediction], Sequence[Medium] | str]
"""Returns the media of a sample, or the reason why they cannot be shown."""


def answers_section(answers: Sequence[Answered], open_media: OpenMedia) -> str:
    """Return the samples with their answers over time, or a note on how to get answers.

    Args:
        answers: Answers of all evaluations.
        open_media: Function that opens the media of a sample; called for the samples that are shown.
    """
    if not answers:
        text = (
            '<p class="note">None: <code>--eval_generate 100</code> lets the model answer that many held-out samples '
            "at every evaluation, shows some of them here, and adds scores to the curves.</p>"
        )
        return f'<section class="panel"><h2>Answers over time</h2>{text}</section>'
    steps = sorted({one.step for one in answers})
    shown = [steps[place] for place in np.unique(np.linspace(0, len(steps) - 1, STEPS).round().astype(int))]
    by_key: dict[Key, dict[int, Answered]] = {}
    for one in answers:
        by_key.setdefault(key_of(one.line), {})[one.step] = one
    chosen = choose([one.line for one in answers if one.step == steps[-1]])
    cards = "".join(
        _card(number, line, [by_key[key_of(line)].get(step) for step in shown], open_media)
        for number, line in enumerate(chosen)
    )
    asked = len({key_of(one.line) for one in answers})
    note = (
        f"{len(chosen)} of {asked:,} samples, {len(shown)} of {len(steps):,} evaluations; all of them are in "
        f"<code>{FILE_NAME}</code>."
    )
    if any(line.canvas for line in chosen):
        note += ' Boxes: <span class="key dashed"></span> expected, <span class="key"></span> the model\'s.'
    return f'<section><h2>Answers over time</h2><p class="note">{note}</p>{cards}</section>'


def choose(lines: Sequence[Prediction]) -> list[Prediction]:
    """Return the samples to show: one from each dataset in turn, the same ones on every call."""
    groups: dict[str, list[Prediction]] = {}
    for line in sorted(lines, key=lambda line: (line.index, line.member or 0)):
        groups.setdefault(line.dataset, []).append(line)
    turns = chain.from_iterable(zip_longest(*groups.values()))
    chosen = [line for line in turns if line is not None][:SAMPLES]
    return sorted(chosen, key=lambda line: (line.index, line.member or 0))


def _card(number: int, line: Prediction, answers: Sequence[Answered | None], open_media: OpenMedia) -> str:
    media = open_media(line)
    boxed = line.canvas is not None and not isinstance(media, str) and len(media) == len(media[0].frames) == 1
    columns: list[str] = []
    for answered in answers:
        if answered is None:
            continue
        drawing = ""
        if boxed:
            assert line.canvas is not None and not isinstance(media, str)
            answer = answered.line.prediction or ""
            boxes = read_boxes(final_answer(line.expected)), read_boxes(final_answer(answer))
            drawing = with_boxes(media[0].frames[0], line.canvas, *boxes, name=f"image-{number}", again=bool(columns))
        columns.append(_column(answered, drawing))
    images = "" if boxed else f'<div class="media">{_images(media)}</div>' if media else ""
    label = f"{line.dataset}, {line.id or f'line {line.line}'}"
    question, expected = (escape(shorten(text, LONGEST_TEXT)) for text in (line.question, short_answer(line.expected)))
    return (
        f'<article class="card learned">{images}<div><p class="question">{question}</p>'
        f"<dl><dt>expected</dt><dd>{expected}</dd></dl>"
        f'<ol class="answers">{"".join(columns)}</ol><p class="note">{escape(label)}</p></div></article>'
    )


def _column(answered: Answered, drawing: str) -> str:
    kind, verdict = {1.0: ("right", "&#10003; right"), 0.0: ("wrong", "&#10007; wrong")}.get(
        answered.score, ("", f"{answered.score:.0%}")
    )
    said = escape(shorten(short_answer(answered.line.prediction or ""), LONGEST_TEXT)) or "(nothing)"
    if answered.line.finish_reason == "length":
        verdict += ", cut"
    return (
        f'<li class="{kind}"><span class="note">step {answered.step:,}</span>{drawing}'
        f'<p class="said">{said}</p><p class="verdict">{verdict}</p></li>'
    )


def _images(media: Sequence[Medium] | str) -> str:
    if isinstance(media, str):
        return f'<p class="missing">{escape(media)}</p>'
    shown = media[:SHOWN_FRAMES]
    tags = [
        image_tag(frame, name, _SIDE)
        for number, medium in enumerate(shown, start=1)
        for name, frame in _frames(medium, number, SHOWN_FRAMES // len(shown))
    ]
    hidden = len(media) - len(shown)
    return "".join(tags) + (f'<p class="missing">and {hidden} more</p>' if hidden else "")


def _frames(medium: Medium, number: int, most: int) -> list[tuple[str, Image.Image]]:
    """Return at most ``most`` frames, from the first to the last, with their names."""
    count = len(medium.frames)
    if count == 1:
        return [(f"image {number}", medium.frames[0])]
    places = np.linspace(0, count - 1, min(most, count)).round().astype(int).tolist()
    return [(f"video {number}, frame {place + 1} of {count}", medium.frames[place]) for place in places]


def short_answer(answer: str) -> str:
    """Return boxes as four numbers each, and other answers unchanged."""
    boxes = read_boxes(final_answer(answer))
    return "; ".join(", ".join(f"{edge:g}" for edge in box) for box in boxes) if boxes else answer.strip()
