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
    "Attention of the words of the answer to the image; brighter is more. Maps are the mean over the chosen layers and "
    "heads, each divided by its sum first. The percentage is the share of all attention that goes to the image. A map "
    "has one cell per image token, on the resized image that the model sees."
)


@dataclass(frozen=True)
class Looked:
    """Attention of a phrase to an image.

    Args:
        phrase: Words of the phrase.
        image: Image as it is shown.
        maps: Attention weights, float [layers, heads, height, width].
        found: Predicted mask, bool [height, width] in pixels; None without a head for masks.
        expected: Annotated mask, bool [height, width] in pixels; None without one.
        parts: Attention of each token of the phrase; empty without ``--per_token``.
    """

    phrase: str
    image: Image.Image
    maps: np.ndarray
    found: np.ndarray | None = None
    expected: np.ndarray | None = None
    parts: Sequence[Looked] = field(default_factory=tuple)


@dataclass(frozen=True)
class Shown:
    """A sample on the page.

    Args:
        title: Heading: dataset, file and line.
        question: Text of the question.
        answer: Text of the answer.
        phrases: Attention of the phrases of the answer.
    """

    title: str
    question: str
    answer: str
    phrases: Sequence[Looked]


def attention_page(title: str, samples: Sequence[Shown], layers: Sequence[int]) -> str:
    """Return the HTML page.

    Args:
        title: Title, plain text.
        samples: Samples to show, in order.
        layers: Numbers of the layers of the maps.
    """
    body = [_sample(sample, layers) for sample in samples]
    return build_page(title, f'<p class="note">{_EXPLAINED}</p>', *body)


def _sample(sample: Shown, layers: Sequence[int]) -> str:
    texts = f'<p class="question">{escape(sample.question)}</p><p class="says">{escape(sample.answer)}</p>'
    cards = "".join(_cards(looked) for looked in sample.phrases)
    by_layer = "".join(_by_layer(looked, layers) for looked in sample.phrases)
    return f'<h2>{escape(sample.title)}</h2>{texts}<div class="cards wide rest">{cards}</div>{by_layer}'


def _cards(looked: Looked) -> str:
    image, scale = _enlarged(looked.image)
    cards = [_card(looked.phrase, heat(image, combine(_flat(looked.maps))), _share(looked.maps))]
    if looked.found is not None or looked.expected is not None:
        drawn = masked(image, _finer(looked.found, scale), _finer(looked.expected, scale))
        cards.append(_card(f"{looked.phrase}: mask", drawn, _fit(looked.found, looked.expected)))
    return "".join([*cards, *(_cards(part) for part in looked.parts)])


def _by_layer(looked: Looked, layers: Sequence[int]) -> str:
    cards = [
        _card(f"layer {number}", heat(looked.image, combine(maps)), _share(maps[None]))
        for number, maps in zip(layers, looked.maps, strict=True)
    ]
    summary = f"<summary>{escape(looked.phrase)}, layer by layer</summary>"
    return f'<details class="rest">{summary}<div class="cards">{"".join(cards)}</div></details>'


def _enlarged(image: Image.Image) -> tuple[Image.Image, int]:
    """Return an image enlarged to at least its size on the page, so that fine lines stay visible, and the factor."""
    scale = max(1, -(-LONGEST_SIDE // max(image.size)))
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST), scale


def _finer(mask: np.ndarray | None, scale: int) -> np.ndarray | None:
    return None if mask is None else mask.repeat(scale, 0).repeat(scale, 1)


def _flat(maps: np.ndarray) -> np.ndarray:
    return maps.reshape(-1, *maps.shape[-2:])


def _share(maps: np.ndarray) -> str:
    """Return the share of the attention that goes to the image, averaged over layers and heads."""
    return f"{float(maps.sum((-2, -1)).mean()):.0%} of the attention"


def _fit(found: np.ndarray | None, expected: np.ndarray | None) -> str:
    if found is None:
        return "annotated (green)"
    if expected is None:
        return "found (pink)"
    union = np.logical_or(found, expected).sum()
    iou = np.logical_and(found, expected).sum() / union if union else 1.0
    return f"found (pink), annotated (green); IoU {iou:.2f}"


def _card(title: str, image: Image.Image, note: str) -> str:
    return (
        f'<div class="card"><div class="media">{image_tag(image, title)}</div>'
        f'<p class="question"><b>{escape(title)}</b></p><p class="note">{escape(note)}</p></div>'
    )
