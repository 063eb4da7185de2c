"""Read the records that a run keeps in its output folder, finished or not."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from qwenvl.config.parsing.recipes import read_recipe
from qwenvl.evaluate.answer_log import AnswerLog
from qwenvl.evaluate.scoring import evaluate
from qwenvl.metrics.bootstrap import Interval
from qwenvl.report.compare_page import RunRecord
from qwenvl.train.records.run_info import DATA_FILE, VERSIONS_FILE, setting_text
from qwenvl.train.resume.settings import SETTINGS_FILE
from qwenvl.utils.errors import UserError

_STATE = "trainer_state.json"
_EVALUATION = "evaluation.json"
# The folder is the run's name, and where it was started from is no setting of the training.
_NAMES_OF_RUNS = ("output_dir", "run_name", "logging_dir")


def read_runs(folders: Sequence[str]) -> list[RunRecord]:
    """Read the records of runs; each is named by what its folder's path does not share with the others.

    Raises:
        UserError: Fewer than two folders, the same one twice, or one that is not the output of a run, or is damaged.
    """
    paths = [Path(folder).resolve() for folder in folders]
    if len(paths) < 2:
        raise UserError("Name at least two output folders of training runs to compare.")
    if len(set(paths)) < len(paths):
        raise UserError("An output folder is named twice: each is one run.")
    return [_read(path, name) for path, name in zip(paths, _names(paths), strict=True)]


def _names(paths: Sequence[Path]) -> list[str]:
    common = os.path.commonpath([path.parent for path in paths])
    return [str(path.relative_to(common)) for path in paths]


def _read(folder: Path, name: str) -> RunRecord:
    place = next((one for one in _places(folder) if (one / _STATE).is_file() and (one / SETTINGS_FILE).is_file()), None)
    if place is None:
        raise UserError(
            f"{folder} is not the output of a training run: neither it nor a checkpoint-* in it has {_STATE} and "
            f"{SETTINGS_FILE}."
        )
    settings = read_recipe(str(place / SETTINGS_FILE))
    return RunRecord(
        name,
        {key: setting_text(value) for key, value in settings.items() if key not in _NAMES_OF_RUNS},
        _json(place / VERSIONS_FILE, {}),
        _describe_data(_json(place / DATA_FILE, [])),
        _json(place / _STATE, {})["log_history"],
        {**_answered(folder), **_evaluated(folder)},
    )


def _places(folder: Path) -> Iterator[Path]:
    """Yield the folder of the finished model, then the checkpoints from the latest on."""
    yield folder
    numbered = [(one, one.name.removeprefix("checkpoint-")) for one in folder.glob("checkpoint-*")]
    yield from (one for one, step in sorted(numbered, key=lambda pair: -int(pair[1])) if step.isdigit())


def _json(path: Path, absent: Any) -> Any:
    """Parse a file.

    Raises:
        UserError: It is there and not JSON.
    """
    if not path.is_file():
        return absent
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}). Copy it again, or leave this run out.") from error


def _describe_data(data: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return the rows of each dataset in words; changed annotations differ by their hash."""
    found = {}
    for one in data:
        rows = f"{one['rows']:,} of {one['available']:,} rows"
        found[f"{one['dataset']}, {one['use']}"] = f"{rows}, annotations {one['fingerprint'][:8]}"
    return found


def _answered(folder: Path) -> dict[str, Interval]:
    """Return the score of each dataset at the last evaluation while training, with its interval."""
    answers = AnswerLog(folder).read()
    last = evaluate([one.line for one in answers if one.step == answers[-1].step])
    intervals = {f"{one.dataset}, {one.metric.name}, while training": one.interval() for one in last}
    return {name: interval for name, interval in intervals.items() if interval is not None}


def _evaluated(folder: Path) -> dict[str, Interval]:
    """Return the scores that tools/evaluate.py left in the folder, or in a folder inside it."""
    found = {}
    for path in (folder / _EVALUATION, *sorted(folder.glob(f"*/{_EVALUATION}"))):
        for one in _json(path, {}).get("datasets", ()):
            if one["score"] is not None:
                found[f"{one['dataset']}, {one['metric']}"] = Interval(**one["score"])
    return found
