"""The page of tools/show_attention.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

import numpy as np
from PIL import Image

from qwenvl.cli.show_attention.overlay import combine, heat, masked
from qwenvl.report.html import build_page
from qwenvl.report.images import LONGEST_SIDE, image_tag

_EXPLAINED = (
    "Brighter is more: where the words look, over all chosen layers and heads, each map divided by its sum first. The "
    "percentage is the part of the attention that goes to the picture at all. Maps have one cell a token of the "
    "picture as the model sees it, after resizing."
)


@dataclass(frozen=True)
class Looked:
    """Where a phrase looks.

    Args:
        phrase: the words.
        picture: that they look at, as it is shown.
        maps: [layers, heads, height, width], weights.
        found: the mask that was found, bool [height, width] in pixels; None without a head for masks.
        expected: the annotated mask; None without one.
        parts: the same of each token of the phrase, where that is asked for.
    """

    phrase: str
    picture: Image.Image
    maps: np.ndarray
    found: np.ndarray | None = None
    expected: np.ndarray | None = None
    parts: Sequence[Looked] = field(default_factory=tuple)


@dataclass(frozen=True)
class Shown:
    """A sample on the page.

    Args:
        title: where it comes from.
        question: its text.
        answer: whose words look.
        phrases: where they look.
    """

    title: str
    question: str
    answer: str
    phrases: Sequence[Looked]


def attention_page(title: str, samples: Sequence[Shown], layers: Sequence[int]) -> str:
    """Return the page.

    Args:
        title: plain text.
        samples: in their order.
        layers: numbers of the layers that the maps are of.
    """
    body = [_sample(sample, layers) for sample in samples]
    return build_page(title, f'<p class="note">{_EXPLAINED}</p>', *body)


def _sample(sample: Shown, layers: Sequence[int]) -> str:
    texts = f'<p class="question">{escape(sample.question)}</p><p class="says">{escape(sample.answer)}</p>'
    cards = "".join(_cards(looked) for looked in sample.phrases)
    by_layer = "".join(_by_layer(looked, layers) for looked in sample.phrases)
    return f'<h2>{escape(sample.title)}</h2>{texts}<div class="cards wide rest">{cards}</div>{by_layer}'


def _cards(looked: Looked) -> str:
    picture, scale = _enlarged(looked.picture)
    cards = [_card(looked.phrase, heat(picture, combine(_flat(looked.maps))), _share(looked.maps))]
    if looked.found is not None or looked.expected is not None:
        drawn = masked(picture, _finer(looked.found, scale), _finer(looked.expected, scale))
        cards.append(_card(f"{looked.phrase}: mask", drawn, _fit(looked.found, looked.expected)))
    return "".join([*cards, *(_cards(part) for part in looked.parts)])


def _by_layer(looked: Looked, layers: Sequence[int]) -> str:
    cards = [
        _card(f"layer {number}", heat(looked.picture, combine(maps)), _share(maps[None]))
        for number, maps in zip(layers, looked.maps, strict=True)
    ]
    summary = f"<summary>{escape(looked.phrase)}, layer by layer</summary>"
    return f'<details class="rest">{summary}<div class="cards">{"".join(cards)}</div></details>'


def _enlarged(picture: Image.Image) -> tuple[Image.Image, int]:
    """Return a picture as large as it is shown, or larger, so that fine lines stay; and how many times larger."""
    scale = max(1, -(-LONGEST_SIDE // max(picture.size)))
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST), scale


def _finer(mask: np.ndarray | None, scale: int) -> np.ndarray | None:
    return None if mask is None else mask.repeat(scale, 0).repeat(scale, 1)


def _flat(maps: np.ndarray) -> np.ndarray:
    return maps.reshape(-1, *maps.shape[-2:])


def _share(maps: np.ndarray) -> str:
    """Return how much of the attention goes to the picture, the mean over layers and heads."""
    return f"{float(maps.sum((-2, -1)).mean()):.0%} of the attention"


def _fit(found: np.ndarray | None, expected: np.ndarray | None) -> str:
    if found is None:
        return "annotated (green)"
    if expected is None:
        return "found (pink)"
    union = np.logical_or(found, expected).sum()
    iou = np.logical_and(found, expected).sum() / union if union else 1.0
    return f"found (pink), annotated (green); IoU {iou:.2f}"


def _card(title: str, picture: Image.Image, note: str) -> str:
    return (
        f'<div class="card"><div class="media">{image_tag(picture, title)}</div>'
        f'<p class="question"><b>{escape(title)}</b></p><p class="note">{escape(note)}</p></div>'
    )
