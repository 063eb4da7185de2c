"""What the doctor finds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Level = Literal["good", "note", "warning", "bad"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Args:
        level: ``good``; ``note``: worth knowing; ``warning``: slower or riskier than it could be; ``bad``: training
            would fail or be wrong.
        what: that was looked at.
        found: what there is.
        advice: what to do, and why; empty where all is well.
    """

    level: Level
    what: str
    found: str
    advice: str = ""
