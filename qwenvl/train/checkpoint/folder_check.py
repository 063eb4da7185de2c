"""Check a saved folder from its small files and the headers of its weights, without loading them."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from qwenvl.families import ModelLayout, get_family
from qwenvl.models.lora.files import CONFIG_FILE, WEIGHTS_FILE
from qwenvl.models.moe_checkpoint import weight_files
from qwenvl.models.mtp.layer import is_mtp
from qwenvl.utils.errors import UserError

BLAME = (
    "The folder was kept, but do not use it before the cause is known. versions.json says which transformers saved it: "
    "try another version, or report it."
)
"""Advice about a folder with problems, for messages."""
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "F64": "float64"}
"""Names of floating-point types in safetensors headers -> their names in configs."""

_PROCESSOR = (
    ("image processor", ("processor_config.json", "preprocessor_config.json")),
    ("tokenizer", ("tokenizer.json", "vocab.json")),
)
_LISTED = 6


@dataclass(frozen=True)
class Header:
    """Entry of a tensor in the header of a safetensors file.

    Args:
        file: Path of the file.
        dtype: Data type in safetensors' notation, such as ``BF16``.
        shape: Shape of the tensor.
    """

    file: Path
    dtype: str
    shape: tuple[int, ...]


def read_headers(files: Collection[Path]) -> dict[str, Header]:
    """Return the tensors of safetensors files by name.

    Raises:
        OSError, SafetensorError: A file cannot be read.
    """
    found: dict[str, Header] = {}
    for file in sorted(files):
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118  not a dict
                part = tensors.get_slice(name)
                found[name] = Header(file, part.get_dtype(), tuple(part.get_shape()))
    return found


def read_source(model_name_or_path: str, **origin: Any) -> dict[str, Header]:
    """Return the tensors of the checkpoint that training starts from, from the headers of its files."""
    return read_headers([Path(file) for file in weight_files(model_name_or_path, origin)])


def require_whole(folder: str, source: Mapping[str, Header] | None) -> None:
    """Check that a saved folder is self-contained; only small files and headers are read.

    Args:
        folder: Saved folder.
        source: Result of :func:`read_source`; None if not known.

    Raises:
        UserError: Something is missing or wrong.
    """
    problems = problems_of(Path(folder), source)
    if problems:
        lines = "".join(f"\n  {problem}" for problem in problems)
        raise UserError(f"{folder} was saved, but is not complete:{lines}\n{BLAME}")


def problems_of(folder: Path, source: Mapping[str, Header] | None = None) -> list[str]:
    """Return the problems of a saved folder, a sentence each; an empty list if it is complete.

    Args:
        folder: Folder of a model or of an adapter.
        source: Tensors of the checkpoint that training started from; None if not known.
    """
    problems = [*_processor_problems(folder)]
    if (folder / CONFIG_FILE).is_file():
        return problems + _adapter_problems(folder)
    small = ("config.json", "generation_config.json")
    problems += [f"{name} is missing" for name in small if not (folder / name).is_file()]
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        headers, broken = _open_weights(folder)
        layout = get_family(str(config.get("model_type"))).layout
    except FileNotFoundError:
        return problems
    except UserError as error:
        return [*problems, str(error)]
    except (OSError, ValueError, SafetensorError) as error:
        return [*problems, f"its weights or config.json cannot be read: {error}"]
    problems += broken
    if not broken:
        problems += _tying_problems(config, headers, layout)
        problems += _dtype_problems(config, headers, source or {})
        if source:
            projection = f"{layout.head}.weight"
            problems += _naming_problems(headers, source, tied=projection if _is_tied(config) else "")
    return problems


def _processor_problems(folder: Path) -> list[str]:
    problems = []
    for part, names in _PROCESSOR:
        if not any((folder / name).is_file() for name in names):
            problems.append(f"the {part} is missing ({' or '.join(names)})")
    templates = [folder / name for name in ("chat_template.jinja", "chat_template.json")]
    if not any(path.is_file() for path in templates) and not _tokenizer_has_template(folder):
        problems.append("the chat template is missing (chat_template.jinja)")
    return problems


def _tokenizer_has_template(folder: Path) -> bool:
    path = folder / "tokenizer_config.json"
    return path.is_file() and bool(json.loads(path.read_text(encoding="utf-8")).get("chat_template"))


def _open_weights(folder: Path) -> tuple[dict[str, Header], list[str]]:
    """Return the tensors that transformers would load, and the problems of their files."""
    if (folder / WEIGHTS).is_file():
        return read_headers([folder / WEIGHTS]), []
    if not (folder / INDEX).is_file():
        return {}, [f"there are no weights ({WEIGHTS} or {INDEX})"]
    placed = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    files = {folder / name for name in placed.values()}
    missing = sorted(path.name for path in files if not path.is_file())
    if missing:
        return {}, [f"weight files are missing that {INDEX} names: {_listed(missing)}"]
    headers = read_headers(files)
    wrong = sorted({name for name in headers.keys() | placed.keys() if _place(headers, name) != placed.get(name)})
    return headers, [f"{INDEX} and the files differ in {_listed(wrong)}"] if wrong else []


def _place(headers: Mapping[str, Header], name: str) -> str | None:
    return headers[name].file.name if name in headers else None


def _is_tied(config: Mapping[str, Any]) -> bool:
    return bool(config.get("tie_word_embeddings", config.get("text_config", {}).get("tie_word_embeddings", False)))


def _tying_problems(config: Mapping[str, Any], headers: Mapping[str, Header], layout: ModelLayout) -> list[str]:
    """Compare the config's setting of tied embeddings with the tensors in the files."""
    wanted, projection = f"{layout.embeddings}.weight", f"{layout.head}.weight"
    older = wanted.removeprefix(f"{layout.language}.")
    embeddings = [name for name in headers if name == wanted] or [name for name in headers if name.endswith(older)]
    head = next((name for name in headers if name.endswith(projection)), None)
    if not embeddings:
        return [] if _is_tied(config) and head else ["the token embeddings are missing from the weights"]
    if not _is_tied(config):
        return [] if head else [f"{projection} is missing from the weights, and config.json does not tie it"]
    if head is None or torch.equal(_tensor(headers, head), _tensor(headers, embeddings[0])):
        return []
    return [
        f"config.json ties {projection} to {embeddings[0]}, but the files hold two different tensors: one would be lost"
    ]


def _tensor(headers: Mapping[str, Header], name: str) -> torch.Tensor:
    with safe_open(headers[name].file, "pt") as tensors:
        tensor: torch.Tensor = tensors.get_tensor(name)
    return tensor


def _dtype_problems(
    config: Mapping[str, Any], headers: Mapping[str, Header], source: Mapping[str, Header]
) -> list[str]:
    """Report tensors whose data type is neither the config's nor that of the starting checkpoint.

    A layer for multi-token prediction that is trained alone is in float32 until it is finished.
    """
    said = config.get("dtype", config.get("torch_dtype"))
    other = [
        f"{name} ({DTYPES[header.dtype]})"
        for name, header in headers.items()
        if header.dtype in DTYPES
        and DTYPES[header.dtype] != said
        and (name not in source or source[name].dtype != header.dtype)
        and not (is_mtp(name) and header.dtype == "F32")
    ]
    return [f"config.json says {said}, but tensors are of another precision: {_listed(other)}"] if other else []


def _naming_problems(headers: Mapping[str, Header], source: Mapping[str, Header], *, tied: str) -> list[str]:
    """Report tensors that only the checkpoint or only the folder has.

    Args:
        headers: Tensors of the folder.
        source: Tensors of the checkpoint.
        tied: Name of the vocabulary projection, which may be absent if it is tied to the embeddings; else empty.
    """
    gone, new = (
        sorted(name for name in one.keys() - other.keys() if not (tied and name.endswith(tied)))
        for one, other in ((source, headers), (headers, source))
    )
    found = [f"missing: {_listed(gone)}"] * bool(gone) + [f"new: {_listed(new)}"] * bool(new)
    return [f"its tensors are not named as in the checkpoint it was trained from; {'; '.join(found)}"] if found else []


def _adapter_problems(folder: Path) -> list[str]:
    try:
        config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        headers = read_headers([folder / WEIGHTS_FILE])
    except (OSError, ValueError, SafetensorError) as error:
        return [f"the adapter cannot be read: {error}"]
    problems = [] if config.get("base_model_name_or_path") else [f"{CONFIG_FILE} names no base model"]
    halves = {half: {name.replace(half, "lora") for name in headers if half in name} for half in ("lora_A", "lora_B")}
    lonely = sorted(halves["lora_A"] ^ halves["lora_B"])
    if lonely:
        problems.append(f"the adapter holds one half alone of {_listed(lonely)}")
    return problems if halves["lora_A"] or lonely else [*problems, "the adapter holds no LoRA matrices"]


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more
