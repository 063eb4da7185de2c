"""Read the dataset registry: from ``--dataset_use "a%50,b"`` to the files of each dataset.

A registry is a Python file (or a folder with an ``__init__.py``) that defines ``data_dict``, as in the official recipe.
Its entries have one of two keys, and any of the others:

===================  ===================================================================================================
``annotation_path``  a file, a glob pattern (``"train/*.jsonl"``, ``"**/*.parquet"``), or a list of these. What a
                     pattern finds is sorted. A file is used once, even if it is named several times (with a warning);
                     ``name%200`` uses a dataset twice
``hf_dataset``       dataset of the ``datasets`` library: a folder (``save_to_disk``, Parquet, JSON Lines, images), or a
                     name on the Hub; with ``split`` (``"train"`` if left out), ``config`` and ``revision``
``data_path``        folder of the media, or ``""``; with ``hf_dataset`` it may be left out
``columns``          ``{"image": "photo"}``: the field ``image`` is called ``photo`` in the rows
``allow_absolute``   absolute paths of media may lie outside ``data_path``
``bbox_format``      see :mod:`qwenvl.data.conversation.boxes.convert`
``history``          these three like the flags of the same names, which they override
``loss_on``
``chat_template_kwargs``
``metric``           metric of its answers in evaluations, see :mod:`qwenvl.metrics.registry`
===================  ===================================================================================================

Relative paths in it start from the folder that holds it: for ``my_registry.py`` the folder of that file, for
``data/__init__.py`` the folder that holds ``data/``. They never depend on the working directory.

Where no registry is named, it is ``data/__init__.py`` of the repository, or, where this package was installed from a
wheel, of the working directory.
"""

from __future__ import annotations

import importlib.util
import itertools
import re
import sys
import traceback
from collections.abc import Mapping
from decimal import Decimal
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any, get_args

from qwenvl.data.sources.record_forms import FORM_FIELDS
from qwenvl.data.sources.registry_paths import annotation_paths, data_folder
from qwenvl.data.types import SAMPLE_OPTIONS, TRAINING_OPTIONS, DatasetSpec, History, HuggingFaceDataset, LossOn
from qwenvl.utils.checkout import CHECKOUT
from qwenvl.utils.errors import UserError, nearest

SOURCE_KEYS = ("annotation_path", "hf_dataset")  # an entry has one of them
RECORD_FIELDS = (
    *("conversations", "messages", "image", "images", "video", "videos"),
    *("system", "tools", "id", "bbox_format", "objects", "label", "masks", *SAMPLE_OPTIONS),
    *FORM_FIELDS,
)  # fields that "columns" can name

_OWN_KEYS = (*SOURCE_KEYS, "data_path", "columns", "split", "config", "revision")
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
_PERCENT = re.compile(r"[0-9]+(\.[0-9]*)?|\.[0-9]+")
_module_numbers = itertools.count()


class Registry(dict[str, dict[str, Any]]):
    """The entries of one ``data_dict``, by name.

    Args:
        entries: Entries as written.
        file: File that they were read from.
        base: Folder that their relative paths start from.
    """

    def __init__(self, entries: Mapping[str, dict[str, Any]], file: Path, base: Path) -> None:
        super().__init__(entries)
        self.file = file
        self.base = base


def load_registry(path: str | None = None) -> Registry:
    """Read ``data_dict`` from a registry file.

    Args:
        path: Python file, or a folder with an ``__init__.py``; None for the default one.

    Raises:
        UserError: the file is missing or does not run, or ``data_dict`` is missing or has names that cannot be used.
    """
    file = _registry_file(Path(path).expanduser() if path is not None else _default_registry())
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
        dataset_use: Names separated by commas.
        registry: Registry of :func:`load_registry`, or a plain dict with relative paths from the working folder.
        flag: Flag with the names, for messages.

    Raises:
        UserError: an empty list, an unknown name, a percent that is not a number above 0, or an entry that is not
            usable: keys are missing, or its files do not exist.
    """
    percents: dict[str, Decimal] = {}
    for item in filter(None, (item.strip() for item in dataset_use.split(","))):
        name, percent = _split_percent(item, flag)
        _require_known(name, registry, flag)
        percents[name] = percents.get(name, Decimal(0)) + percent
    if not percents:
        raise UserError(
            f"{flag} names no dataset. Give names from {_source(registry)}, such as 'a%50,b'. "
            f"It has: {_known_names(registry)}."
        )
    return [_to_spec(name, registry, float(percent)) for name, percent in percents.items()]


def _default_registry() -> Path:
    return (CHECKOUT or Path.cwd()) / "data" / "__init__.py"


def _registry_file(path: Path) -> Path:
    file = path / "__init__.py" if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"Dataset registry {file} does not exist. Give --dataset_registry a .py file with a data_dict.")
    return file.resolve()


class _SourceLoader(SourceFileLoader):
    """Runs a file as it is now. Python would run cached code of an earlier version with the same time and size."""

    def get_code(self, fullname: str) -> CodeType:
        return self.source_to_code(self.get_data(self.path), self.path)


def _run_file(file: Path) -> ModuleType:
    """Run a registry file as a module of its own, which ``import data`` elsewhere can neither hide nor replace."""
    name = f"_qwenvl_dataset_registry_{next(_module_numbers)}"
    folders = [str(file.parent)] if file.name == "__init__.py" else None
    loader = _SourceLoader(name, str(file))
    spec = importlib.util.spec_from_file_location(name, file, loader=loader, submodule_search_locations=folders)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # so that a registry folder can import its own files
    try:
        loader.exec_module(module)
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


def _split_percent(item: str, flag: str) -> tuple[str, Decimal]:
    """Return name and percentage, as a Decimal because sums of floats are inexact: 7.6 + 92.1 is below 99.7."""
    name, sign, percent = item.partition("%")
    if not sign:
        return name, Decimal(100)
    if not _PERCENT.fullmatch(percent.strip()) or float(percent) <= 0:
        raise UserError(
            f"{flag} {item!r}: after '%' stands the percent of the dataset to use, a number above 0 "
            f"such as {name}%50, {name}%12.5 or {name}%250; not {percent!r}."
        )
    return name.strip(), Decimal(percent.strip())


def _require_known(name: str, registry: Mapping[str, Mapping[str, Any]], flag: str) -> None:
    if name not in registry:
        raise UserError(
            f"Dataset {name!r} of {flag} is not in {_source(registry)}.{nearest(name, registry)} "
            f"It has: {_known_names(registry)}. Add an entry there, or give another file by --dataset_registry."
        )


def _to_spec(name: str, registry: Mapping[str, Mapping[str, Any]], percent: float) -> DatasetSpec:
    entry = registry[name]
    where = f"Dataset {name!r} in {_source(registry)}"
    source = _source_key(entry, where)
    base = registry.base if isinstance(registry, Registry) else Path.cwd()
    of_files = source == "annotation_path"
    return DatasetSpec(
        name=name,
        annotation_paths=annotation_paths(entry[source], base, where) if of_files else (),
        data_path=data_folder(entry.get("data_path", ""), base, where),
        sampling_percent=percent,
        hf_dataset=None if of_files else _hf_dataset(entry, base, where),
        columns=_columns(entry.get("columns", {}), where),
        options={key: value for key, value in entry.items() if key not in _OWN_KEYS},
    )


def _source_key(entry: Any, where: str) -> str:
    """Return the key with the source of an entry's rows; refuse an entry with missing or superfluous keys."""
    if not isinstance(entry, Mapping):
        raise UserError(f"{where}: an entry is a dict with annotation_path and data_path, not {entry!r}.")
    given = [key for key in SOURCE_KEYS if key in entry]
    if len(given) > 1:
        raise UserError(f"{where} has {' and '.join(map(repr, given))}: keep the one that holds its rows.")
    for key in () if given == ["hf_dataset"] else ("annotation_path", "data_path"):
        if key not in entry:
            hint = nearest(key, (str(known) for known in entry))
            more = ' It may be "".' if key == "data_path" else " (Or 'hf_dataset'.)"
            raise UserError(f"{where} has no {key!r}.{hint}{more}")
    known = (*_OWN_KEYS, *TRAINING_OPTIONS, "allow_absolute", "bbox_format", "metric")
    for key in entry:
        if key not in known:
            hint = nearest(str(key), known)
            raise UserError(f"{where} has {key!r}, which has no effect.{hint} It may have: {', '.join(known)}.")
    _check_training_options(entry, where)
    for key in ("split", "config", "revision"):
        if key in entry and given != ["hf_dataset"]:
            raise UserError(f"{where} has {key!r}, which goes with 'hf_dataset' alone. Take it out.")
    return given[0]


def _check_training_options(entry: Mapping[str, Any], where: str) -> None:
    for key, choices in (("history", get_args(History)), ("loss_on", get_args(LossOn))):
        if key in entry and entry[key] not in choices:
            raise UserError(f"{where}: {key!r} is {entry[key]!r}, not one of {', '.join(choices)}.")
    if not isinstance(entry.get("chat_template_kwargs", {}), Mapping):
        raise UserError(f"{where}: 'chat_template_kwargs' must be a dict, not {entry['chat_template_kwargs']!r}.")


def _hf_dataset(entry: Mapping[str, Any], base: Path, where: str) -> HuggingFaceDataset:
    for key in ("hf_dataset", "split", "config", "revision"):
        value = entry.get(key)
        if (value is not None or key == "hf_dataset") and not (isinstance(value, str) and value):
            raise UserError(f"{where}: {key!r} must be a name, not {value!r}.")
    folder = base / Path(entry["hf_dataset"]).expanduser()
    if folder.is_file() or not (folder.is_dir() or _HUB_NAME.fullmatch(entry["hf_dataset"])):
        problem = "is a file: name it as 'annotation_path'" if folder.is_file() else "does not exist"
        raise UserError(f"{where}: the folder of its 'hf_dataset', {folder}, {problem}.")
    return HuggingFaceDataset(
        name=str(folder) if folder.is_dir() else entry["hf_dataset"],
        split=entry.get("split") or "train",
        config=entry.get("config"),
        revision=entry.get("revision"),
    )


def _columns(value: Any, where: str) -> dict[str, str]:
    if not isinstance(value, Mapping) or not all(isinstance(name, str) and name for name in value.values()):
        raise UserError(f'{where}: \'columns\' must be a dict such as {{"image": "photo"}}, not {value!r}.')
    for field in value:
        if field not in RECORD_FIELDS:
            hint = nearest(str(field), RECORD_FIELDS)
            raise UserError(f"{where}: 'columns' names {field!r}, which is none of {', '.join(RECORD_FIELDS)}.{hint}")
    return dict(value)


def _source(registry: Mapping[str, Any]) -> str:
    return f"the registry {registry.file}" if isinstance(registry, Registry) else "the registry"


def _known_names(registry: Mapping[str, Any]) -> str:
    names = sorted(registry)
    return ", ".join(names[:20]) + (f" and {len(names) - 20} more" if len(names) > 20 else "") or "no entries"
