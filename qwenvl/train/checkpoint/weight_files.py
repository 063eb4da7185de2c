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

_OF_A_MODEL = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2}


def rewrite_weights(folder: Path, dtype: str, max_bytes: int) -> None:
    """Convert the weights in a folder to another data type, and split files that are too large.

    One file is in memory at a time. An adapter stays a single file, which PEFT requires.

    Args:
        folder: Folder of a model or an adapter that was just saved.
        dtype: Data type of the files: ``float32`` or ``bfloat16``; ``auto`` for no conversion.
        max_bytes: Largest size of one file in bytes; a tensor is never split.
    """
    adapter = folder / WEIGHTS_FILE
    files = [adapter] if adapter.is_file() else sorted(folder.glob("model*.safetensors"))
    headers = read_headers(files)
    shards = [list(headers)] if adapter.is_file() else list(_shards(headers, dtype, max_bytes))
    changes = dtype != "auto" and any(DTYPES.get(header.dtype, dtype) != dtype for header in headers.values())
    if not changes and len(shards) <= len(files):
        return
    rewritten = folder / ".rewritten"
    rewritten.mkdir()
    names = [adapter.name] if adapter.is_file() else _file_names(len(shards))
    for name, tensors in zip(names, shards, strict=True):
        save_file(dict(_read(headers, tensors, dtype)), rewritten / name, metadata={"format": "pt"})
    for file in files:
        file.unlink()
    for name in names:
        (rewritten / name).replace(folder / name)
    shutil.rmtree(rewritten)
    _describe(folder, dtype, names)


def add_tensors(folder: Path, tensors: Mapping[str, Header], max_bytes: int) -> None:
    """Add tensors of other files to the weights in a folder, bit for bit, in additional files after the existing ones.

    Args:
        folder: Folder of a model that was just saved.
        tensors: Tensors to copy, by their new names.
        max_bytes: Largest size of one new file in bytes; a tensor is never split.
    """
    old = sorted(folder.glob("model*.safetensors"))
    shards = list(_shards(tensors, "auto", max_bytes))
    names = _file_names(len(old) + len(shards))
    for file, name in zip(old, names, strict=False):
        file.rename(folder / name)
    for shard, name in zip(shards, names[len(old) :], strict=True):
        save_file(dict(_read(tensors, shard, "auto")), folder / name, metadata={"format": "pt"})
    _describe(folder, "auto", names)


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


def _shards(headers: Mapping[str, Header], dtype: str, max_bytes: int) -> Iterator[list[str]]:
    """Yield the names of the tensors of each file, in order."""
    names: list[str] = []
    used = 0
    for name, header in headers.items():
        size = _size(header, dtype)
        if names and used + size > max_bytes:
            yield names
            names, used = [], 0
        names.append(name)
        used += size
    if names:
        yield names


def _size(header: Header, dtype: str) -> int:
    element = {"float32": 4, "bfloat16": 2}.get(dtype) if header.dtype in DTYPES else None
    if element is None:
        element = _BYTES.get(header.dtype, 8)
    return element * int(torch.Size(header.shape).numel())


def _file_names(count: int) -> list[str]:
    return [WEIGHTS] if count == 1 else [f"model-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]


def _read(headers: Mapping[str, Header], names: Sequence[str], dtype: str) -> Iterator[tuple[str, torch.Tensor]]:
    for name in names:
        with safe_open(headers[name].file, "pt") as tensors:
            tensor = tensors.get_tensor(name)
        if dtype != "auto" and tensor.is_floating_point():
            tensor = tensor.to(getattr(torch, dtype))
        yield name, tensor


def _describe(folder: Path, dtype: str, files: Sequence[str]) -> None:
    """Write the index if there are several files, and the data type into the config."""
    headers = read_headers([folder / name for name in files])
    (folder / INDEX).unlink(missing_ok=True)
    if len(files) > 1:
        total = {
            "total_parameters": sum(int(torch.Size(header.shape).numel()) for header in headers.values()),
            "total_size": sum(_size(header, "auto") for header in headers.values()),
        }
        placed = {name: header.file.name for name, header in sorted(headers.items())}
        write_json(folder / INDEX, {"metadata": total, "weight_map": placed})
    config = folder / "config.json"
    if dtype != "auto" and config.is_file():
        said = json.loads(config.read_text(encoding="utf-8"))
        write_json(config, _with_dtype(said, dtype))


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    return {
        name: _with_dtype(value, dtype) if isinstance(value, dict) else dtype if name == "dtype" else value
        for name, value in config.items()
    }


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file in transformers' layout."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
