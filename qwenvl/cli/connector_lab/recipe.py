"""Recipes of experiments: the parts, and the training stages of each run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, get_args

from qwenvl.cli.connector_lab.build import ConnectorSettings
from qwenvl.config.parsing.recipes import read_recipe
from qwenvl.connector_lab.config import Connector
from qwenvl.utils.cache import fingerprint
from qwenvl.utils.errors import UserError, nearest

DRAWN = "drawn"
"""Value of ``data`` in recipes whose images are drawn by ``tools/make_demo_data.py --kind lab``."""

_NAME = re.compile(r"[\w.-]+")
_OF_RECIPE = ("encoder", "language_model", "data", "drop_layers", "connector", "train", "evaluate", "runs")
_OF_RUN = ("about", "group", "start", "connector", "train", "stages", "shown")
_LIMITS = ("min_pixels", "max_pixels")
_SET_BY_TOOL = ("model_name_or_path", "output_dir")


@dataclass(frozen=True)
class Run:
    """One experiment.

    Args:
        name: Name of the run and its folder.
        about: Description in words.
        group: Heading under which the run is shown.
        start: Run whose encoder and language model it starts from; None for the recipe's own.
        connector: Kind and sizes of the connector.
        stages: Settings of the trainer for each stage; a stage starts from the checkpoint of the previous one.
        shown: Show the run as a result; false for runs that only serve as a start of others.
    """

    name: str
    about: str
    group: str
    start: str | None
    connector: ConnectorSettings
    stages: tuple[Mapping[str, Any], ...]
    shown: bool = True


@dataclass(frozen=True)
class Recipe:
    """Experiments on the same parts.

    Args:
        encoder: Folder or name; ``tiny:clip`` for random weights (see ``qwenvl/cli/make_tiny_checkpoint/parts.py``).
        language_model: Folder or name, or ``tiny:llama`` and the like.
        data: :data:`DRAWN`, or None if the datasets are in the registry.
        drop_layers: See :func:`qwenvl.cli.connector_lab.build.build_lab`.
        evaluate: Flags of ``tools/evaluate.py``.
        limits: Pixel limits of training by the names of the flags, for runs without a training stage.
        runs: Runs in order; each comes after the one it starts from.
    """

    encoder: str
    language_model: str
    data: str | None
    drop_layers: int | None
    evaluate: Mapping[str, Any]
    limits: Mapping[str, Any]
    runs: tuple[Run, ...] = field(default=())

    def key(self, run: Run) -> str:
        """Return a hash of all settings of the recipe that the result of a run depends on."""
        before = self.key(self.run(run.start)) if run.start is not None else ""
        parts = (self.encoder, self.language_model, str(self.data), str(self.drop_layers))
        told = {name: value for name, value in asdict(run).items() if name not in ("about", "group", "shown")}
        return fingerprint(*parts, self.evaluate, {} if run.stages else self.limits, told, before)

    def run(self, name: str) -> Run:
        """Return a run by its name."""
        return next(run for run in self.runs if run.name == name)


def read_experiments(path: str) -> Recipe:
    """Read a recipe of experiments.

    Raises:
        UserError: It cannot be read, or something in it is unknown or missing.
    """
    content = read_recipe(path)
    _require_known(content, _OF_RECIPE, f"recipe {path}")
    missing = [name for name in ("encoder", "language_model", "evaluate", "runs") if not content.get(name)]
    if missing:
        raise UserError(f"recipe {path}: {', '.join(missing)} is missing; configs/lab/connectors.yaml has an example.")
    if content.get("data") not in (None, DRAWN):
        raise UserError(
            f"recipe {path}: data is {content['data']!r}; it may be {DRAWN!r}, or be left out if the datasets "
            "are in a registry (dataset_registry under train and evaluate)."
        )
    runs: list[Run] = []
    for name, told in content["runs"].items():
        runs.append(_read_run(str(name), told or {}, content, path, [run.name for run in runs]))
    return Recipe(
        encoder=str(content["encoder"]),
        language_model=str(content["language_model"]),
        data=content.get("data"),
        drop_layers=content.get("drop_layers"),
        evaluate=content["evaluate"],
        limits={name: value for name, value in (content.get("train") or {}).items() if name in _LIMITS},
        runs=tuple(runs),
    )


def _read_run(name: str, told: Mapping[str, Any], content: Mapping[str, Any], path: str, before: list[str]) -> Run:
    where = f"recipe {path}, run {name}"
    _require_known(told, _OF_RUN, where)
    if not _NAME.fullmatch(name):
        raise UserError(f"{where}: a name becomes a folder; use letters, digits, '-', '_' and '.'.")
    start = told.get("start")
    if start is not None and start not in before:
        raise UserError(
            f"{where}: start is {start!r}, which is not a run above it ({', '.join(before) or 'there is none'})."
        )
    connector = told.get("connector") or {}
    connector = {"connector": connector} if isinstance(connector, str) else connector
    stages = [told["train"]] if told.get("train") is not None else told.get("stages") or []
    return Run(
        name=name,
        about=str(told.get("about", name)),
        group=str(told.get("group", "Runs")),
        start=start,
        connector=_connector({**(content.get("connector") or {}), **connector}, where),
        stages=tuple(_stage(stage, content.get("train") or {}, where) for stage in stages),
        shown=bool(told.get("shown", True)),
    )


def _connector(told: Mapping[str, Any], where: str) -> ConnectorSettings:
    _require_known(told, tuple(one.name for one in fields(ConnectorSettings)), f"{where}, connector")
    settings = ConnectorSettings(**told)
    if settings.connector not in get_args(Connector):
        raise UserError(f"{where}: connector {settings.connector!r} is not one of {', '.join(get_args(Connector))}.")
    return settings


def _stage(stage: Any, common: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """Return the settings common to all runs, overridden by those of the stage, from the recipe or a file."""
    own = read_recipe(stage) if isinstance(stage, str) else stage
    if not isinstance(own, dict):
        raise UserError(f"{where}: a stage is the settings of the trainer, or the name of a file with them.")
    if chosen := [name for name in _SET_BY_TOOL if name in own or name in common]:
        raise UserError(f"{where}: leave out {', '.join(chosen)}: the lab sets it, stage after stage.")
    return {**common, **own}


def _require_known(told: Any, names: tuple[str, ...], where: str) -> None:
    if not isinstance(told, dict):
        raise UserError(f"{where}: expected names with values, found {told!r}.")
    for name in told:
        if name not in names:
            raise UserError(f"{where}: {name!r} is not one of {', '.join(names)}.{nearest(str(name), names)}")
