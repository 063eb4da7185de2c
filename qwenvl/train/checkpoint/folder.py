"""Find the newest complete checkpoint, write folders atomically, and add the records of the run to them."""

from __future__ import annotations

import json
import logging
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers.trainer_pt_utils import safe_globals

from qwenvl.models.lora.files import start_anew
from qwenvl.train.checkpoint import manifest
from qwenvl.train.checkpoint.weight_files import remove_older_weights, write_json
from qwenvl.train.records.run_info import DATA_FILE, VERSIONS_FILE, find_versions
from qwenvl.train.records.serving import SERVING
from qwenvl.utils.distributed import rank, wait_for_all
from qwenvl.utils.errors import UserError
from qwenvl.utils.permissions import follow_umask

logger = logging.getLogger(__name__)

DRAFTS = ".saving"
"""Folder inside the output folder in which checkpoints are written until they are complete."""

Engine = Literal["plain", "deepspeed", "fsdp"]
"""Training engine: torch alone or with DDP (``plain``), DeepSpeed, or FSDP."""

_OPTIMIZER_FILES = {"plain": ["optimizer.pt"], "deepspeed": ["global_step*"], "fsdp": ["optimizer.bin", "optimizer_*"]}
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def find_checkpoint(
    output_dir: str, wanted: str | None, engine: Engine = "plain", *, every_byte: bool = True
) -> str | None:
    """Return the checkpoint to resume from, or None to start anew.

    Args:
        output_dir: Output folder of the run.
        wanted: Value of ``--resume_from_checkpoint``: a folder; ``true`` for the newest one, which must exist;
            ``false`` for none; None for the newest one if there is any, like the official recipe.
        engine: Engine of the run; each engine has its own files for the optimizer's state.
        every_byte: Whether to compare every byte of large files, where their manifest allows it.

    Raises:
        UserError: The checkpoint does not exist, or it holds no optimizer state for this engine.
    """
    if wanted is not None and wanted.lower() in ("false", "no", "0"):
        if any(map(_matches, Path(output_dir).glob("checkpoint-*"))):
            logger.warning(
                "%s holds checkpoints of an earlier run. A later start would resume from the highest number, "
                "whichever run saved it: remove them, or choose another --output_dir.",
                output_dir,
            )
        return None
    if wanted is not None and wanted.lower() not in ("true", "yes", "1"):
        problem = problem_of(Path(wanted), every_byte=every_byte)
        if problem is not None:
            raise UserError(f"--resume_from_checkpoint {wanted}: no complete checkpoint there: {problem}.")
        return _with_optimizer(Path(wanted), engine)
    found = _newest(Path(output_dir), every_byte=every_byte)
    if wanted is not None and found is None:
        raise UserError(f"--resume_from_checkpoint {wanted}: {output_dir} holds no complete checkpoint-* folder.")
    return None if found is None else _with_optimizer(found, engine)


def _with_optimizer(path: Path, engine: Engine) -> str:
    """Refuse a checkpoint with which the Trainer would silently start a new optimizer and schedule."""
    found = [name for name, files in _OPTIMIZER_FILES.items() if any(any(path.glob(pattern)) for pattern in files)]
    if engine in found:
        return str(path)
    reasons = {
        "deepspeed": "was saved with DeepSpeed, and this run has none: resume with --deepspeed and its configuration",
        "fsdp": "was saved with FSDP, and this run has none: resume with --fsdp True and its configuration",
        "plain": f"was saved without DeepSpeed and FSDP: leave --{engine} out to resume",
    }
    reason = "was saved without its optimizer (--save_only_model), so that no run can go on from it"
    raise UserError(
        f"{path} holds no state of the optimizer that this run can continue with. "
        f"It {reasons[found[0]] if found else reason}; or {start_anew(path)}."
    )


def require_state_dict(checkpoint: str, kind: str) -> None:
    """Refuse an FSDP checkpoint whose optimizer state was saved with another ``state_dict_type``.

    Args:
        checkpoint: Folder that an FSDP run saved.
        kind: Value of ``state_dict_type`` in ``--fsdp_config``.

    Raises:
        UserError: It was saved with the other type.
    """
    saved = "FULL_STATE_DICT" if (Path(checkpoint) / "optimizer.bin").is_file() else "SHARDED_STATE_DICT"
    if saved != kind:
        raise UserError(
            f"{checkpoint} was saved with state_dict_type {saved}, and --fsdp_config has {kind}, which cannot read it. "
            f"Resume with {saved}; or {start_anew(checkpoint)}."
        )


def _newest(output_dir: Path, *, every_byte: bool) -> Path | None:
    folders = [(int(match[1]), path) for path in output_dir.glob("checkpoint-*") if (match := _matches(path))]
    for _, path in sorted(folders, reverse=True):
        problem = problem_of(path, every_byte=every_byte)
        if problem is None:
            return path
        logger.warning("%s is not complete: %s. It is ignored.", path, problem)
    return None


def _matches(path: Path) -> re.Match[str] | None:
    return _CHECKPOINT.fullmatch(path.name) if path.is_dir() else None


def read_step(path: str) -> int:
    """Return the number of optimizer steps after which a complete checkpoint was saved."""
    step: int = json.loads((Path(path) / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    return step


def problem_of(path: Path, *, every_byte: bool = True) -> str | None:
    """Return why a checkpoint cannot be resumed from, or None.

    Every file is compared with the manifest, in size and content. Checkpoints of the stock Trainer have no manifest;
    they count as complete if the Trainer's state, which is written last, can be read.

    Args:
        path: Folder of the checkpoint.
        every_byte: Whether to compare every byte of large files, where the manifest allows it.
    """
    try:
        if "global_step" not in json.loads((path / "trainer_state.json").read_text(encoding="utf-8")):
            return "trainer_state.json does not say its step"
    except FileNotFoundError:
        return "there is no trainer_state.json"
    except (OSError, ValueError) as error:
        return f"trainer_state.json cannot be read ({error})"
    return manifest.problem_of(path, every_byte=every_byte)


@contextmanager
def published(output_dir: str, name: str | None, *, writes: bool) -> Iterator[Path]:
    """Yield a temporary folder to save to, and move its files to their final place once they are complete.

    If the run stops before that (full disk, ``kill -9``, power loss), the final place is unchanged. Every process must
    call it, and they wait for each other without time limit.

    Args:
        output_dir: Output folder of the run.
        name: Name of the checkpoint, which gets a manifest; None for the final model in the output folder itself.
        writes: Whether this process writes; one per run, or one per machine with ``--save_on_each_node``.

    Raises:
        UserError: The files cannot be written.
    """
    place = Path(output_dir) if name is None else Path(output_dir) / name
    draft = Path(output_dir) / DRAFTS / (name or "final")
    if writes:
        shutil.rmtree(draft.parent, ignore_errors=True)  # left by a run that stopped while saving
        draft.parent.mkdir(parents=True, exist_ok=True)
    wait_for_all()
    try:
        yield draft
        wait_for_all()
        if writes:
            follow_umask(draft)
            _move(draft, place, whole=name is not None)
    except (OSError, RuntimeError, SafetensorError) as error:  # full disks raise various types
        free = shutil.disk_usage(output_dir).free
        shutil.rmtree(draft.parent, ignore_errors=True)
        raise UserError(
            f"{place} could not be saved: {error}. No part of it was kept; earlier checkpoints are unchanged, and the "
            f"run resumes from the newest one. The disk has {free / 1e9:.1f} GB free: if that is too little, free "
            "some, or keep fewer checkpoints (--save_total_limit)."
        ) from error
    wait_for_all()


@contextmanager
def refused_state_named(checkpoint: str | None) -> Iterator[None]:
    """Turn torch's errors on loading a checkpoint's state (optimizer, schedule, random numbers) into a UserError.

    torch reads tensors and numbers only: a file with code in it is refused, and none of the code runs.

    Args:
        checkpoint: Folder that is read while the context is open; None for none.
    """
    try:
        yield
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError) as error:
        for file in sorted(Path(checkpoint).glob("*.pt*")) if checkpoint else ():
            reason = _refusal(file)
            if reason is not None:
                raise UserError(
                    f"{file} is damaged, or holds more than the state of a run: {reason} None of it was used. Resume "
                    f"from another checkpoint (--resume_from_checkpoint); or {start_anew(file.parent)}."
                ) from error
        if checkpoint and isinstance(error, ValueError):  # raised by torch if parameter groups do not match
            raise UserError(
                f"{checkpoint} holds the optimizer's state of other trained parts or of another optimizer: {error}. "
                f"Resume with the settings that it was saved with; or {start_anew(checkpoint)}."
            ) from error
        raise


def _refusal(file: Path) -> str | None:
    """Return the first sentence of torch's error for a file; None if it can be read."""
    try:
        with safe_globals():  # as the Trainer reads them
            torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        return str(error).partition("\n")[0].partition(". ")[0].rstrip(".")[:200] + "."
    return None


def _move(draft: Path, place: Path, *, whole: bool) -> None:
    if whole:
        manifest.write(draft)
        shutil.rmtree(place, ignore_errors=True)  # an incomplete checkpoint of the same step
        draft.replace(place)
    else:
        names = [file.name for file in draft.iterdir()]
        # Weights first and their index last, so that a reader finds the old set or the new one.
        for file in sorted(draft.iterdir(), key=lambda file: (not file.name.endswith(".safetensors"), file.name)):
            file.replace(place / file.name)
        remove_older_weights(place, names)
        draft.rmdir()
    draft.parent.rmdir()


def require_writable(output_dir: str) -> None:
    """Create the output folder and check that files can be written to it, before anything slow starts.

    Raises:
        UserError: It cannot be created or written to.
    """
    probe = Path(output_dir) / f".write_test_{rank()}"  # one per rank, as ranks on one disk check at the same time
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_text("", encoding="utf-8")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"--output_dir {output_dir} cannot be written to: {error.strerror or error}. Choose another."
        ) from error


def write_records(
    folder: str,
    settings_yaml: str,
    original_limits: Mapping[str, Any],
    serving: Mapping[str, Any],
    data: Sequence[Mapping[str, Any]],
) -> None:
    """Write the records of a run into a folder: its settings, limits, serving arguments, data and versions.

    Args:
        folder: Folder of a checkpoint or model.
        settings_yaml: Recipe that reruns the job, for ``training_args.yaml``.
        original_limits: Limits of the processor before training, for ``original_processor_limits.json``.
        serving: Template arguments of requests, for ``serving.json``.
        data: Used rows of each dataset, for :data:`DATA_FILE`.
    """
    path = Path(folder)
    (path / "training_args.yaml").write_text(settings_yaml, encoding="utf-8")
    write_json(path / "original_processor_limits.json", original_limits)
    write_json(path / SERVING, serving)
    write_json(path / DATA_FILE, list(data))
    write_json(path / VERSIONS_FILE, find_versions())
