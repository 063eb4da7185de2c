"""Rewrite the weight files of a finished model: data type (``--save_dtype``) and size (``--max_shard_size``)."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from qwenvl.models.lora.files import WEIGHTS_FILE
from qwenvl.train.checkpoint.folder_check import DTYPES, INDEX, WEIGHTS, Header, read_headers
from qwenvl.train.checkpoint.saved_types import SavedTypes

_OF_A_MODEL = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


def rewrite_weights(folder: Path, types: SavedTypes, max_bytes: int) -> None:
    """Convert the weights in a folder to other data types, and split files that are too large.

    One file is in memory at a time. An adapter stays a single file, which PEFT requires.

    Args:
        folder: Folder of a model or an adapter that was just saved.
        types: Data types of the tensors in the files.
        max_bytes: Largest size of one file in bytes; a tensor is never split.
    """
    adapter = folder / WEIGHTS_FILE
    files = [adapter] if adapter.is_file() else sorted(folder.glob("model*.safetensors"))
    headers = read_headers(files)
    changes = _changes(headers, types)
    shards = [list(headers)] if adapter.is_file() else list(_shards(headers, changes, max_bytes))
    if not changes and len(shards) <= len(files):
        return
    rewritten = folder / ".rewritten"
    rewritten.mkdir()
    names = [adapter.name] if adapter.is_file() else _file_names(len(shards))
    for name, tensors in zip(names, shards, strict=True):
        save_file(dict(_read(headers, tensors, changes)), rewritten / name, metadata={"format": "pt"})
    for file in files:
        file.unlink()
    for name in names:
        (rewritten / name).replace(folder / name)
    shutil.rmtree(rewritten)
    _describe(folder, names, types)


def _changes(headers: Mapping[str, Header], types: SavedTypes) -> dict[str, torch.dtype]:
    """Return the new types of the tensors that get another one."""
    own = {name: _dtype(header) for name, header in headers.items() if header.dtype in DTYPES}
    return {name: new for name, dtype in own.items() if (new := types.of(name, dtype)) != dtype}


def add_tensors(folder: Path, tensors: Mapping[str, Header], max_bytes: int) -> None:
    """Add tensors of other files to the weights in a folder, bit for bit, in additional files after the existing ones.

    Args:
        folder: Folder of a model that was just saved.
        tensors: Tensors to copy, by their new names.
        max_bytes: Largest size of one new file in bytes; a tensor is never split.
    """
    old = sorted(folder.glob("model*.safetensors"))
    shards = list(_shards(tensors, {}, max_bytes))
    names = _file_names(len(old) + len(shards))
    for file, name in zip(old, names, strict=False):
        file.rename(folder / name)
    for shard, name in zip(shards, names[len(old) :], strict=True):
        save_file(dict(_read(tensors, shard)), folder / name, metadata={"format": "pt"})
    _describe(folder, names)


def remove_older_weights(folder: Path, written: Sequence[str]) -> None:
    """Remove weight files of an earlier model, which transformers would read as part of the new one.

    Args:
        folder: Folder of the model.
        written: Names of the files that were just written. If none of them holds weights, nothing is removed.
    """
    if not any(_OF_A_MODEL.fullmatch(name) for name in written):
        return
    for file in folder.iterdir():
        if _OF_A_MODEL.fullmatch(file.name) and file.name not in written:
            file.unlink()


def _shards(headers: Mapping[str, Header], changes: Mapping[str, torch.dtype], max_bytes: int) -> Iterator[list[str]]:
    """Yield the names of the tensors of each file, in order."""
    names: list[str] = []
    used = 0
    for name, header in headers.items():
        size = _size(header, changes.get(name))
        if names and used + size > max_bytes:
            yield names
            names, used = [], 0
        names.append(name)
        used += size
    if names:
        yield names


def _size(header: Header, dtype: torch.dtype | None = None) -> int:
    """Return the bytes of a tensor, in another type if one is given."""
    element = dtype.itemsize if dtype else _dtype(header).itemsize if header.dtype in DTYPES else 8
    return element * torch.Size(header.shape).numel()


def _dtype(header: Header) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, DTYPES[header.dtype])
    return dtype


def _file_names(count: int) -> list[str]:
    return [WEIGHTS] if count == 1 else [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]


def _read(
    headers: Mapping[str, Header], names: Sequence[str], changes: Mapping[str, torch.dtype] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    for name in names:
        with safe_open(headers[name].file, "pt") as tensors:
            yield name, tensors.get_tensor(name).to((changes or {}).get(name))


def _describe(folder: Path, files: Sequence[str], types: SavedTypes | None = None) -> None:
    """Write the index if there are several files, and the data type of most weights into the config."""
    headers = read_headers([folder / name for name in files])
    (folder / INDEX).unlink(missing_ok=True)
    if len(files) > 1:
        total = {
            "total_parameters": sum(int(torch.Size(header.shape).numel()) for header in headers.values()),
            "total_size": sum(_size(header) for header in headers.values()),
        }
        placed = {name: header.file.name for name, header in sorted(headers.items())}
        write_json(folder / INDEX, {"metadata": total, "weight_map": placed})
    config = folder / "config.json"
    if types is not None and config.is_file():
        said = json.loads(config.read_text(encoding="utf-8"))
        dtype = types.usual(getattr(torch, said.get("dtype") or "float32"))
        write_json(config, _with_dtype(said, str(dtype).removeprefix("torch.")))


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    return {
        name: _with_dtype(value, dtype) if isinstance(value, dict) else dtype if name == "dtype" else value
        for name, value in config.items()
    }


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file in transformers' layout."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
