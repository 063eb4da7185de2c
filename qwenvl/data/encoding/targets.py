"""Read the target of a task (``--task``) from a sample, besides its tokens; see :mod:`qwenvl.tasks.objective`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

from qwenvl.data.encoding.encoded import Plan
from qwenvl.data.types import Conversation, Sample
from qwenvl.utils.errors import SampleError


def as_question(conversation: Conversation) -> Conversation:
    """Return a conversation without the answer at its end, if there is one.

    Raises:
        SampleError: nothing is left.
    """
    messages = conversation.messages
    while messages and messages[-1].role == "assistant":
        messages = messages[:-1]
    if not any(message.role != "system" for message in messages):
        raise SampleError("no_question", "the sample has nothing before its answer. Add the turn that asks for it.")
    return replace(conversation, messages=messages)


def require_no_weights(conversation: Conversation) -> None:
    """Check that no answer has a weight, which a task would ignore: its loss is not that of the answers' tokens.

    Raises:
        SampleError: an answer has one.
    """
    if any(message.weight not in (0, 1) for message in conversation.messages):
        raise SampleError(
            "bad_record",
            "a turn has a weight other than 0 and 1, which --task does not read: answers are not what it learns. Take "
            "it out.",
        )


class TargetReader(Protocol):
    """Reads the target of each sample. Safe to send to other processes.

    Attributes:
        fields: Fields of a record that are read.
        prompts: Whether samples are rendered as questions: without the answer at their end, if they have one, and with
            the header of the next one. Otherwise they are rendered with answers, as in language modelling.
        reads_plan: Whether a target depends on the plan of its sample, so that :meth:`check` does not find every fault.
    """

    @property
    def fields(self) -> tuple[str, ...]:
        """Fields of a record that are read."""
        ...

    @property
    def prompts(self) -> bool:
        """Whether samples are rendered as questions."""
        ...

    @property
    def reads_plan(self) -> bool:
        """Whether a target depends on the plan of its sample."""
        ...

    def check(self, sample: Sample, conversation: Conversation) -> None:
        """Check a sample without opening its media.

        Raises:
            SampleError: its target is missing or wrong.
        """
        ...

    def read(self, sample: Sample, plan: Plan) -> Any:
        """Return the target of a sample: numbers, or arrays of them, in a form that is quickly sent to other processes.

        Args:
            sample: Sample with the record.
            plan: Plan of the sample: its conversation, rendering, tokens and media.

        Raises:
            SampleError: its target is missing or wrong.
        """
        ...

    def identity(self) -> list[Any]:
        """Return everything that :meth:`check` depends on, as values that JSON can hold."""
        ...
