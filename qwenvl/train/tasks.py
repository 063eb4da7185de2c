"""What ``--task`` chooses: an objective, and what it wants to know of the samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from qwenvl.arguments import ParsedArguments
from qwenvl.data.dataset import SampledTable
from qwenvl.data.targets import TargetReader
from qwenvl.models.objective import Objective


@dataclass(frozen=True)
class Task:
    """What a run learns.

    Args:
        objective: how.
        targets: reads what it wants to know of each sample; None for language modelling.
    """

    objective: Objective = field(default_factory=Objective)
    targets: TargetReader | None = None


def open_task(parsed: ParsedArguments, tables: Sequence[SampledTable]) -> Task:
    """Return the task of a run; every rank has to call it.

    Args:
        parsed: its settings.
        tables: what is trained on, from which a task learns its classes, for instance.

    Raises:
        UserError: the settings or the data do not fit the task.
    """
    del tables
    assert parsed.tasks.task is None
    return Task()
