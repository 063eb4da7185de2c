r"""Read phrases of answers and the masks that they refer to (referring segmentation).

A record is an ordinary conversation with a field ``masks``:

    {"image": "street.jpg",
     "conversations": [{"from": "human", "value": "<image>\nWhat is here?"},
                       {"from": "gpt", "value": "A red car behind a tree."}],
     "masks": [{"phrase": "A red car", "segmentation": {"size": [480, 640], "counts": "..."}},
               {"span": [17, 23], "segmentation": [[10.5, 20, 60, 20, 60, 190.5]]}]}

``phrase``: words that occur once in the answers; or ``span``: start and end (exclusive) of the words in the characters
of the answer. ``answer``: index of the assistant's turn, from 0, if there are several. ``image``: index of the image in
the sample, from 0; default 0. ``segmentation``: see :mod:`qwenvl.tasks.grounding.masks`.
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
    """Token positions of a phrase and of the image that it refers to.

    Args:
        phrase: Words of the phrase, stripped of white space.
        tokens: Positions in the sample of the tokens that contain a character of the phrase.
        medium: Index of the image among the sample's images and videos, from 0.
        of_media: Number of images and videos of the sample.
        image_start: Position in the sample of the image's first token.
        grid: (height, width) of the image in tokens.
    """

    phrase: str
    tokens: tuple[int, ...]
    medium: int
    of_media: int
    image_start: int
    grid: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Region:
    """A phrase and the mask that it refers to.

    Args:
        place: Positions of the phrase and the image.
        mask: Mask of the image as it is shown.
        targets: Share of each cell of a grid that the mask covers: float32 [height, width], 0 to 1, one grid for each
            of the reader's resolutions.
    """

    place: Place
    mask: Mask
    targets: tuple[np.ndarray, ...] = ()


def working_size(grid: tuple[int, int], longest: int) -> tuple[int, int]:
    """Return (height, width) of the grid of a mask: the image's grid of tokens, enlarged if it has few tokens.

    Worked example: 3 x 5 tokens with ``longest`` 64 become 38 x 64 cells; 40 x 70 stay.

    Args:
        grid: (height, width) of the image in tokens.
        longest: Minimum cells of the longer side.
    """
    scale = max(1.0, longest / max(grid))
    return max(1, round(grid[0] * scale)), max(1, round(grid[1] * scale))


@dataclass(frozen=True, slots=True)
class MaskReader:
    """Reader of the ``masks`` of samples: the :class:`~qwenvl.data.encoding.targets.TargetReader` of grounding.

    Args:
        tokenizer: Tokenizer of the samples.
        turn_end: Text that the chat template writes after an answer.
        merge_size: Patches per side that become one token.
        resolutions: Minimum cells of the longer side of each target grid; see :func:`working_size`.
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
        """False: samples keep their answers, whose attention to the image is read."""
        return False

    @property
    def reads_plan(self) -> bool:
        """True: reading masks needs the sizes of images and the tokens of phrases."""
        return True

    def check(self, sample: Sample, conversation: Conversation) -> None:
        """Check the phrases of a sample.

        Raises:
            SampleError: there are none (``no_masks``), or one is not in the answers (``bad_mask``).
        """
        for number, item in enumerate(_items(sample)):
            try:
                _span(item, _texts(conversation), sample)
            except SampleError as error:
                raise _numbered(error, number) from error

    def read(self, sample: Sample, plan: Plan) -> tuple[Region, ...]:
        """Return the regions of a sample.

        Raises:
            SampleError: there are none (``no_masks``), or one cannot be used (``bad_mask``).
            UserError: a package that the masks need is missing.
        """
        found = []
        for number, item in enumerate(_items(sample)):
            try:
                found.append(self._region(item, sample, plan))
            except SampleError as error:
                raise _numbered(error, number) from error
        return tuple(found)

    def identity(self) -> list[Any]:
        """Return the identity for length caches; lengths depend on no setting of this reader."""
        return ["masks"]

    def place(self, item: Any, sample: Sample, plan: Plan) -> Place:
        """Return the token positions of a phrase and its image.

        Args:
            item: Entry of ``masks``, with or without a segmentation.
            sample: Sample with the record.
            plan: Plan of the sample.

        Raises:
            SampleError: the phrase or the image cannot be found (``bad_mask``).
        """
        texts = _texts(plan.conversation)
        answer, start, stop = _span(item, texts, sample)
        medium, image = _image(item, plan.media)
        tokens = self._tokens(plan, answer, texts[answer], start, stop)
        image_start = self._image_start(plan, medium)
        if image_start >= tokens[0]:
            raise _bad("its image comes after the phrase, which therefore cannot attend to it.")
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
        """Return the positions of the tokens that contain characters ``start`` to ``stop`` of an answer.

        A token that also contains other characters counts too, such as " car" for "car".
        """
        message = _answers(plan.conversation)[answer]
        if not plan.conversation.messages[message].trained:
            raise _bad("its answer is not trained on, so its tokens cannot be used.")
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
    """Return the offset of an answer's characters in the rendered answer.

    A template may add text before an answer, or omit parts of it, such as thoughts. Only the common suffix of both
    texts, stripped of trailing white space, is located.

    Raises:
        SampleError: the template changes or omits the characters in question.
    """
    written, text = written.rstrip(), text.rstrip()
    pairs = zip(reversed(written), reversed(text), strict=False)
    common = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
    if start < len(text) - common or stop > len(text):
        raise _bad("the checkpoint's chat template omits or changes its words in the answer.")
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
            f"'masks' is {reprlib.repr(written)}: --task grounding needs a list of one or more masks, such as "
            '[{"phrase": "the red car", "segmentation": {...}}].',
        )
    return written


def _bad(reason: str) -> SampleError:
    return SampleError("bad_mask", reason)


def _numbered(error: SampleError, number: int) -> SampleError:
    return SampleError(error.category, f"mask {number} of 'masks': {error.reason}", error.origin)


def _image(item: Mapping[str, Any], media: Sequence[MediaPlan]) -> tuple[int, ImagePlan]:
    """Return the image of a mask, with its index among the images and videos."""
    images = [(place, plan) for place, plan in enumerate(media) if isinstance(plan, ImagePlan)]
    number = _number(item, "image", len(images), "image")
    return images[0 if number is None else number]


def _number(item: Mapping[str, Any], key: str, count: int, what: str) -> int | None:
    """Return an index field of a mask, counted from 0; None where it is not given."""
    value = item.get(key)
    if value is None and count:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
        raise _bad(f"{key!r} is {reprlib.repr(value)}, but the sample has {count} {what}s, counted from 0.")
    return value


def _span(item: Any, texts: Sequence[str], sample: Sample) -> _Span:
    """Return (answer, start, stop) of a mask's words, stripped of white space."""
    if not isinstance(item, Mapping):
        raise _bad(f"it is {reprlib.repr(item)}, not an object with {', '.join(_KEYS)}.")
    for key in item:
        if key not in _KEYS:
            raise _bad(f"{key!r} is not one of {', '.join(_KEYS)}.{nearest(str(key)[:80], _KEYS)}")
    phrase, span = item.get("phrase"), item.get("span")
    answer = _number(item, "answer", len(texts), "assistant turn")
    if (phrase is None) == (span is None):
        raise _bad("it needs exactly one of 'phrase' and 'span', for the words of the answer that refer to the mask.")
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
            f"the phrase {reprlib.repr(phrase)} occurs in the answer {len(found)} times. "
            + ("Give 'span': [first, last + 1], in characters." if found else "It has to occur there word for word.")
        )
    return found[0]


def _by_span(span: Any, answer: int | None, texts: Sequence[str], sample: Sample) -> _Span:
    if bbox_format(sample) is not None or read_objects(sample.record) is not None:
        raise _bad(
            "'span' cannot be used with bbox_format or objects, which rewrite coordinates in the answer and so shift "
            "its characters. Give 'phrase'."
        )
    if answer is None and len(texts) > 1:
        raise _bad("'span' needs 'answer', the index of the assistant's turn from 0, because there are several.")
    text = texts[answer or 0]
    whole = isinstance(span, list) and len(span) == 2 and all(type(value) is int for value in span)
    if not whole or not 0 <= span[0] < span[1] <= len(text):
        raise _bad(
            f"'span' is {reprlib.repr(span)}, not [first, last + 1] in the {len(text)} characters of its answer."
        )
    words = text[span[0] : span[1]]
    if not words.strip():
        raise _bad(f"'span' {span} contains only white space.")
    return answer or 0, span[0] + len(words) - len(words.lstrip()), span[1] - len(words) + len(words.rstrip())
