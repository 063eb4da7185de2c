r"""Phrases of answers and the parts of pictures that they name: referring segmentation.

A record is an ordinary conversation with a field ``masks``:

    {"image": "street.jpg",
     "conversations": [{"from": "human", "value": "<image>\nWhat is here?"},
                       {"from": "gpt", "value": "A red car behind a tree."}],
     "masks": [{"phrase": "A red car", "segmentation": {"size": [480, 640], "counts": "..."}},
               {"span": [17, 23], "segmentation": [[10.5, 20, 60, 20, 60, 190.5]]}]}

``phrase``: words of an answer, which stand in the answers once; or ``span``: their first character in the answer and
the one after their last, from 0. ``answer``: which of the assistant's turns, from 0, where there are several.
``image``: which image of the sample, from 0 in the order they are shown; default 0. ``segmentation``: see
:mod:`qwenvl.tasks.grounding.masks`.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np

from qwenvl.data.conversation.boxes.convert import bbox_format
from qwenvl.data.conversation.boxes.objects import read_objects
from qwenvl.data.encoding.encoded import Plan
from qwenvl.data.encoding.tokenization import Tokenizer
from qwenvl.data.media.resize import ImagePlan, MediaPlan
from qwenvl.data.types import Conversation, Sample
from qwenvl.tasks.grounding.masks import Mask, read_mask, shares
from qwenvl.utils.errors import SampleError, nearest

_KEYS = ("phrase", "span", "answer", "image", "segmentation")
_Span = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Place:
    """A phrase of an answer and a picture that it may speak of, by tokens of the sample.

    Args:
        phrase: the words, without white space around them.
        tokens: positions in the sample of the tokens that hold a character of the phrase.
        medium: which of the sample's pictures and videos the picture is, from 0.
        of_media: how many pictures and videos the sample has.
        image_start: position in the sample of the picture's first token.
        grid: (height, width) of the picture in tokens.
    """

    phrase: str
    tokens: tuple[int, ...]
    medium: int
    of_media: int
    image_start: int
    grid: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Region:
    """A phrase and the part of a picture that it names.

    Args:
        place: the phrase and the picture.
        mask: of the picture as it is shown.
        targets: how much of each cell of grids over the picture the mask covers: float32 [height, width] each, one for
            each of the reader's resolutions.
    """

    place: Place
    mask: Mask
    targets: tuple[np.ndarray, ...] = ()


def working_size(grid: tuple[int, int], longest: int) -> tuple[int, int]:
    """Return (height, width) of the grid that a mask is found on: the picture's, finer where it has few tokens.

    Worked example: 3 x 5 tokens with ``longest`` 64 become 38 x 64 cells; 40 x 70 stay.

    Args:
        grid: (height, width) of the picture in tokens.
        longest: cells that the longer side has at least.
    """
    scale = max(1.0, longest / max(grid))
    return max(1, round(grid[0] * scale)), max(1, round(grid[1] * scale))


@dataclass(frozen=True, slots=True)
class MaskReader:
    """Reads the ``masks`` of samples: the :class:`~qwenvl.data.encoding.targets.TargetReader` of grounding.

    Args:
        tokenizer: that samples are tokenized by.
        turn_end: what the chat template writes after an answer.
        merge_size: patches a side that become one token.
        resolutions: for each grid that masks are wanted on, the cells of its longer side: see :func:`working_size`.
    """

    tokenizer: Tokenizer
    turn_end: str
    merge_size: int
    resolutions: tuple[int, ...] = ()

    @property
    def fields(self) -> tuple[str, ...]:
        """The field of masks."""
        return ("masks",)

    @property
    def prompts(self) -> bool:
        """Samples keep their answers: their words are what looks at the picture."""
        return False

    @property
    def reads_plan(self) -> bool:
        """Masks are read beside the sizes of pictures and the tokens of phrases."""
        return True

    def check(self, sample: Sample, conversation: Conversation) -> None:
        """Look at the phrases of a sample.

        Raises:
            SampleError: there is none (``no_masks``), or one is not in the answers (``bad_mask``).
        """
        for number, item in enumerate(_items(sample)):
            try:
                _span(item, _texts(conversation), sample)
            except SampleError as error:
                raise _numbered(error, number) from error

    def read(self, sample: Sample, plan: Plan) -> tuple[Region, ...]:
        """Return the regions of a sample.

        Raises:
            SampleError: there is none (``no_masks``), or one cannot be used (``bad_mask``).
            UserError: a package for its masks is missing.
        """
        found = []
        for number, item in enumerate(_items(sample)):
            try:
                found.append(self._region(item, sample, plan))
            except SampleError as error:
                raise _numbered(error, number) from error
        return tuple(found)

    def identity(self) -> list[Any]:
        """Return what lengths depend on: nothing of this reader."""
        return ["masks"]

    def place(self, item: Any, sample: Sample, plan: Plan) -> Place:
        """Return where a phrase and its picture stand.

        Args:
            item: of ``masks``, with or without a segmentation.
            sample: the record.
            plan: of the sample.

        Raises:
            SampleError: they cannot be found (``bad_mask``).
        """
        texts = _texts(plan.conversation)
        answer, start, stop = _span(item, texts, sample)
        medium, image = _image(item, plan.media)
        tokens = self._tokens(plan, answer, texts[answer], start, stop)
        image_start = self._image_start(plan, medium)
        if image_start >= tokens[0]:
            raise _bad("its image stands after the phrase, which cannot look at it.")
        grid = image.grid[1] // self.merge_size, image.grid[2] // self.merge_size
        return Place(texts[answer][start:stop], tokens, medium, len(plan.media), image_start, grid)

    def _region(self, item: Any, sample: Sample, plan: Plan) -> Region:
        place = self.place(item, sample, plan)
        image = plan.media[place.medium]
        assert isinstance(image, ImagePlan)
        mask = read_mask(item.get("segmentation"), image.size)
        sizes = [working_size(place.grid, longest) for longest in self.resolutions]
        return Region(place, mask, tuple(shares(mask.pixels(), size) for size in sizes))

    def _tokens(self, plan: Plan, answer: int, text: str, start: int, stop: int) -> tuple[int, ...]:
        """Return the positions of the tokens that hold characters ``start`` to ``stop`` of an answer.

        A token that holds others besides counts too, as " car" does for "car".
        """
        message = _answers(plan.conversation)[answer]
        if not plan.conversation.messages[message].trained:
            raise _bad("its answer is not trained, so that no token of it learns to look.")
        if message not in plan.rendering.turns:
            raise _bad("its answer has a training row of its own. Use --history as_rendered.")
        number = plan.rendering.turns.index(message)
        first, last = plan.rendering.spans[number]
        written = plan.rendering.text[first:last]
        moved = _written_at(written.removesuffix(self.turn_end), text, start, stop)
        ids, offsets = self.tokenizer.offsets(written)
        place = plan.tokens.starts[number]
        assert plan.tokens.input_ids[place : place + len(ids)].tolist() == ids, "offsets are of other tokens"
        inside = [number for number, (a, b) in enumerate(offsets) if a < stop + moved and b > start + moved and a < b]
        return tuple(place + number for number in inside)

    def _image_start(self, plan: Plan, medium: int) -> int:
        earlier = sum(int(np.prod(one.grid)) for one in plan.media[:medium]) // self.merge_size**2
        return int(np.flatnonzero(plan.tokens.vision_mask.numpy())[earlier])


def _written_at(written: str, text: str, start: int, stop: int) -> int:
    """Return how far the characters of an answer are moved in what the template made of it.

    A template may write something in front of an answer, or leave some of it out, such as thoughts. What both end with,
    white space at the end left out, is the same characters in both.

    Raises:
        SampleError: it leaves out what is wanted.
    """
    written, text = written.rstrip(), text.rstrip()
    pairs = zip(reversed(written), reversed(text), strict=False)
    common = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
    if start < len(text) - common or stop > len(text):
        raise _bad("the checkpoint's chat template leaves its words out of the answer, or writes others.")
    return len(written) - len(text)


def _answers(conversation: Conversation) -> list[int]:
    """Return the index of each assistant turn in the messages."""
    return [index for index, message in enumerate(conversation.messages) if message.role == "assistant"]


def _texts(conversation: Conversation) -> list[str]:
    return [message.text for message in conversation.messages if message.role == "assistant"]


def _items(sample: Sample) -> list[Any]:
    written = sample.record.get("masks")
    if not isinstance(written, list) or not written:
        raise SampleError(
            "no_masks",
            f"'masks' is {reprlib.repr(written)}: --task grounding needs a list with a mask, such as "
            '[{"phrase": "the red car", "segmentation": {...}}].',
        )
    return written


def _bad(reason: str) -> SampleError:
    return SampleError("bad_mask", reason)


def _numbered(error: SampleError, number: int) -> SampleError:
    return SampleError(error.category, f"mask {number} of 'masks': {error.reason}", error.origin)


def _image(item: Mapping[str, Any], media: Sequence[MediaPlan]) -> tuple[int, ImagePlan]:
    """Return the image of a mask, and which of the pictures and videos it is."""
    images = [(place, plan) for place, plan in enumerate(media) if isinstance(plan, ImagePlan)]
    number = _number(item, "image", len(images), "image")
    return images[0 if number is None else number]


def _number(item: Mapping[str, Any], key: str, count: int, what: str) -> int | None:
    """Return a number of a mask that counts from 0; None where it is not given."""
    value = item.get(key)
    if value is None and count:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
        raise _bad(f"{key!r} is {reprlib.repr(value)}, but the sample has {count} {what}s, counted from 0.")
    return value


def _span(item: Any, texts: Sequence[str], sample: Sample) -> _Span:
    """Return (answer, start, stop) of a mask's words, without white space around."""
    if not isinstance(item, Mapping):
        raise _bad(f"it is {reprlib.repr(item)}, not an object with {', '.join(_KEYS)}.")
    for key in item:
        if key not in _KEYS:
            raise _bad(f"{key!r} is none of {', '.join(_KEYS)}.{nearest(str(key)[:80], _KEYS)}")
    phrase, span = item.get("phrase"), item.get("span")
    answer = _number(item, "answer", len(texts), "assistant turn")
    if (phrase is None) == (span is None):
        raise _bad("it needs 'phrase' or 'span', one of them: the words of the answer that name what is in the mask.")
    return _by_span(span, answer, texts, sample) if phrase is None else _by_phrase(phrase, answer, texts)


def _by_phrase(phrase: Any, answer: int | None, texts: Sequence[str]) -> _Span:
    if not isinstance(phrase, str) or not phrase.strip():
        raise _bad(f"'phrase' is {reprlib.repr(phrase)}, not words of an answer.")
    words = phrase.strip()
    numbers = range(len(texts)) if answer is None else [answer]
    found = [
        (number, place, place + len(words))
        for number in numbers
        for place in range(len(texts[number]) - len(words) + 1)
        if texts[number].startswith(words, place)
    ]
    if len(found) != 1:
        raise _bad(
            f"the phrase {reprlib.repr(phrase)} stands in the answer {len(found)} times. "
            + ("Give 'span': [first, last + 1], in characters." if found else "It must stand there word for word.")
        )
    return found[0]


def _by_span(span: Any, answer: int | None, texts: Sequence[str], sample: Sample) -> _Span:
    if bbox_format(sample) is not None or read_objects(sample.record) is not None:
        raise _bad(
            "'span' with bbox_format or objects: coordinates are written anew, which moves characters. Give 'phrase'."
        )
    if answer is None and len(texts) > 1:
        raise _bad("'span' needs 'answer', the number of the assistant's turn from 0: there are several.")
    text = texts[answer or 0]
    whole = isinstance(span, list) and len(span) == 2 and all(type(value) is int for value in span)
    if not whole or not 0 <= span[0] < span[1] <= len(text):
        raise _bad(
            f"'span' is {reprlib.repr(span)}, not [first, last + 1] in the {len(text)} characters of its answer."
        )
    words = text[span[0] : span[1]]
    if not words.strip():
        raise _bad(f"'span' {span} holds white space alone.")
    return answer or 0, span[0] + len(words) - len(words.lstrip()), span[1] - len(words) + len(words.rstrip())
