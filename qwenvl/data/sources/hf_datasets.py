"""Read rows of Hugging Face datasets: folders and names that the ``datasets`` library opens, and Parquet with images.

The library keeps a dataset as memory-mapped Arrow files: reading a row costs only its own size, and processes share the
pages. Folders of ``save_to_disk`` are such files already; everything else, images included, is converted once into the
library's own cache (``$HF_DATASETS_CACHE``). Images stay as the bytes of their files.
"""

from __future__ import annotations

import dataclasses
import glob
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwenvl.data.sources.nulls import as_written
from qwenvl.data.types import HuggingFaceDataset
from qwenvl.utils.cache import fingerprint
from qwenvl.utils.errors import UserError

if TYPE_CHECKING:
    import datasets
    import pyarrow

_SAVED = ("dataset_dict.json", "state.json")  # a folder of save_to_disk has one of them


class DatasetRows:
    """The rows of one split.

    Args:
        dataset: Split of the dataset.
        path: Name of the split, for messages.
        content: Hash of its content.
    """

    def __init__(self, dataset: datasets.Dataset, path: str, content: str) -> None:
        self.path = path
        self.fingerprint = content
        self.schema: pyarrow.Schema = dataset.data.schema
        self._dataset = dataset.with_format("arrow")
        has_json = any("arrow.json" in str(field.type) for field in self.schema)
        self._json = _undecoded(dataset.features) if has_json else None

    def __len__(self) -> int:
        return len(self._dataset)

    def line(self, row: int) -> int:
        """Return the place of a row in the split, counted from 1."""
        return row + 1

    def record(self, row: int) -> dict[str, Any]:
        """Read a row; see :class:`qwenvl.data.sources.table.Rows`."""
        table = self._dataset[row]
        record: dict[str, Any] = table.to_pylist()[0]
        return as_written(record if self._json is None else dict(self._json.decode_example(record)), table.schema)

    def text(self, row: int) -> None:
        """Return None: the rows of a table have no text."""


def open_dataset(source: HuggingFaceDataset) -> DatasetRows:
    """Open one split of a dataset.

    Raises:
        UserError: the library cannot open it, or it has no such split.
    """
    folder = Path(source.name)
    saved = any((folder / name).is_file() for name in _SAVED)
    found = _open_saved(source) if saved else _load(source)
    dataset = _choose_split(found, source)
    files = [Path(file["filename"]) for file in dataset.cache_files]
    # The library's fingerprint covers the content of files that it made itself.
    content = [(file.name, os.stat(file).st_size, os.stat(file).st_mtime_ns if saved else 0) for file in files]
    own = fingerprint(dataset._fingerprint, len(dataset), content)
    return DatasetRows(dataset, f"{source.name} ({source.split})", own)


def open_parquet(path: str, content: str) -> DatasetRows:
    """Open a Parquet file with images: reading it by row groups would take too long.

    Args:
        path: Parquet file.
        content: Hash of its content.

    Raises:
        UserError: the library cannot open it.
    """
    import datasets

    try:
        found = datasets.load_dataset("parquet", data_files=[glob.escape(path)], split="train", keep_in_memory=False)
    except Exception as error:  # whatever the library meets in the file or in its cache
        raise UserError(f"the datasets library cannot open it: {_reason(error)}") from error
    return DatasetRows(found, path, content)


def _open_saved(source: HuggingFaceDataset) -> datasets.Dataset | datasets.DatasetDict:
    import datasets

    for key in ("config", "revision"):
        if getattr(source, key) is not None:
            raise UserError(f"{source.name} was written by save_to_disk, so it has no {key!r}: take that out.")
    try:
        return datasets.load_from_disk(source.name, keep_in_memory=False)
    except Exception as error:  # whatever the library meets in the folder
        raise UserError(f"the dataset in {source.name} cannot be opened: {_reason(error)}") from error


def _load(source: HuggingFaceDataset) -> datasets.DatasetDict:
    import datasets

    try:
        return datasets.load_dataset(source.name, source.config, revision=source.revision, keep_in_memory=False)
    except Exception as error:  # whatever the library meets in the folder or on the way to the hub
        where = f"the dataset in {source.name} cannot be opened"
        if not os.path.isabs(source.name):
            where = (
                f"{source.name!r} is no folder here, and the hub's dataset of that name cannot be opened (where there "
                "is no network, download it beforehand, or name a folder)"
            )
        raise UserError(f"{where}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """Return the messages of an error and its cause in one line, each cut to a readable length."""
    causes = [error] if error.__cause__ is None else [error, error.__cause__]
    return "; ".join(f"{type(cause).__name__}: {' '.join(str(cause).split())[:500]}" for cause in causes)


def _choose_split(found: datasets.Dataset | datasets.DatasetDict, source: HuggingFaceDataset) -> datasets.Dataset:
    if isinstance(found, dict):
        if source.split not in found:
            raise UserError(f"{source.name} has no split {source.split!r}. It has: {', '.join(map(str, found))}.")
        return found[source.split]
    own = "train" if found.split is None else str(found.split)
    if source.split != own:
        raise UserError(f"{source.name} has no split {source.split!r}. It has: {own}.")
    return found


def _undecoded(features: datasets.Features) -> datasets.Features:
    """Return features that decode JSON and leave images as bytes."""
    import datasets

    return datasets.Features({name: _without_media(feature) for name, feature in features.items()})


def _without_media(feature: Any) -> Any:
    if isinstance(feature, dict):
        return {name: _without_media(inner) for name, inner in feature.items()}
    if hasattr(feature, "feature"):  # a list
        return dataclasses.replace(feature, feature=_without_media(feature.feature))
    if hasattr(feature, "decode") and type(feature).__name__ != "Json":
        return dataclasses.replace(feature, decode=False)
    return feature
