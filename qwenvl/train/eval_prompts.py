"""Evaluation samples that the model answers during training, the same at every evaluation."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from qwenvl.config.rules.best_metric import OF_DATASET
from qwenvl.data.dataset import ConversationDataset
from qwenvl.data.encoding.encoded import EncodedSample
from qwenvl.evaluate.scoring import evaluate
from qwenvl.inference.answer_rows import describe, exchanged, with_answer
from qwenvl.inference.generate import Answer, ChatModel
from qwenvl.inference.other_images import Key, View, blank, find_partners, key_of
from qwenvl.inference.prompts import EvalExample, open_example
from qwenvl.metrics.predictions import Prediction
from qwenvl.report.answers import Medium
from qwenvl.utils.errors import SampleError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Round:
    """Samples that the ranks answer together, all with the same kinds of media.

    Args:
        asked: Numbers of the samples that this rank answers; an arbitrary one if it has none left.
        counted: Number of samples in ``asked`` that belong to this rank; others only keep ranks in lockstep.
    """

    asked: tuple[int, ...]
    counted: int


class EvalPrompts:
    """Samples with a prompt and an expected answer, chosen once; every rank chooses the same ones.

    All of them are opened here, so that a sample with an unreadable file is left out on every rank. Media are decoded
    again for each evaluation.

    Args:
        dataset: Evaluation samples.
        processor: Processor of the checkpoint.
        count: Number of samples to choose.
        seed: Seed of the choice.
    """

    def __init__(self, dataset: ConversationDataset, processor: Any, count: int, seed: int) -> None:
        self._dataset = dataset
        self._processor = processor
        chosen, unusable = dict[int, Prediction](), 0
        for index in np.random.default_rng([seed, 2]).permutation(len(dataset)).tolist():
            if len(chosen) >= count:
                break
            try:
                chosen[index] = self._describe(index)
            except SampleError:
                unusable += 1
        self.lines = [chosen[index] for index in sorted(chosen)]
        self._kinds = [tuple(sorted({kind for kind, _ in line.media})) for line in self.lines]
        partners = find_partners(self.lines, seed)
        places = {key_of(line): number for number, line in enumerate(self.lines)}
        self._places = places
        self._partners = {places[key]: places[other] for key, other in partners.items()}
        logger.info(
            "Evaluations generate answers to %d samples%s.",
            len(self.lines),
            f"; {unusable} others cannot be used" if unusable else "",
        )

    def _describe(self, index: int) -> Prediction:
        """Return a prediction without an answer for the first sample of a row."""
        sample = self._dataset.samples(index)[0]
        example = open_example(sample, self._dataset.encoder)
        spec = self._dataset.tables[self._dataset.locate(index)[0]].table.spec
        line = Prediction(index, spec.name, sample.origin.file, sample.origin.line, sample.origin.id)
        return describe(line, sample, example, spec.options, self._dataset.encoder.settings)

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics of the expected answers, and of those of single datasets."""
        pairs = [(scores.metric.name, scores.dataset) for scores in evaluate(self.lines)]
        return sorted({name for name, _ in pairs} | {f"{name}{OF_DATASET}{dataset}" for name, dataset in pairs})

    @property
    def comparable(self) -> list[int]:
        """Numbers of the samples whose media can be swapped with another sample's."""
        return sorted(self._partners)

    @property
    def compared(self) -> list[str]:
        """Names of the datasets of :attr:`comparable`."""
        return sorted({self.lines[number].dataset for number in self.comparable})

    def chat_model(self, model: Any) -> ChatModel:
        """Return an chat_model, which renders prompts as in training."""
        return ChatModel(model, self._processor, self._dataset.encoder.template.kwargs)

    def open(self, number: int) -> EvalExample:
        """Decode a sample.

        Raises:
            SampleError: Its files can no longer be read.
        """
        return open_example(self._dataset.samples(self.lines[number].index)[0], self._dataset.encoder)

    def number_of(self, key: Key) -> int | None:
        """Return the number of a sample; None if it was not chosen."""
        return self._places.get(key)

    def media(self, number: int) -> list[Medium]:
        """Return the media of a sample as images, for a page.

        Raises:
            SampleError: Its files can no longer be read.
        """
        frames = self.open(number).prompt.frames
        return [Medium(tuple(Image.fromarray(one) for one in of_medium.numpy())) for of_medium in frames]

    def rounds(self, batch_size: int, rank: int, ranks: int) -> Iterator[Round]:
        """Yield the rounds of a rank; every rank gets the same number of rounds.

        In a round all ranks have samples with the same kinds of media, because transformers runs the vision tower once
        for images, once for videos and not for text: with ZeRO-3 or FSDP, the ranks would wait for each other.
        """
        for kinds in sorted(set(self._kinds)):
            group = [number for number, found in enumerate(self._kinds) if found == kinds]
            for start in range(0, len(group), batch_size * ranks):
                mine = tuple(group[start : start + batch_size * ranks][rank::ranks])
                yield Round(mine or (group[0],), len(mine))

    def view(self, number: int, view: View) -> EncodedSample:
        """Return a sample with its own media, blank media or those of its partner."""
        example = self.open(number)
        if view == "blank":
            example = example.showing(map(blank, example.prompt.frames))
        elif view == "swapped":
            example = example.showing(exchanged(example.prompt, self.open(self._partners[number]).prompt))
        return example.encoded

    def answered(self, answers: Sequence[tuple[int, Answer]]) -> list[Prediction]:
        """Return the predictions with their answers, in order.

        Args:
            answers: Pairs (number of the sample, answer), in any order.
        """
        ordered = sorted(answers, key=lambda pair: pair[0])
        return [with_answer(self.lines[number], answer) for number, answer in ordered]
