"""The rows to train on: those of each dataset without the samples that are dropped."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from qwenvl.cli.data_args import chosen_datasets
from qwenvl.cli.rank_samples.arguments import RankArguments
from qwenvl.cli.write_rows import write_rows
from qwenvl.data.sources.registry import load_registry, parse_dataset_use
from qwenvl.data.sources.table import AnnotationTable, open_annotations
from qwenvl.data.types import DatasetSpec, Sample
from qwenvl.evaluate.ranking import Key, Ranked
from qwenvl.utils.cache import replacing
from qwenvl.utils.errors import UserError

_SETTINGS = "training_args.yaml"


@dataclass(frozen=True)
class Lists:
    """The annotations of the ranked datasets.

    Args:
        tables: Opened annotations by name of the dataset.
    """

    tables: Mapping[str, AnnotationTable]

    @cached_property
    def _rows(self) -> dict[tuple[str, str, int], int]:
        """Row of each (dataset, file, line)."""
        places = ((name, table.origin(row), row) for name, table in self.tables.items() for row in range(len(table)))
        return {(name, place.file, place.line): row for name, place, row in places}

    def row(self, key: Key) -> int:
        """Return the row of a sample in its dataset.

        Raises:
            UserError: There is none any more.
        """
        dataset, file, line, _ = key
        if (dataset, file, line) not in self._rows:
            raise UserError(f"Dataset {dataset!r} has no {file}:{line}: it was changed after the losses were made.")
        return self._rows[dataset, file, line]

    def sample(self, key: Key) -> Sample:
        """Return a sample.

        Raises:
            SampleError: It cannot be read.
            UserError: There is no such sample any more.
        """
        return self.tables[key[0]][self.row(key)][(key[3] or 1) - 1]

    def write(self, folder: Path, drop: set[Key]) -> dict[str, tuple[int, int]]:
        """Write ``NAME_kept.jsonl`` of each dataset; return (rows kept, samples dropped) by name."""
        found = {}
        for name, table in self.tables.items():
            left_out: dict[int, set[int]] = {}
            for key in drop:
                if key[0] == name:
                    left_out.setdefault(self.row(key), set()).add((key[3] or 1) - 1)
            path = folder / f"{name.replace(os.sep, '_')}_kept.jsonl"
            if any(os.path.exists(rows.path) and path.exists() and path.samefile(rows.path) for rows in table.files):
                raise UserError(f"{path} is an annotation file of dataset {name!r}. Choose another --output folder.")
            with replacing(path) as temporary:
                rows = write_rows(table, left_out, temporary)
            found[name] = (rows, sum(map(len, left_out.values())))
        return found


def open_lists(arguments: RankArguments, ranked: Sequence[Ranked]) -> Lists:
    """Open the annotations of the ranked samples: by the registry, or the files themselves where it lacks a dataset.

    Raises:
        UserError: They cannot be opened.
    """
    files: dict[str, dict[str, None]] = {}
    for one in ranked:
        files.setdefault(one.key[0], {})[one.key[1]] = None
    specs = _specs(arguments, list(files))
    tables = {}
    for name, paths in files.items():
        table = open_annotations(specs[name], arguments.data_cache_dir) if name in specs else None
        if table is None or not paths.keys() <= {rows.path for rows in table.files}:
            table = open_annotations(DatasetSpec(name, tuple(sorted(paths)), ""), arguments.data_cache_dir)
        tables[name] = table
    return Lists(tables)


def _specs(arguments: RankArguments, names: Sequence[str]) -> dict[str, DatasetSpec]:
    """Return the registered datasets by name; those of the run that wrote the losses, if no flag names any."""
    if arguments.dataset_use or arguments.annotation_path:
        return {spec.name: spec for spec in chosen_datasets(arguments)}
    given = arguments.dataset_registry or _recorded_registry(arguments)
    try:
        registry = load_registry(given)
    except UserError:
        if arguments.dataset_registry:
            raise
        return {}
    return {name: parse_dataset_use(name, registry)[0] for name in names if name in registry}


def _recorded_registry(arguments: RankArguments) -> str | None:
    """Return the registry that a run's settings name; None if they are not beside its losses, or name none."""
    if not arguments.sample_losses:
        return None
    file = Path(arguments.sample_losses[0]).parent / _SETTINGS
    try:
        settings: Any = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return None
    found = settings.get("dataset_registry") if isinstance(settings, dict) else None
    return found if isinstance(found, str) else None


def read_decisions(path: Path) -> dict[Key, bool]:
    """Read the decisions of the page: whether each of some samples is kept.

    Raises:
        UserError: The file cannot be read, or a line is no decision.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"--decisions {path} cannot be read: {error.strerror}. The page's buttons save it.") from error
    found = {}
    for number, line in enumerate(lines, start=1):
        try:
            one = json.loads(line)
            found[one["dataset"], one["file"], int(one["line"]), one.get("member")] = bool(one["keep"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"--decisions {path}:{number} is no decision of the page ({error!r}).") from error
    return found


def apply_decisions(drop: set[Key], decisions: Mapping[Key, bool]) -> set[Key]:
    """Return the samples to drop after the decisions of the page."""
    return {key for key in {*drop, *decisions} if not decisions.get(key, False)}
