"""Results of the doctor's checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["good", "note", "warning", "bad"]


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of one check.

    Args:
        level: ``good``; ``note``: worth knowing; ``warning``: slower or riskier than it could be; ``bad``: training
            would fail or be wrong.
        what: Name of the checked item.
        found: State of the item.
        advice: Advice with its reason; empty if all is well.
    """

    level: Level
    what: str
    found: str
    advice: str = ""
