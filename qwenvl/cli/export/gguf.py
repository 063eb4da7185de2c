"""GGUF files by llama.cpp's own converter: one of the language model, and one of the vision tower (mmproj)."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from qwenvl.data.media.resize import VisionSettings
from qwenvl.models.moe_checkpoint import stored_transposed
from qwenvl.serving.programs import whole_tokens
from qwenvl.utils.errors import UserError

CONVERTER = "convert_hf_to_gguf.py"
TRIED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")
"""Families whose GGUF files llama.cpp was tried with (docs/compatibility.md)."""

TRIED_WITH_YARN = ("qwen2_5_vl", "qwen3_vl")


def require_convertible(config: Mapping[str, Any], folder: str) -> None:
    """Refuse folders whose GGUF files were not tried.

    Raises:
        UserError: Family, context or layout of experts are such.
    """
    model_type = str(config.get("model_type"))
    if model_type not in TRIED:
        raise UserError(f"{folder} has model_type {model_type!r}, whose GGUF files llama.cpp was not tried with.")
    text = config.get("text_config", config)
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    tried = ("default", "mrope", "yarn") if model_type in TRIED_WITH_YARN else ("default", "mrope")
    if (kind := rope.get("rope_type", "default")) not in tried:
        raise UserError(
            f"{folder} has rope_type {kind!r}, which llama.cpp was not tried with in this family. Use vLLM."
        )
    if model_type == "qwen3_vl_moe" and stored_transposed(folder, model_type, {}) is False:
        raise UserError(
            f"{folder} stores its experts as [experts, out, in], as stock transformers does; llama.cpp reads the "
            "published layout, [experts, in, out], alone: folders that this trainer saves have that."
        )


def require_converter(llama_cpp: str | None) -> Path:
    """Return the file of the converter.

    Raises:
        UserError: It is not there.
    """
    if llama_cpp is None:
        raise UserError(
            f"--to gguf needs llama.cpp's source, whose {CONVERTER} writes the files: --llama_cpp FOLDER. With the "
            "packages of its requirements.txt in another environment, name that Python by --llama_python."
        )
    script = Path(llama_cpp) / CONVERTER
    if not script.is_file():
        raise UserError(f"--llama_cpp {llama_cpp} has no {CONVERTER}: name the folder of llama.cpp's source.")
    return script.resolve()


def image_tokens(settings: VisionSettings) -> tuple[int, int]:
    """Return the limits of an image in tokens, which llama.cpp has to be started with.

    Raises:
        UserError: The limits are no whole tokens, so that it would give images other sizes.
    """
    low, high, side = settings.image_min_pixels, settings.image_max_pixels, settings.factor
    tokens = whole_tokens(low, high, side)
    if (low, high) != (tokens[0] * side**2, tokens[1] * side**2):
        raise UserError(
            f"llama.cpp counts the limits of an image in tokens of {side} x {side} pixels, and min_pixels {low}, "
            f"max_pixels {high} are no multiples of them. Give limits that it can have, which the copy is then "
            f"compared and served with: --min_pixels {tokens[0]}*{side}*{side} --max_pixels {tokens[1]}*{side}*{side}."
        )
    return tokens


def write_gguf(folder: Path, output: Path, script: Path, python: str | None, kind: str) -> tuple[Path, Path]:
    """Convert a folder; return the files of the language model and of the vision tower.

    Args:
        folder: Folder of a whole model.
        output: Existing folder, whose name the files get.
        script: File of the converter.
        python: Python to run it with; None for this one.
        kind: Type of the weights.

    Raises:
        UserError: The converter fails.
    """
    model, mmproj = gguf_files(output, output.name)
    command = [python or sys.executable, str(script), str(folder.resolve()), "--outtype"]
    _convert([*command, kind, "--outfile", str(model.resolve())])
    tower = "f16" if kind == "q8_0" else kind
    _convert([*command, tower, "--outfile", str(mmproj.resolve()), "--mmproj"])
    return model, mmproj


def gguf_files(folder: Path, name: str) -> tuple[Path, Path]:
    """Return the files of the language model and of the vision tower."""
    return folder / f"{name}.gguf", folder / f"mmproj-{name}.gguf"


def _convert(command: list[str]) -> None:
    try:
        done = subprocess.run(command, check=False, capture_output=True, text=True, errors="replace")
    except OSError as error:
        raise UserError(f"--llama_python {command[0]} does not run: {error.strerror}.") from error
    if done.returncode:
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-4:])
        raise UserError(
            f"{CONVERTER} of --llama_cpp fails, with Python {command[0]}. A missing module: install llama.cpp's "
            f"requirements there, or name another by --llama_python. Its last lines:\n{said}"
        )
