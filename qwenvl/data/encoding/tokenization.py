"""Tokenize rendered text to ids, labels and positions of equal length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import tokenizers
import torch

from qwenvl.data.conversation.chat_template import Rendering
from qwenvl.data.encoding.mrope import VisionSpan, position_ids
from qwenvl.data.media.resize import ImagePlan, MediaPlan, VideoPlan, VisionSettings
from qwenvl.utils.errors import SampleError

IGNORE_INDEX = -100


@dataclass(frozen=True, slots=True)
class VisionTokens:
    """The tokens of images and videos in one checkpoint, from its config and tokenizer.

    Args:
        image: Placeholder of an image, ``<|image_pad|>`` in all families.
        video: Placeholder of a video.
        start: Token that opens an image or video.
        end: Token that closes an image or video.
        image_id: Id of ``image``.
        video_id: Id of ``video``.
        tokens_per_second: Temporal positions per second (Qwen2.5-VL); None where frames are counted.
    """

    image: str
    video: str
    start: str
    end: str
    image_id: int
    video_id: int
    tokens_per_second: float | None = None

    @classmethod
    def from_processor(cls, processor: Any, tokens_per_second: float | None = None) -> VisionTokens:
        """Read the placeholders from a processor; the start and end tokens are the same in all families."""
        image, video = processor.image_token, processor.video_token
        start, end = "<|vision_start|>", "<|vision_end|>"
        image_id, video_id = processor.tokenizer.convert_tokens_to_ids([image, video])
        return cls(image, video, start, end, image_id, video_id, tokens_per_second)


@dataclass(frozen=True, slots=True)
class Tokens:
    """One sample as the language model reads it.

    Args:
        input_ids: int64 [T].
        labels: int64 [T]; -100 at untrained tokens.
        position_ids: int64 [4, T]; see :mod:`qwenvl.data.encoding.mrope`.
        vision_mask: bool [T]; True at image and video placeholders.
        starts: Index of the first token of each trained answer.
        weights: float32 [T], factor of each token's loss, 0 at untrained tokens; None where all are 1.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    vision_mask: torch.Tensor
    starts: tuple[int, ...] = ()
    weights: torch.Tensor | None = None

    def __len__(self) -> int:
        return self.input_ids.shape[0]


@dataclass(frozen=True, slots=True)
class Encoding:
    """The ids of a sample with a single placeholder per image or frame: all that its length depends on.

    Args:
        stretches: (ids, flags of trained ids) of each piece of text, in order; None for the flags of a piece that is
            not an answer.
        blocks: (merged grid, temporal step) of every placeholder, in order.
        length: Tokens of the sample, once the placeholders are repeated.
        trained: Number of trained tokens.
        weights: Factor of the loss of each answer; empty where all are 1.
    """

    stretches: tuple[tuple[list[int], list[bool] | None], ...]
    blocks: tuple[tuple[tuple[int, int, int], float], ...]
    length: int
    trained: int
    weights: tuple[float, ...] = ()


class Tokenizer:
    """Turns a rendering into tokens.

    Args:
        tokenizer: Tokenizer of the checkpoint, backed by the ``tokenizers`` library.
        vision: Placeholder tokens of the checkpoint.
        settings: Limits of the run.
    """

    def __init__(self, tokenizer: Any, vision: VisionTokens, settings: VisionSettings) -> None:
        self._tokenizer = tokenizer
        self._vision = vision
        self._settings = settings

    def __call__(self, rendering: Rendering, plans: Sequence[MediaPlan]) -> Tokens:
        """Tokenize; see :meth:`encode` and :meth:`expand`."""
        return self.expand(self.encode(rendering, plans))

    def encode(self, rendering: Rendering, plans: Sequence[MediaPlan], *, answered: bool = True) -> Encoding:
        """Tokenize, with one placeholder per image or frame.

        The text is cut where training starts and stops, so that an answer is tokenized as the model would write it:
        a newline that opens an answer never merges with the newline of the header before it.

        Args:
            rendering: Text with one placeholder per image or video.
            plans: Plans of the images and videos, in the order of the placeholders.
            answered: Whether a text without trained tokens is an error.

        Raises:
            SampleError: placeholders and media do not match, or nothing is trained.
        """
        segments = self._segments(rendering, plans)
        all_ids = self._ids([text for text, _ in segments])
        stretches = tuple(
            (ids, None if start is None else self._trained(text, ids, start, rendering.untrained))
            for ids, (text, start) in zip(all_ids, segments, strict=True)
        )
        blocks = tuple(block for plan in plans for block in self._blocks(plan))
        placeholders = words = trained_words = 0
        for ids, trained in stretches:
            found = ids.count(self._vision.image_id) + ids.count(self._vision.video_id)
            placeholders += found
            words += len(ids) - found
            trained_words += sum(trained or ()) - (found if trained and all(trained) else 0)
        if placeholders != len(blocks):
            raise SampleError(
                "template",
                f"the chat template rendered {placeholders} placeholders for {len(blocks)} images or frames: "
                "it leaves out media of some turn (images belong in user turns).",
            )
        if answered and not trained_words:
            raise SampleError("no_answer", "no token of the sample would be trained: it has no answer.")
        length = words + sum(t * h * w for (t, h, w), _ in blocks)
        return Encoding(stretches, blocks, length, trained_words, rendering.weights)

    def expand(self, encoding: Encoding) -> Tokens:
        """Repeat every placeholder for all tokens of its image or frame, and give all tokens labels and positions."""
        ids = np.concatenate([np.asarray(part, dtype=np.int64) for part, _ in encoding.stretches])
        flagged = ([False] * len(part) if flags is None else flags for part, flags in encoding.stretches)
        trained = np.fromiter((flag for flags in flagged for flag in flags), dtype=bool, count=len(ids))
        is_vision = (ids == self._vision.image_id) | (ids == self._vision.video_id)
        trained &= ~is_vision
        repeats = np.ones(len(ids), dtype=np.int64)
        repeats[is_vision] = [t * h * w for (t, h, w), _ in encoding.blocks]
        starts = (np.cumsum(repeats) - repeats)[is_vision]
        spans = [VisionSpan(int(s), grid, step) for s, (grid, step) in zip(starts, encoding.blocks, strict=True)]
        labels = torch.from_numpy(np.repeat(np.where(trained, ids, IGNORE_INDEX), repeats))
        input_ids = torch.from_numpy(np.repeat(ids, repeats))
        mask = torch.from_numpy(np.repeat(is_vision, repeats))
        places = np.append(0, np.cumsum(repeats))
        borders = np.cumsum([0, *(len(part) for part, _ in encoding.stretches)])
        answers = [flags is not None for _, flags in encoding.stretches]
        first = tuple(places[borders[:-1][answers]].tolist())
        weights = _token_weights(encoding, labels, places[borders]) if encoding.weights else None
        return Tokens(input_ids, labels, position_ids(len(input_ids), spans), mask, first, weights)

    def same_ids(self, pieces: Sequence[str]) -> bool:
        """Return whether pieces of text have the same ids one by one as in one piece."""
        whole, *parts = self._ids(["".join(pieces), *pieces])
        return whole == [number for part in parts for number in part]

    def offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Return the ids of a trained piece of text, and the (start, stop) characters of each token.

        All tokens of a character that takes several tokens span that character.
        """
        encoded = self._engine().encode(text, add_special_tokens=False)
        return encoded.ids, encoded.offsets

    def identity(self) -> list[Any]:
        """Return everything that token ids depend on, as values that JSON can hold."""
        return [self._engine().to_str(), asdict(self._vision), tokenizers.__version__]

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoded.ids for encoded in self._engine().encode_batch_fast(texts, add_special_tokens=False)]

    def _engine(self) -> Any:
        """Return the tokenizer's Rust engine: the wrapper of transformers takes a third of the time.

        Calls through transformers leave padding and truncation set in the engine, so that they are switched off here.
        """
        engine = self._tokenizer.backend_tokenizer
        if engine.padding is not None:
            engine.no_padding()
        if engine.truncation is not None:
            engine.no_truncation()
        return engine

    def _trained(self, text: str, ids: list[int], start: int, untrained: Sequence[tuple[int, int]]) -> list[bool]:
        """Return a flag for each id of an answer: trained if it begins outside of all untrained parts."""
        parts = [(first - start, last - start) for first, last in untrained if start <= first < start + len(text)]
        if not parts:
            return [True] * len(ids)
        _, offsets = self.offsets(text)
        return [not any(first <= place < last for first, last in parts) for place, _ in offsets]

    def _segments(self, rendering: Rendering, plans: Sequence[MediaPlan]) -> list[tuple[str, int | None]]:
        """Cut the text into (piece, start of the answer in the text, or None); write out frames and timestamps."""
        pieces: list[tuple[str, int | None]] = []
        cursor = 0
        videos = iter([plan for plan in plans if isinstance(plan, VideoPlan)])
        for start, stop in rendering.spans:
            pieces.append((self._write_frames(rendering.text[cursor:start], videos), None))
            pieces.append((rendering.text[start:stop], start))
            cursor = stop
        pieces.append((self._write_frames(rendering.text[cursor:], videos), None))
        return [(text, start) for text, start in pieces if text]

    def _write_frames(self, text: str, videos: Iterator[VideoPlan]) -> str:
        """Replace each video's placeholder by its frames: timestamp, start, placeholder, end (``frames`` layout)."""
        if self._settings.family.video_layout == "clip":
            return text
        frame = self._vision.start + self._vision.video + self._vision.end
        pieces = text.split(frame)
        written = [pieces[0]]
        for piece in pieces[1:]:
            plan = next(videos, None)
            # A placeholder without a video stays as it is: the count that follows tokenization finds it.
            written += [frame] if plan is None else [f"<{seconds:.1f} seconds>{frame}" for seconds in plan.timestamps]
            written.append(piece)
        return "".join(written)

    def _blocks(self, plan: MediaPlan) -> list[tuple[tuple[int, int, int], float]]:
        """Return (merged grid, temporal step) of every run of placeholders of an image or video."""
        merge = self._settings.merge_size
        temporal, height, width = plan.grid[0], plan.grid[1] // merge, plan.grid[2] // merge
        if self._settings.family.plain_positions:
            return [((1, 1, temporal * (self._settings.tokens_per_frame or height * width)), 1.0)]
        if isinstance(plan, ImagePlan):
            return [((1, height, width), 1.0)]
        if self._settings.family.video_layout == "frames":
            return [((1, height, width), 1.0)] * temporal
        if self._vision.tokens_per_second is None:
            return [((temporal, height, width), 1.0)]
        # One step for all patches of a video, as in the processor and get_rope_index, even if the frame rate is not
        # constant: the model was trained this way, and a server can send nothing else.
        seconds = self._settings.temporal_patch_size / plan.sampled_fps
        return [((temporal, height, width), self._vision.tokens_per_second * seconds)]


def _token_weights(encoding: Encoding, labels: torch.Tensor, borders: np.ndarray) -> torch.Tensor:
    """Return the weight of each token of a sample: float32 [T].

    Args:
        encoding: Encoding with weights.
        labels: int64 [T].
        borders: int64 [stretches + 1], number of tokens before each stretch, then the number of all tokens.
    """
    weights, of_answers = torch.zeros(len(labels)), iter(encoding.weights)
    for number, (_, trained) in enumerate(encoding.stretches):
        if trained is not None:
            weights[borders[number] : borders[number + 1]] = next(of_answers)
    return weights.where(labels != IGNORE_INDEX, 0.0)
