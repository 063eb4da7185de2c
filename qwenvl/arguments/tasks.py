"""What is learned besides language: a task, and the module that is trained for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

TaskName = Literal["classification", "regression", "multilabel", "ranking"]


@dataclass
class TaskArguments:
    """Flags of tasks. Every field is explained by its ``help``.

    Raises:
        UserError: values that contradict each other or are out of range.
    """

    task: TaskName | None = field(
        default=None, metadata={"help": "What is learned in the place of language. Default: language modelling."}
    )
