"""The dataset registry: from ``--dataset_use "a%50,b"`` to the files of each dataset.

A registry is a Python file (or a folder with an ``__init__.py``) that defines ``data_dict``, as in the official recipe.
Relative paths in it start from the folder that holds it: for ``my_registry.py`` the folder of that file, for
``data/__init__.py`` the folder that holds ``data/``. They never depend on the working directory.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from qwenvl.data.types import DatasetSpec
from qwenvl.utilities.errors import UserError, nearest

DEFAULT_REGISTRY = Path(__file__).resolve().parents[2] / "data"
REQUIRED_KEYS = ("annotation_path", "data_path")

_PERCENT = re.compile(r"[0-9]+(\.[0-9]*)?|\.[0-9]+")
_module_numbers = itertools.count()


class Registry(dict[str, dict[str, Any]]):
    """The entries of one ``data_dict``, by name.

    Args:
        entries: the entries as written.
        file: the file they were read from.
        base: folder that their relative paths start from.
    """

    def __init__(self, entries: Mapping[str, dict[str, Any]], file: Path, base: Path) -> None:
        super().__init__(entries)
        self.file = file
        self.base = base


def load_registry(path: str | None = None) -> Registry:
    """Read ``data_dict`` from a registry file.

    Args:
        path: a ``.py`` file, or a folder with an ``__init__.py``; None for the ``data/`` folder beside this package.

    Raises:
        UserError: the file is missing or does not run, or ``data_dict`` is missing or has names that cannot be used.
    """
    file = _registry_file(Path(path).expanduser() if path is not None else DEFAULT_REGISTRY)
    module = _run_file(file)
    entries = getattr(module, "data_dict", None)
    if not isinstance(entries, Mapping):
        found = "nothing of that name" if entries is None else f"a {type(entries).__name__}"
        raise UserError(f"{file}: a dataset registry must define data_dict = {{...}}; it has {found}.")
    for name in entries:
        if not isinstance(name, str) or not name.strip() or name != name.strip() or re.search("[%,]", name):
            raise UserError(
                f"{file}: {name!r} cannot be a dataset name. Names are text without '%', ',' and outer spaces."
            )
    is_package = file.name == "__init__.py"
    return Registry(entries, file, file.parents[1] if is_package else file.parent)


def parse_dataset_use(
    dataset_use: str, registry: Mapping[str, Mapping[str, Any]], flag: str = "--dataset_use"
) -> list[DatasetSpec]:
    """Turn ``--dataset_use`` into the datasets it names, in order of first mention.

    ``name%X`` uses X percent of the rows; X may be a decimal, and above 100 repeats rows. A name that stands twice
    is used once with the sum of its percents, so that ``a%50,a%50`` is all of ``a`` and not one half twice.

    Args:
        dataset_use: names separated by commas.
        registry: what :func:`load_registry` returned. (Relative paths of a plain dict start from the working folder.)
        flag: where the names were given, for messages.

    Raises:
        UserError: an empty list, an unknown name, a percent that is not a number above 0, or an entry that is not
            usable: keys are missing, or its files do not exist.
    """
    percents: dict[str, float] = {}
    for item in filter(None, (item.strip() for item in dataset_use.split(","))):
        name, percent = _split_percent(item, flag)
        _require_known(name, registry, flag)
        percents[name] = percents.get(name, 0.0) + percent
    if not percents:
        raise UserError(
            f"{flag} names no dataset. Give names from {_source(registry)}, such as 'a%50,b'. "
            f"It has: {_known_names(registry)}."
        )
    return [_to_spec(name, registry, percent) for name, percent in percents.items()]


def _registry_file(path: Path) -> Path:
    file = path / "__init__.py" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"Dataset registry {file} does not exist. Give --dataset_registry a .py file with a data_dict.")
    return file.resolve()


def _run_file(file: Path) -> ModuleType:
    """Run a registry file as a module of its own, which ``import data`` elsewhere can neither hide nor replace."""
    name = f"_qwenvl_dataset_registry_{next(_module_numbers)}"
    folders = [str(file.parent)] if file.name == "__init__.py" else None
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=folders)
    if spec is None or spec.loader is None:
        raise UserError(f"Dataset registry {file} is not a Python file. Give --dataset_registry a .py file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # so that a registry folder may import its own files
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the user's own code raises
        line = _failing_line(error, file)
        where = f"line {line}: " if line else ""
        raise UserError(f"Dataset registry {file} does not run: {where}{type(error).__name__}: {error}") from error
    finally:
        del sys.modules[name]
    return module


def _failing_line(error: Exception, file: Path) -> int | None:
    if isinstance(error, SyntaxError):
        return error.lineno
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(file)]
    return lines[-1] if lines else None


def _split_percent(item: str, flag: str) -> tuple[str, float]:
    name, sign, percent = item.partition("%")
    if not sign:
        return name, 100.0
    if not _PERCENT.fullmatch(percent.strip()) or float(percent) <= 0:
        raise UserError(
            f"{flag} {item!r}: after '%' stands the percent of the dataset to use, a number above 0 "
            f"such as {name}%50, {name}%12.5 or {name}%250; not {percent!r}."
        )
    return name.strip(), float(percent)


def _require_known(name: str, registry: Mapping[str, Mapping[str, Any]], flag: str) -> None:
    if name not in registry:
        raise UserError(
            f"Dataset {name!r} of {flag} is not in {_source(registry)}.{nearest(name, registry)} "
            f"It has: {_known_names(registry)}. Add an entry there, or give another file by --dataset_registry."
        )


def _to_spec(name: str, registry: Mapping[str, Mapping[str, Any]], percent: float) -> DatasetSpec:
    entry = registry[name]
    where = f"Dataset {name!r} in {_source(registry)}"
    if not isinstance(entry, Mapping):
        raise UserError(f"{where}: an entry is a dict with {' and '.join(REQUIRED_KEYS)}, not {entry!r}.")
    for key in REQUIRED_KEYS:
        if key not in entry:
            hint = nearest(key, (str(known) for known in entry))
            empty = ' It may be "".' if key == "data_path" else ""
            raise UserError(f"{where} has no {key!r}.{hint}{empty}")
    base = registry.base if isinstance(registry, Registry) else Path.cwd()
    return DatasetSpec(
        name=name,
        annotation_paths=_annotation_paths(entry["annotation_path"], base, where),
        data_path=_data_path(entry["data_path"], base, where),
        sampling_percent=percent,
        options={key: value for key, value in entry.items() if key not in REQUIRED_KEYS},
    )


def _annotation_paths(value: Any, base: Path, where: str) -> tuple[str, ...]:
    items = list(value) if isinstance(value, list | tuple) else [value]
    if not items or not all(isinstance(item, str | Path) and str(item) for item in items):
        raise UserError(f"{where}: 'annotation_path' must be a file or a list of files, not {value!r}.")
    paths = tuple(base / Path(item).expanduser() for item in items)
    for item, path in zip(items, paths, strict=True):
        if not path.is_file():
            problem = "is a folder, not a file" if path.is_dir() else "does not exist"
            raise UserError(f"{where}: annotation file {path} {problem}.{_relative_hint(item, base)}")
    return tuple(str(path) for path in paths)


def _data_path(value: Any, base: Path, where: str) -> str:
    if not isinstance(value, str | Path):
        raise UserError(f"{where}: 'data_path' must be a folder, or \"\"; not {value!r}.")
    if value == "":
        return ""
    path = base / Path(value).expanduser()
    if not path.is_dir():
        raise UserError(
            f"{where}: the folder of its media, {path}, does not exist.{_relative_hint(value, base)} "
            'Write "data_path": "" where the annotations hold absolute paths or no media.'
        )
    return str(path)


def _relative_hint(value: str | Path, base: Path) -> str:
    return "" if Path(value).expanduser().is_absolute() else f" (Relative paths start from {base}.)"


def _source(registry: Mapping[str, Any]) -> str:
    return f"the registry {registry.file}" if isinstance(registry, Registry) else "the registry"


def _known_names(registry: Mapping[str, Any]) -> str:
    names = sorted(registry)
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "") or "no entries"
