"""Samples of the evaluation data that are answered during training: the same ones at every evaluation."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from qwenvl.data.dataset import ConversationDataset
from qwenvl.data.encoding.encoded import EncodedSample
from qwenvl.evaluate.scoring import evaluate
from qwenvl.inference.batch import describe, exchanged, with_answer
from qwenvl.inference.generate import Answer, Answerer
from qwenvl.inference.other_images import Key, View, blank, find_partners, key_of
from qwenvl.inference.prompts import EvalExample, open_example
from qwenvl.metrics.predictions import Prediction
from qwenvl.report.answers import Medium
from qwenvl.utils.errors import SampleError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Round:
    """What the ranks answer at one time; each gets prompts with the same kinds of media.

    Args:
        asked: numbers of the samples that this rank asks; one of any rank where it has none left.
        counted: how many of them are its own; the rest only keeps it in step.
    """

    asked: tuple[int, ...]
    counted: int


class EvalPrompts:
    """Samples that can be asked, chosen once; every rank chooses the same ones.

    All of them are opened here, so that a file that cannot be read leaves out its sample on every rank alike; what they
    show is decoded anew for each evaluation.

    Args:
        dataset: evaluation samples.
        processor: of the checkpoint.
        count: how many are wanted.
        seed: of the choice.
    """

    def __init__(self, dataset: ConversationDataset, processor: Any, count: int, seed: int) -> None:
        self._dataset = dataset
        self._processor = processor
        chosen, passed_over = dict[int, Prediction](), 0
        for index in np.random.default_rng([seed, 2]).permutation(len(dataset)).tolist():
            if len(chosen) >= count:
                break
            try:
                chosen[index] = self._describe(index)
            except SampleError:
                passed_over += 1
        self.lines = [chosen[index] for index in sorted(chosen)]
        self._kinds = [tuple(sorted({kind for kind, _ in line.media})) for line in self.lines]
        partners = find_partners(self.lines, seed)
        places = {key_of(line): number for number, line in enumerate(self.lines)}
        self._places = places
        self._partners = {places[key]: places[other] for key, other in partners.items()}
        logger.info(
            "Evaluation asks %d samples%s.",
            len(self.lines),
            f"; {passed_over} others cannot be asked" if passed_over else "",
        )

    def _describe(self, index: int) -> Prediction:
        """Return a line about the first sample of a row."""
        sample = self._dataset.samples(index)[0]
        example = open_example(sample, self._dataset.encoder)
        spec = self._dataset.tables[self._dataset.locate(index)[0]].table.spec
        line = Prediction(index, spec.name, sample.origin.file, sample.origin.line, sample.origin.id)
        return describe(line, sample, example, spec.options, self._dataset.encoder.settings)

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics that the expected answers call for."""
        return sorted({scores.metric.name for scores in evaluate(self.lines)})

    @property
    def comparable(self) -> list[int]:
        """Numbers of the samples whose media can be exchanged for those of another one."""
        return sorted(self._partners)

    def answerer(self, model: Any) -> Answerer:
        """Return a model with what renders prompts as in training."""
        return Answerer(model, self._processor, self._dataset.encoder.template.kwargs)

    def open(self, number: int) -> EvalExample:
        """Decode a sample.

        Raises:
            SampleError: its files cannot be read any more.
        """
        return open_example(self._dataset.samples(self.lines[number].index)[0], self._dataset.encoder)

    def number_of(self, key: Key) -> int | None:
        """Return the number of a sample; None of one that is not asked."""
        return self._places.get(key)

    def media(self, number: int) -> list[Medium]:
        """Return what a sample shows, as pictures for a page.

        Raises:
            SampleError: its files cannot be read any more.
        """
        frames = self.open(number).prompt.frames
        return [Medium(tuple(Image.fromarray(one) for one in of_medium.numpy())) for of_medium in frames]

    def rounds(self, batch_size: int, rank: int, ranks: int) -> Iterator[Round]:
        """Yield what a rank asks, in as many rounds on every rank.

        In a round all ranks ask samples with the same kinds of media, because transformers runs the vision tower once
        for pictures, once for videos and not for text: under ZeRO-3 and FSDP the ranks would wait for each other.
        """
        for kinds in sorted(set(self._kinds)):
            group = [number for number, found in enumerate(self._kinds) if found == kinds]
            for start in range(0, len(group), batch_size * ranks):
                mine = tuple(group[start : start + batch_size * ranks][rank::ranks])
                yield Round(mine or (group[0],), len(mine))

    def view(self, number: int, view: View) -> EncodedSample:
        """Return a sample that shows its own media, blank ones or those of its partner."""
        example = self.open(number)
        if view == "blank":
            example = example.showing(map(blank, example.prompt.frames))
        elif view == "swapped":
            example = example.showing(exchanged(example.prompt, self.open(self._partners[number]).prompt))
        return example.encoded

    def answered(self, answers: Sequence[tuple[int, Answer]]) -> list[Prediction]:
        """Return the lines with their answers, in order: (number, answer) in any order."""
        ordered = sorted(answers, key=lambda pair: pair[0])
        return [with_answer(self.lines[number], answer) for number, answer in ordered]
