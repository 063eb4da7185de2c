"""Read and check the field ``label`` of samples.

===============  =====================================================================================================
classification   a name, or a whole number, which is converted to text
multilabel       a list of such names; an empty list means none of the classes
regression       a number, or a list of numbers of the same length in every sample
ranking          a list of relevances, numbers from 0 up, one for each image of the sample in order, not all equal
===============  =====================================================================================================
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from qwenvl.config.tasks import TaskName
from qwenvl.data.encoding.encoded import Plan
from qwenvl.data.types import Conversation, ImageItem, Sample
from qwenvl.utils.errors import SampleError, nearest

Label = str | tuple[str, ...] | tuple[float, ...]
"""A name, names, or numbers."""

_LISTED = 8


@dataclass(frozen=True)
class LabelReader:
    """Reader of labels; a :class:`qwenvl.data.encoding.targets.TargetReader`.

    Args:
        task: Name of the task.
        classes: Names of the classes in order; empty for a task without classes, or to accept any name.
        outputs: Numbers in a label of regression; 0 for any.
        needs_media: Whether each sample must have an image or video.
        prompts: Whether samples are rendered as questions, without their answers.
        optional: Whether a sample may have no label.
    """

    task: TaskName
    classes: tuple[str, ...] = ()
    outputs: int = 0
    needs_media: bool = False
    prompts: bool = True
    optional: bool = False

    @property
    def reads_plan(self) -> bool:
        """Labels do not depend on how a sample is rendered."""
        return False

    @property
    def fields(self) -> tuple[str, ...]:
        """The field of labels."""
        return ("label",)

    def label(self, sample: Sample) -> Label | None:
        """Return the label of a sample; None if it has none and labels are optional.

        Raises:
            SampleError: it is missing, of another type, or not one of the classes.
        """
        value = sample.record.get("label")
        if value is None and self.optional:
            return None
        try:
            label = _parse(self.task, value)
            for name in label if self.task == "multilabel" else [label] if self.task == "classification" else ():
                self._require_known(str(name))
            if self.task == "regression" and len(label) != (self.outputs or len(label)):
                raise wrong_label(f"it has {len(label)} numbers, while others have {self.outputs}")
        except SampleError as error:
            raise error.at(sample.origin) from None
        return label

    def check(self, sample: Sample, conversation: Conversation) -> None:
        """Check label and media.

        Raises:
            SampleError: the label is missing or wrong, or does not fit the media.
        """
        label, media = self.label(sample), conversation.media()
        if self.needs_media and not media:
            reason = "the sample has no image or video, which --pooling vision_mean needs."
            raise SampleError("no_media", reason, sample.origin)
        if self.task != "ranking":
            return
        if not all(isinstance(item, ImageItem) for item in media):
            raise SampleError("bad_label", "--task ranking ranks images, but the sample has a video.", sample.origin)
        if label is not None and len(label) != len(media):
            reason = (
                f"its 'label' has {len(label)} relevances for {len(media)} images; --task ranking needs one for each."
            )
            raise SampleError("bad_label", reason, sample.origin)

    def read(self, sample: Sample, plan: Plan) -> Any:
        """Return the target: index of the class, indices of classes, or numbers of the label; -1 without a label.

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
        """Return the settings that :meth:`check` depends on, as JSON values."""
        return [self.task, list(self.classes), self.outputs, self.needs_media, self.prompts, self.optional]

    def _require_known(self, name: str) -> None:
        if self.classes and name not in self.classes:
            more = f" and {len(self.classes) - _LISTED} more" if len(self.classes) > _LISTED else ""
            known = ", ".join(self.classes[:_LISTED]) + more
            raise SampleError(
                "unknown_label",
                f"its 'label' {name!r} is not one of the classes ({known}).{nearest(name, self.classes)} Correct it, "
                "or add the class to --class_names; without this flag, the classes are those of the training data.",
            )


def _parse(task: TaskName, value: Any) -> Label:
    if value is None:
        raise SampleError(
            "no_label",
            f"the sample has no 'label', which --task {task} needs. Add it; if the column has another name, name it in "
            'the registry entry: "columns": {"label": NAME}.',
        )
    if task == "classification":
        return _name(value)
    if task == "multilabel":
        if not isinstance(value, list | tuple):
            raise wrong_label("--task multilabel takes a list of names", value)
        return tuple(dict.fromkeys(_name(one) for one in value))
    if task == "regression":
        numbers = value if isinstance(value, list | tuple) else [value]
        return tuple(_number(one) for one in numbers) if numbers else _raise("it is an empty list")
    if not isinstance(value, list | tuple) or len(value) < 2:
        raise wrong_label("--task ranking takes a list of relevances, one for each of two or more images", value)
    relevances = tuple(_number(one) for one in value)
    if min(relevances) < 0 or len(set(relevances)) == 1:
        raise wrong_label("relevances have to be numbers from 0 up that are not all equal", value)
    return relevances


def _name(value: Any) -> str:
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    raise wrong_label("a class is a name or a whole number", value)


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise wrong_label("a finite number is needed", value)
    return float(value)


def wrong_label(problem: str, *value: Any) -> SampleError:
    """Return the error for an unusable label, with its value if it is given."""
    shown = f" {str(value[0])[:80]!r}" if value else ""
    return SampleError("bad_label", f"its 'label'{shown} cannot be used: {problem}.")


def _raise(problem: str) -> Any:
    raise wrong_label(problem)
