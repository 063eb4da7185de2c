"""Compare the settings of a resumed run with those of the run that saved its checkpoint."""

from __future__ import annotations

import enum
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from qwenvl.config import AdapterArguments, all_settings
from qwenvl.config.lora import target_parts
from qwenvl.config.parsing.fields import Setting, convert
from qwenvl.config.parsing.recipes import read_recipe
from qwenvl.config.training import default_optimizer
from qwenvl.models.lora.files import start_anew
from qwenvl.train.checkpoint.folder import read_step
from qwenvl.train.records.run_info import setting_text
from qwenvl.train.records.serving import SERVING
from qwenvl.train.resume.hyperparameters import STATEFUL_SCHEDULES
from qwenvl.train.resume.settings_table import Row, row_of
from qwenvl.utils.errors import UserError

logger = logging.getLogger(__name__)

SETTINGS_FILE = "training_args.yaml"
"""File in every checkpoint with the settings that the user gave."""

_OF_BEST = ("metric_for_best_model", "greater_is_better", "eval_dataset_use")
_OF_SCHEDULE = ("learning rates", "schedule")


@dataclass(frozen=True, slots=True)
class Change:
    """A setting that differs from the run that saved a checkpoint.

    Args:
        name: Name of the setting.
        row: Row of the table for this setting; None if it has none.
        before: Value in the run that saved the checkpoint.
        now: Value in this run.
    """

    name: str
    row: Row | None
    before: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name}: {_text(self.before)} -> {_text(self.now)}"


def compare_settings(checkpoint: str, given: Mapping[str, Any]) -> list[Change]:
    """Compare the settings of a checkpoint with those of the resumed run, and log the changes that take effect.

    Args:
        checkpoint: Folder to resume from.
        given: Settings that the user gave, by name; everything else is a default.

    Returns:
        Changes that take effect; none if the checkpoint has no record of settings, like those of the stock Trainer.

    Raises:
        UserError: Some of the settings cannot change.
    """
    saved = _read_saved(checkpoint)
    if saved is None:
        logger.warning("%s holds no %s: its settings cannot be compared.", checkpoint, SETTINGS_FILE)
        return []
    before, now = in_force(saved), in_force(given)
    if not (Path(checkpoint) / SERVING).is_file() and "history" not in saved:
        before["history"] = "as_rendered"  # the only behaviour when such checkpoints were written
    changes = [
        Change(name, row_of(name), before[name], value)
        for name, value in now.items()
        if name in before and before[name] != value
    ]
    stateful = not {before["lr_scheduler_type"], now["lr_scheduler_type"]}.isdisjoint(STATEFUL_SCHEDULES)
    refused = [change for change in changes if _is_refused(change, stateful=stateful)]
    if refused:
        lines = "".join(f"\n  {change} ({change.row.subject}: {change.row.reason})" for change in refused if change.row)
        raise UserError(
            f"{checkpoint} was saved with other settings, and cannot be resumed with these:{lines}\n"
            f"Resume with the settings of {Path(checkpoint) / SETTINGS_FILE}; or {start_anew(checkpoint)}."
        )
    effective = [change for change in changes if change.row is None or change.row.outcome == "takes effect"]
    for change in effective:
        logger.warning("%s from step %d on.", change, read_step(checkpoint) + 1)
    return effective


def forgets_best(changes: list[Change]) -> bool:
    """Whether the best metric of the earlier run is not comparable with those of this one."""
    return any(change.name in _OF_BEST for change in changes)


def in_force(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the effective settings: with defaults, aliases merged, and settings without effect left out.

    ``ignore_data_skip``, which only concerns the position in the data, is left out too.

    Args:
        given: Settings that a user gave, by name.
    """
    values = {name: _plain(setting.default) for name, setting in all_settings().items()}
    values |= {name: _plain(value) for name, value in given.items()}
    values["optim"] = values["optim"] or default_optimizer(use_cpu=bool(values["use_cpu"]))
    ratio, target = values.pop("warmup_ratio"), values["lora_target"]
    values["warmup_steps"] = values["warmup_steps"] if ratio is None else ratio
    values["lora_target"] = ",".join(target_parts(target) or (target,))
    idle = {"ignore_data_skip"} | ({"num_train_epochs"} if values["max_steps"] > 0 else set())
    if not values["lora_enable"]:
        idle |= {field.name for field in fields(AdapterArguments)} - {"lora_enable"}
    if values["metric_for_best_model"] is None:
        tracked = values["load_best_model_at_end"] or values["lr_scheduler_type"] in STATEFUL_SCHEDULES
        values["metric_for_best_model"] = "loss" if tracked else None
    if values["greater_is_better"] is None and values["metric_for_best_model"]:
        values["greater_is_better"] = not values["metric_for_best_model"].endswith("loss")
    return {name: value for name, value in values.items() if name not in idle}


def _is_refused(change: Change, *, stateful: bool) -> bool:
    row = change.row
    return row is not None and (row.outcome == "refused" or (stateful and row.subject in _OF_SCHEDULE))


def _read_saved(checkpoint: str) -> dict[str, Any] | None:
    """Return the settings that a checkpoint was saved with, without settings that no longer exist.

    Raises:
        UserError: The record is damaged.
    """
    path = Path(checkpoint) / SETTINGS_FILE
    if not path.is_file():
        return None
    try:
        return dict(_converted(read_recipe(str(path)), all_settings()))
    except ValueError as error:  # UserError is one
        raise UserError(f"{path} cannot be read: {error}. It was written with the checkpoint: restore it.") from error


def _converted(saved: Mapping[str, Any], settings: Mapping[str, Setting]) -> Iterator[tuple[str, Any]]:
    for name, value in saved.items():
        if name in settings and value is not None:
            yield name, convert(settings[name], value)


def _plain(value: Any) -> Any:
    """Return a value for comparison: the text of an enumeration's member; None for an empty list or mapping."""
    if isinstance(value, enum.Enum):
        return value.value
    return None if value in ({}, []) else value


def _text(value: Any) -> str:
    if isinstance(value, float):
        return str(value).removesuffix(".0")
    return "not set" if value in (None, "") else setting_text(value)
