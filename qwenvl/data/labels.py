"""The field ``label`` of samples: read, checked, and counted before training.

===============  =====================================================================================================
classification   a name, or a whole number, which counts as the name it is written as
multilabel       a list of such names; an empty one means none of the classes
regression       a number, or a list of numbers, as many in every sample
ranking          a list of relevances, numbers from 0 up, one for each picture of the sample in order, not all equal
===============  =====================================================================================================
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from qwenvl.data.dataset import SampledTable
from qwenvl.data.encoding import Plan
from qwenvl.data.types import Conversation, ImageItem, Sample
from qwenvl.utilities.errors import SampleError, UserError, nearest

LabelTask = Literal["classification", "regression", "multilabel", "ranking"]
Label = str | tuple[str, ...] | tuple[float, ...]
"""A name, names, or numbers."""

_LISTED = 8


@dataclass(frozen=True)
class LabelReader:
    """Reads labels; a :class:`qwenvl.data.targets.TargetReader`.

    Args:
        task: what labels are.
        classes: names in their order; empty where there are none, or any name may come.
        outputs: numbers in a label of regression; 0 for any.
        needs_media: each sample must have a picture or video.
        prompts: samples are rendered as questions.
        optional: a sample may have no label; its target is None then.
    """

    task: LabelTask
    classes: tuple[str, ...] = ()
    outputs: int = 0
    needs_media: bool = False
    prompts: bool = True
    optional: bool = False

    def label(self, sample: Sample) -> Label | None:
        """Return the label of a sample; None where it may have none.

        Raises:
            SampleError: it is missing, of another kind, or none of the classes.
        """
        value = sample.record.get("label")
        if value is None and self.optional:
            return None
        try:
            label = _parse(self.task, value)
            for name in label if self.task == "multilabel" else [label] if self.task == "classification" else ():
                self._require_known(str(name))
            if self.task == "regression" and len(label) != (self.outputs or len(label)):
                raise _wrong(f"it has {len(label)} numbers, and others have {self.outputs}")
        except SampleError as error:
            raise error.at(sample.origin) from None
        return label

    def check(self, sample: Sample, conversation: Conversation) -> None:
        """Look at label and media.

        Raises:
            SampleError: the label is missing or wrong, or does not fit the media.
        """
        label, media = self.label(sample), conversation.media()
        if self.needs_media and not media:
            reason = "the sample has no picture or video, and --pooling vision_mean reads nothing else."
            raise SampleError("no_media", reason, sample.origin)
        if self.task != "ranking":
            return
        if not all(isinstance(item, ImageItem) for item in media):
            raise SampleError("bad_label", "--task ranking ranks pictures, and the sample has a video.", sample.origin)
        if label is not None and len(label) != len(media):
            reason = (
                f"its 'label' has {len(label)} relevances for {len(media)} pictures; --task ranking needs one each."
            )
            raise SampleError("bad_label", reason, sample.origin)

    def read(self, sample: Sample, plan: Plan) -> Any:
        """Return the number of a class; the numbers of classes; or the numbers of the label. -1 without a label.

        Raises:
            SampleError: as :meth:`label`.
        """
        del plan
        label = self.label(sample)
        if label is None:
            return -1
        if self.task == "classification":
            return self.classes.index(str(label))
        if self.task == "multilabel":
            return tuple(sorted(self.classes.index(str(name)) for name in label))
        return label

    def identity(self) -> list[Any]:
        """Return what :meth:`check` depends on, as values that JSON can hold."""
        return [self.task, list(self.classes), self.outputs, self.needs_media, self.prompts, self.optional]

    def _require_known(self, name: str) -> None:
        if self.classes and name not in self.classes:
            more = f" and {len(self.classes) - _LISTED} more" if len(self.classes) > _LISTED else ""
            known = ", ".join(self.classes[:_LISTED]) + more
            raise SampleError(
                "unknown_label",
                f"its 'label' {name!r} is none of the classes ({known}).{nearest(name, self.classes)} Correct it, or "
                "add the class (--class_names; without it, classes are those of the training data).",
            )


def _parse(task: LabelTask, value: Any) -> Label:
    if value is None:
        raise SampleError(
            "no_label",
            f"the sample has no 'label', from which --task {task} learns. Add it; where the column has another name, "
            'say so in the registry entry: "columns": {"label": NAME}.',
        )
    if task == "classification":
        return _name(value)
    if task == "multilabel":
        if not isinstance(value, list | tuple):
            raise _wrong("--task multilabel takes a list of names", value)
        return tuple(dict.fromkeys(_name(one) for one in value))
    if task == "regression":
        numbers = value if isinstance(value, list | tuple) else [value]
        return tuple(_number(one) for one in numbers) if numbers else _raise("it is an empty list")
    if not isinstance(value, list | tuple) or len(value) < 2:
        raise _wrong("--task ranking takes a list of relevances, one for each of two or more pictures", value)
    relevances = tuple(_number(one) for one in value)
    if min(relevances) < 0 or len(set(relevances)) == 1:
        raise _wrong("relevances are numbers from 0 up, and not all equal: there would be nothing to rank", value)
    return relevances


def _name(value: Any) -> str:
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    raise _wrong("a class is a name or a whole number", value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _wrong("a finite number is needed", value)
    return float(value)


def _wrong(problem: str, *value: Any) -> SampleError:
    shown = f" {str(value[0])[:80]!r}" if value else ""
    return SampleError("bad_label", f"its 'label'{shown} cannot be used: {problem}.")


def _raise(problem: str) -> Any:
    raise _wrong(problem)


@dataclass
class LabelStatistics:
    """What is known of the labels that are trained on.

    Args:
        samples: how many there are.
        names: how often each class comes.
        sums: of the numbers, by their place.
        squares: of their squares.
    """

    samples: int = 0
    names: Counter[str] = field(default_factory=Counter)
    sums: list[float] = field(default_factory=list)
    squares: list[float] = field(default_factory=list)

    def add(self, label: Label, task: LabelTask, times: int = 1) -> None:
        """Count a label that is used so many times."""
        self.samples += times
        if task == "classification":
            self.names[str(label)] += times
        elif task == "multilabel":
            self.names.update({str(name): times for name in label})
        elif task == "regression":
            numbers = [float(one) for one in label]
            self.sums = self.sums or [0.0] * len(numbers)
            self.squares = self.squares or [0.0] * len(numbers)
            self.sums = [total + times * one for total, one in zip(self.sums, numbers, strict=True)]
            self.squares = [total + times * one * one for total, one in zip(self.squares, numbers, strict=True)]

    def mean_and_deviation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return them for each number of the labels; a deviation of 0 becomes 1."""
        means = [total / self.samples for total in self.sums]
        spreads = [max(total / self.samples - mean**2, 0.0) for total, mean in zip(self.squares, means, strict=True)]
        small = [1e-12 * (1 + mean**2) for mean in means]
        deviations = [math.sqrt(one) if one > least else 1.0 for one, least in zip(spreads, small, strict=True)]
        return tuple(means), tuple(deviations)


def count_labels(tables: Iterable[SampledTable], reader: LabelReader, *, skip: bool) -> LabelStatistics:
    """Read the labels of all rows that are used; nothing else of the rows is looked at.

    Args:
        tables: the datasets.
        reader: of the labels. Without ``classes`` any name is taken; without ``outputs`` the first label decides.
        skip: leave rows out that cannot be used, rather than stop at the first one; training reports them.

    Raises:
        SampleError: a label is missing or wrong.
    """
    found = LabelStatistics()
    for table in tables:
        for row, times in Counter(table.rows.tolist()).items():
            try:
                for sample in table.table[row]:
                    label = reader.label(sample)
                    if label is not None:
                        _require_as_long(found, label, reader, sample)
                        found.add(label, reader.task, times)
            except SampleError as error:
                if not skip:
                    hint = "(--on_bad_sample skip leaves such samples out.)"
                    raise SampleError(error.category, f"{error.reason} {hint}", error.origin) from None
    return found


def _require_as_long(found: LabelStatistics, label: Label, reader: LabelReader, sample: Sample) -> None:
    if reader.task == "regression" and found.sums and len(label) != len(found.sums):
        raise _wrong(f"it has {len(label)} numbers, and earlier ones have {len(found.sums)}").at(sample.origin)


def order_classes(names: Iterable[str]) -> tuple[str, ...]:
    """Return classes in the order of their numbers where all are whole numbers, else in alphabetical order."""
    found = set(names)
    numbers = all(name.lstrip("-").isdecimal() for name in found)
    return tuple(sorted(found, key=int if numbers else str))


def read_class_names(path: str) -> tuple[str, ...]:
    """Read a file of class names, one a line; empty lines are passed over.

    Raises:
        UserError: it cannot be read, names fewer than two classes, or one twice.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--class_names {path}: it cannot be read: {error}. It is a text with one name a line."
        ) from error
    names = tuple(line.strip() for line in lines if line.strip())
    twice = [name for name, count in Counter(names).items() if count > 1]
    if len(names) < 2 or twice:
        problem = f"{twice[0]!r} stands there twice" if twice else f"it names {len(names)} classes"
        raise UserError(f"--class_names {path}: {problem}. It is a text with one name a line, two or more.")
    return names


def class_weights(
    flag: str | None, by_name: Mapping[str, float], counts: Mapping[str, int], classes: Sequence[str]
) -> tuple[float, ...]:
    """Return what each class weighs; nothing where all weigh alike.

    ``balanced``: samples / (classes x samples of the class), so that the mean over the samples is 1 (as scikit-learn).

    Raises:
        UserError: a name is none of the classes.
    """
    if flag is None:
        return ()
    if flag != "balanced":
        for name in by_name:
            if name not in classes:
                raise UserError(f"--class_weights: {name!r} is none of the classes.{nearest(name, classes)}")
        return tuple(by_name.get(name, 1.0) for name in classes)
    total = sum(counts.values())
    return tuple(total / (len(classes) * counts[name]) if counts.get(name) else 0.0 for name in classes)
