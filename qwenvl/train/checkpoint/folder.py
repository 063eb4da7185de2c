"""Checkpoints: finding the newest complete one, and the files that let a folder stand alone."""

from __future__ import annotations

import json
import logging
import pickle
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers.trainer_pt_utils import safe_globals

from qwenvl.models.lora.files import start_anew
from qwenvl.train.checkpoint import manifest
from qwenvl.train.checkpoint.weight_files import remove_older_weights
from qwenvl.train.records.run_info import find_versions
from qwenvl.train.records.serving import SERVING
from qwenvl.utils.distributed import rank, wait_for_all
from qwenvl.utils.errors import UserError
from qwenvl.utils.permissions import follow_umask

logger = logging.getLogger(__name__)

DRAFTS = ".saving"
"""Folder inside the output folder in which checkpoints are written until they are whole."""

Engine = Literal["plain", "deepspeed", "fsdp"]
"""What trains: torch alone or with DDP, DeepSpeed, or FSDP."""

_OPTIMIZER_FILES = {"plain": ["optimizer.pt"], "deepspeed": ["global_step*"], "fsdp": ["optimizer.bin", "optimizer_*"]}
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def find_checkpoint(output_dir: str, wanted: str | None, engine: Engine = "plain") -> str | None:
    """Return the checkpoint to resume from, or None to start anew.

    Args:
        output_dir: of the run.
        wanted: ``--resume_from_checkpoint``: a folder; ``true`` for the newest one, which must exist; ``false`` for
            none; None for the newest one if there is any, as the official recipe does.
        engine: what trains: each keeps the optimizer's state in files of its own.

    Raises:
        UserError: there is no such checkpoint, or it holds no state of this kind of optimizer.
    """
    if wanted is not None and wanted.lower() in ("false", "no", "0"):
        if any(map(_matches, Path(output_dir).glob("checkpoint-*"))):
            logger.warning(
                "%s holds checkpoints of an earlier run. Started again, a run resumes from the highest number, "
                "whichever run it is of: remove them, or choose another --output_dir.",
                output_dir,
            )
        return None
    if wanted is not None and wanted.lower() not in ("true", "yes", "1"):
        problem = problem_of(Path(wanted))
        if problem is not None:
            raise UserError(f"--resume_from_checkpoint {wanted}: no complete checkpoint there: {problem}.")
        return _with_optimizer(Path(wanted), engine)
    found = _newest(Path(output_dir))
    if wanted is not None and found is None:
        raise UserError(f"--resume_from_checkpoint {wanted}: {output_dir} holds no complete checkpoint-* folder.")
    return None if found is None else _with_optimizer(found, engine)


def _with_optimizer(path: Path, engine: Engine) -> str:
    """Refuse a checkpoint from which the Trainer would go on with a new optimizer and schedule, without a word."""
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
    """Refuse a checkpoint of FSDP whose optimizer's state is not in files of the kind that this run reads.

    Args:
        checkpoint: Folder that an FSDP run saved.
        kind: ``state_dict_type`` of ``--fsdp_config``.

    Raises:
        UserError: it was saved with the other kind.
    """
    saved = "FULL_STATE_DICT" if (Path(checkpoint) / "optimizer.bin").is_file() else "SHARDED_STATE_DICT"
    if saved != kind:
        raise UserError(
            f"{checkpoint} was saved with state_dict_type {saved}, and --fsdp_config has {kind}, which cannot read it. "
            f"Resume with {saved}; or {start_anew(checkpoint)}."
        )


def _newest(output_dir: Path) -> Path | None:
    folders = [(int(match[1]), path) for path in output_dir.glob("checkpoint-*") if (match := _matches(path))]
    for _, path in sorted(folders, reverse=True):
        problem = problem_of(path)
        if problem is None:
            return path
        logger.warning("%s is not complete: %s. It is ignored.", path, problem)
    return None


def _matches(path: Path) -> re.Match[str] | None:
    return _CHECKPOINT.fullmatch(path.name) if path.is_dir() else None


def read_step(path: str) -> int:
    """Return the optimizer steps that a complete checkpoint was saved after."""
    step: int = json.loads((Path(path) / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    return step


def problem_of(path: Path) -> str | None:
    """Return why a checkpoint cannot be resumed from, or None.

    It is held against its manifest: every file, its size and its content. Checkpoints of the stock Trainer have none;
    they count as whole if the Trainer's state, which is written last, can be read.
    """
    try:
        if "global_step" not in json.loads((path / "trainer_state.json").read_text(encoding="utf-8")):
            return "trainer_state.json does not say its step"
    except FileNotFoundError:
        return "there is no trainer_state.json"
    except (OSError, ValueError) as error:
        return f"trainer_state.json cannot be read ({error})"
    return manifest.problem_of(path)


@contextmanager
def published(output_dir: str, name: str | None, *, writes: bool) -> Iterator[Path]:
    """Give a folder to save to, and move what is in it to its place once all of it is there.

    Whatever stops the run before that (a full disk, ``kill -9``, the machine), the place holds what it held before.
    Every process has to call it, and they wait for each other.

    Args:
        output_dir: of the run.
        name: of the checkpoint, which gets a manifest; None for the files of the run's own folder.
        writes: this process is the one that writes (of a machine, with ``--save_on_each_node``).

    Raises:
        UserError: the files cannot be written.
    """
    place = Path(output_dir) if name is None else Path(output_dir) / name
    draft = Path(output_dir) / DRAFTS / (name or "final")
    if writes:
        shutil.rmtree(draft.parent, ignore_errors=True)  # of a run that stopped while saving
        draft.parent.mkdir(parents=True, exist_ok=True)
    wait_for_all()
    try:
        yield draft
        wait_for_all()
        if writes:
            follow_umask(draft)
            _move(draft, place, whole=name is not None)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
        free = shutil.disk_usage(output_dir).free
        shutil.rmtree(draft.parent, ignore_errors=True)
        raise UserError(
            f"{place} could not be saved: {error}. Nothing of it is left; earlier checkpoints are as they were, and "
            f"the run resumes from the newest one. The disk has {free / 1e9:.1f} GB free: if that is too little, free "
            "some, or keep fewer checkpoints (--save_total_limit)."
        ) from error
    wait_for_all()


@contextmanager
def refused_state_named(checkpoint: str | None) -> Iterator[None]:
    """Turn what torch refuses of a checkpoint's state (optimizer, schedule, random numbers) into a UserError.

    It reads tensors and numbers only: a file with code in it is refused, and none of the code runs.

    Args:
        checkpoint: the folder, which what runs inside reads; None for none.
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
        if checkpoint and isinstance(error, ValueError):  # torch's: groups of parameters that do not match
            raise UserError(
                f"{checkpoint} holds the optimizer's state of other trained parts or of another optimizer: {error}. "
                f"Resume with the settings that it was saved with; or {start_anew(checkpoint)}."
            ) from error
        raise


def _refusal(file: Path) -> str | None:
    """Return the first sentence of what torch has against a file; None if it reads it."""
    try:
        with safe_globals():  # as the Trainer reads them
            torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
        return str(error).partition("\n")[0].partition(". ")[0].rstrip(".")[:200] + "."
    return None


def _move(draft: Path, place: Path, *, whole: bool) -> None:
    if whole:
        manifest.write(draft)
        shutil.rmtree(place, ignore_errors=True)  # a broken one of the same step
        draft.replace(place)
    else:
        names = [file.name for file in draft.iterdir()]
        # Weights first and what names them last: a reader finds the old set or the new one.
        for file in sorted(draft.iterdir(), key=lambda file: (not file.name.endswith(".safetensors"), file.name)):
            file.replace(place / file.name)
        remove_older_weights(place, names)
        draft.rmdir()
    draft.parent.rmdir()


def require_writable(output_dir: str) -> None:
    """Create the output folder and check that files can be written to it, before anything slow starts.

    Raises:
        UserError: it cannot be created or written to.
    """
    probe = Path(output_dir) / f".write_test_{rank()}"  # one a rank: ranks on one disk check at the same time
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_text("", encoding="utf-8")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"--output_dir {output_dir} cannot be written to: {error.strerror or error}. Choose another."
        ) from error


def write_records(
    folder: str, settings_yaml: str, original_limits: Mapping[str, Any], serving: Mapping[str, Any]
) -> None:
    """Write what a folder needs to be understood and repeated.

    Args:
        folder: a checkpoint.
        settings_yaml: becomes ``training_args.yaml``, a recipe that reruns the job.
        original_limits: limits of the processor before training; becomes ``original_processor_limits.json``.
        serving: How requests have to be made; becomes ``serving.json``.
    """
    path = Path(folder)
    (path / "training_args.yaml").write_text(settings_yaml, encoding="utf-8")
    _write_json(path / "original_processor_limits.json", original_limits)
    _write_json(path / SERVING, serving)
    _write_json(path / "versions.json", find_versions())


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
