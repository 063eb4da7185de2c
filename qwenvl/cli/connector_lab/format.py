"""Formats results as the cells of a table and as a sentence."""

from __future__ import annotations

from typing import Any

from qwenvl.cli.connector_lab.runner import Result, collapse_of

COLUMNS = ("run", "tokens", "trained", "loss by epoch", "right", "95% CI", "swapped", "blank", "empty", "looks")
"""Columns of the table; right, swapped and blank are scores with the own, another sample's and a blank image."""

_SHOWN_EPOCHS = 5


def cells(result: Result) -> list[str]:
    """Return the texts of a result's row, in the order of :data:`COLUMNS`."""
    scores, answers = result["scores"][0]["score"], result["answers"]
    blind = _blind(result)
    return [
        result["name"],
        f"{result['tokens']}",
        told_number(trained(result)),
        losses(result),
        _percent(scores["value"]) if scores else "-",
        f"{_percent(scores['low'])} to {_percent(scores['high'])}" if scores else "-",
        _percent(blind["scores"]["swapped"]["value"]) if blind else "-",
        _percent(blind["scores"]["blank"]["value"]) if blind else "-",
        f"{answers['empty']}",
        looks(result),
    ]


def trained(result: Result) -> int:
    """Return the trainable parameters of the stage that has the most."""
    return max((sum(_parts(stage).values()) for stage in result["stages"]), default=0)


def _parts(stage: Result) -> dict[str, int]:
    return {part: number for part, number in stage["trained"].items() if part != "all"}


def trained_parts(result: Result) -> str:
    """Return the parts trained in each stage, in words."""
    names = {"vision": "encoder", "merger": "connector", "language": "language model"}
    stages = [
        " + ".join(names[part] for part, number in _parts(stage).items() if number) or "nothing"
        for stage in result["stages"]
    ]
    return ", then ".join(stages) or "nothing"


def losses(result: Result) -> str:
    """Return the held-out loss after each epoch, by stage."""
    stages = []
    for stage in result["stages"]:
        values = [f"{value:.2f}" for _, _, value in stage["held_out"]]
        cut = values[: _SHOWN_EPOCHS - 2] + ["…", values[-1]] if len(values) > _SHOWN_EPOCHS else values
        stages.append(" ".join(cut))
    return " | ".join(stages) or "-"


def looks(result: Result) -> str:
    """Return whether the answers depend on the image: the interval of the score's fall excludes zero."""
    if collapse_of(result["answers"]):
        return "COLLAPSED"
    blind = _blind(result)
    if not blind:
        return "-"
    if blind["score_falls"]["swapped"]["low"] > 0:
        return "yes"
    return "loss only" if blind["loss_rises"]["swapped"]["low"] > 0 else "no"


def verdict(result: Result) -> str:
    """Return the verdict of the blind test, after a warning if the generations collapse."""
    collapse = collapse_of(result["answers"])
    told = str(result["blind"][0]["verdict"]) if result["blind"] else ""
    return f"{collapse[0].upper()}{collapse[1:]}. {told}" if collapse else told


def told_number(number: int) -> str:
    """Return a number of parameters in few characters."""
    for limit, unit in ((1_000_000_000, "B"), (1_000_000, "M"), (1_000, "k")):
        if number >= limit:
            return f"{number / limit:.3g}{unit}"
    return f"{number}"


def _blind(result: Result) -> dict[str, Any] | None:
    first = result["blind"][0] if result["blind"] else None
    return first if first and first["count"] else None


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"
