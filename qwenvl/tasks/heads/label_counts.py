"""Statistics of all labels, computed before training: classes and their counts, or means and standard deviations."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qwenvl.config.tasks import TaskArguments, TaskName
from qwenvl.data.dataset import SampledTable
from qwenvl.data.types import Sample
from qwenvl.tasks.heads.labels import Label, LabelReader, wrong_label
from qwenvl.utils.errors import SampleError, UserError, nearest


@dataclass
class LabelStatistics:
    """Statistics of the training labels.

    Args:
        samples: Number of labels.
        names: Count of each class.
        sums: Sum of each number of the labels.
        squares: Sum of squares of each number of the labels.
    """

    samples: int = 0
    names: Counter[str] = field(default_factory=Counter)
    sums: list[float] = field(default_factory=list)
    squares: list[float] = field(default_factory=list)

    def add(self, label: Label, task: TaskName, times: int = 1) -> None:
        """Add a label that is used ``times`` times."""
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
        """Return mean and standard deviation of each number of the labels; a deviation of 0 becomes 1."""
        means = [total / self.samples for total in self.sums]
        spreads = [max(total / self.samples - mean**2, 0.0) for total, mean in zip(self.squares, means, strict=True)]
        small = [1e-12 * (1 + mean**2) for mean in means]
        deviations = [math.sqrt(one) if one > least else 1.0 for one, least in zip(spreads, small, strict=True)]
        return tuple(means), tuple(deviations)


def count_labels(tables: Iterable[SampledTable], reader: LabelReader, *, skip: bool) -> LabelStatistics:
    """Read the labels of all rows that are used; no other field is checked.

    Args:
        tables: Datasets with their rows.
        reader: Reader of labels. Without ``classes`` it accepts any name; without ``outputs`` the first label decides.
        skip: Whether to skip unusable rows, which training reports, instead of raising at the first one.

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
        raise wrong_label(f"it has {len(label)} numbers, and earlier ones have {len(found.sums)}").at(sample.origin)


def order_classes(names: Iterable[str]) -> tuple[str, ...]:
    """Return classes in numerical order if all are whole numbers, else in alphabetical order."""
    found = set(names)
    numbers = all(name.lstrip("-").isdecimal() for name in found)
    return tuple(sorted(found, key=int if numbers else str))


def read_class_names(path: str) -> tuple[str, ...]:
    """Read a file of class names, one per line; empty lines are ignored.

    Raises:
        UserError: it cannot be read, names fewer than two classes, or names one twice.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--class_names {path} cannot be read: {error}. It has to be a text file with one name per line."
        ) from error
    names = tuple(line.strip() for line in lines if line.strip())
    twice = [name for name, count in Counter(names).items() if count > 1]
    if len(names) < 2 or twice:
        problem = f"it names {twice[0]!r} twice" if twice else f"it names {len(names)} classes"
        raise UserError(f"--class_names {path}: {problem}. It needs two or more different names, one per line.")
    return names


def label_reader(chosen: TaskArguments) -> LabelReader:
    """Return a reader of the labels of a task, from the flags alone.

    Raises:
        UserError: the file of class names cannot be used.
    """
    assert chosen.task is not None and chosen.task != "grounding"
    return LabelReader(
        chosen.task,
        classes=read_class_names(chosen.class_names) if chosen.class_names else (),
        needs_media=chosen.chosen_pooling == "vision_mean",
        prompts=not chosen.keep_answer,
    )


def class_weights(
    flag: str | None, by_name: Mapping[str, float], counts: Mapping[str, int], classes: Sequence[str]
) -> tuple[float, ...]:
    """Return the weight of each class; empty for equal weights.

    ``balanced``: samples / (classes x samples of the class), so that the mean over samples is 1 (as in scikit-learn).

    Raises:
        UserError: a name is not one of the classes.
    """
    if flag is None:
        return ()
    if flag != "balanced":
        for name in by_name:
            if name not in classes:
                raise UserError(f"--class_weights: {name!r} is not one of the classes.{nearest(name, classes)}")
        return tuple(by_name.get(name, 1.0) for name in classes)
    total = sum(counts.values())
    return tuple(total / (len(classes) * counts[name]) if counts.get(name) else 0.0 for name in classes)
