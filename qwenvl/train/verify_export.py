"""Verify the finished folder: stock transformers must compute the same as the trainer, in a fresh process."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file
from torch import Tensor

from qwenvl.data.collator import for_model
from qwenvl.data.dataset import ConversationDataset
from qwenvl.data.encoding.encoded import Item
from qwenvl.inference.positions import needs_positions
from qwenvl.models.fingerprints import adapter_scales, trained_fingerprints
from qwenvl.models.lora.adapters import has_adapters
from qwenvl.models.lora.files import CONFIG_FILE, WEIGHTS_FILE
from qwenvl.models.loss.causal_lm import prepare_inputs, run_model
from qwenvl.models.moe_checkpoint import weight_files
from qwenvl.models.vision.patchify import Patchify
from qwenvl.train.checkpoint.folder_check import BLAME
from qwenvl.train.checkpointing_trainer import CheckpointingTrainer
from qwenvl.train.export.cases import Case, short_cases, stock_inputs
from qwenvl.train.export.distance import compared_rows, content_of
from qwenvl.train.export.verify_process import OUT_OF_MEMORY
from qwenvl.train.trainer import Trainer
from qwenvl.utils.cores import available_cores
from qwenvl.utils.distributed import from_main_process
from qwenvl.utils.errors import UserError

logger = logging.getLogger(__name__)

FLOAT32 = 1e-3
"""Largest accepted difference of logits in float32, in standard deviations: 600 times the difference measured for a 2B
model on a CPU, which leaves room for the kernels of other devices."""

DOUBTFUL = 2.0
"""Up to this multiple of the accepted difference, one in a reduced type is a warning and does not fail the run: another
device or other kernels than those of the check may round more than was measured."""

_OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def verify_export(trainer: Trainer, datasets: Sequence[ConversationDataset | None], processor: Any) -> None:
    """Open the finished folder in a fresh process, and compare it with the trainer's model; every rank must call it.

    The head of a task is opened there too, and its scores of the same samples are compared.

    Args:
        trainer: Trainer that saved the folder.
        datasets: Datasets to take samples from, None entries are skipped.
        processor: Processor of the checkpoint, with the settings of patches.

    Raises:
        UserError: The folder cannot be opened, or its model computes something else.
    """
    args, folder = trainer.args, Path(trainer.args.output_dir)
    obstacle = from_main_process(lambda: _obstacle(folder) if args.verify_export == "auto" else "")
    if getattr(trainer.model, "is_quantized", False):
        obstacle = "its base was quantized to 4 bits in training and is not now, which changes the logits"
    if args.verify_export is False or obstacle:
        logger.info("The finished folder is not verified: %s.", obstacle or "--verify_export false")
        return
    logger.info("Opening %s in a fresh process with stock transformers, to compare weights and logits.", folder)
    cases = short_cases([dataset for dataset in datasets if dataset is not None])
    patchify, one_span = Patchify.from_processor(processor), needs_positions(trainer.model.config)
    logits = [trainer_logits(trainer, case) for case in cases]
    scores = [trainer_scores(trainer, case) for case in cases]
    tensors = {
        f"{number}.{name}": tensor.contiguous()
        for number, (case, (rows, values), found) in enumerate(zip(cases, logits, scores, strict=True))
        for name, tensor in {
            **stock_inputs(case, patchify, one_span=one_span),
            "rows": rows,
            "logits": values,
            **found,
        }.items()
    }
    types, own = trainer.saved_types, trainer.model.dtype
    opened = own if has_adapters(trainer.model) else types.usual(own)
    known = {
        "tensors": trained_fingerprints(trainer.model, types.possible, opened),
        "scales": adapter_scales(trainer.model) if has_adapters(trainer.model) else {},
    }
    from_main_process(partial(_compare, folder, tensors, known, trainer))


def trainer_logits(trainer: CheckpointingTrainer, case: Case) -> tuple[Tensor, Tensor]:
    """Return the compared positions of a sample, and the logits of the model in training there.

    Returns:
        int64 [n], and float32 [n, V], both on the host.
    """
    assert trainer.data_collator is not None
    batch = for_model(trainer.data_collator([Item((case.encoded,))]))
    inputs = prepare_inputs(batch)
    rows = compared_rows(content_of(batch["input_ids"][0], trainer.model.config))
    inputs = trainer._prepare_inputs(inputs | {"kept_positions": rows, "targets": None})
    model = trainer._wrap_model(trainer.model, training=False)
    model.eval()
    with torch.no_grad(), trainer.compute_loss_context_manager():
        logits = run_model(model, inputs).logits
    return rows, logits[0].float().cpu()


def trainer_scores(trainer: Trainer, case: Case) -> dict[str, Tensor]:
    """Return ``scores`` float32 [units, outputs] of a task for a sample; empty if the task has no scores."""
    assert trainer.data_collator is not None
    batch = for_model(trainer.data_collator([Item((case.encoded,))]))
    inputs = trainer._prepare_inputs(trainer.objective.prepare(batch))
    model = trainer._wrap_model(trainer.model, training=False)
    with torch.no_grad(), trainer.compute_loss_context_manager():
        scores = trainer.objective.scores(model, inputs)
    return {} if scores is None else {"scores": scores.float().cpu()}


def _obstacle(folder: Path) -> str:
    """Return why another copy of the model does not fit into memory; empty if it does."""
    needed, free = _bytes_of(folder) * 1.3 + 2**30, psutil.virtual_memory().available
    if needed <= free:
        return ""
    return (
        f"it takes {needed / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} are free (--verify_export true forces it)"
    )


def _bytes_of(folder: Path) -> int:
    """Return the size of the weights in bytes, for an adapter including the base model."""
    files = [file for file in folder.glob("*model*.safetensors") if (file.name == WEIGHTS_FILE) == _is_adapter(folder)]
    if _is_adapter(folder):
        base = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))["base_model_name_or_path"]
        files += map(Path, weight_files(base, {}))
    return sum(file.stat().st_size for file in files)


def _is_adapter(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file()


def _compare(
    folder: Path, tensors: Mapping[str, Tensor], known: Mapping[str, Any], trainer: CheckpointingTrainer
) -> None:
    """Run the fresh process and check its results.

    Raises:
        UserError: The folder cannot be opened, or its weights or logits differ from the trainer's.
    """
    dtype, reduced = str(trainer.model.dtype).removeprefix("torch."), _reduced_type(trainer)
    with tempfile.TemporaryDirectory() as scratch:
        cases, weights = Path(scratch) / "cases.safetensors", Path(scratch) / "weights.json"
        save_file(dict(tensors), cases)
        weights.write_text(json.dumps(known), encoding="utf-8")
        arguments = [str(folder), str(cases), str(weights), "--dtype", dtype, "--device", _device(folder)]
        said = _run_fresh([*arguments, *(("--reduced", reduced) if reduced else ())])
    if said is None:
        _report_unverified(folder, insisted=trainer.args.verify_export is True)
        return
    if not require_same(folder, said, reduced):
        return
    worst = max(said["differences"], key=lambda one: one["error"] / _allowed(one), default=None)
    logger.info(
        "Verified: a fresh process opened %s with stock transformers; its %d tensors are those of training, its logits "
        "differ by %.1g standard deviations %s (%.1g is allowed).",
        *(folder, len(known["tensors"])),
        *((worst["error"], worst["where"], _allowed(worst)) if worst else (0.0, "in 0 samples", FLOAT32)),
    )


def require_same(folder: Path, said: Mapping[str, Any], reduced: str | None) -> bool:
    """Check the results of :mod:`qwenvl.train.export.verify_process`; warn and return False about doubtful ones.

    Args:
        folder: Folder that was opened.
        said: Results: ``problems`` and ``differences``.
        reduced: Half-precision type that training computed in; None for float32.

    Raises:
        UserError: The folder's weights differ from the trainer's, or its logits by more than rounding explains.
    """
    if said["problems"]:
        raise UserError(f"{folder} was saved, but stock transformers finds: {'; '.join(said['problems'])}. {BLAME}")
    wrong = [one for one in said["differences"] if not one["error"] <= _allowed(one)]
    if not wrong:
        return True
    one = max(wrong, key=lambda found: found["error"] / _allowed(found))
    differs = (
        f"its logits {one['where']} differ by {one['error']:.2g} standard deviations; {reduced or 'float32'} explains "
        f"{_allowed(one):.2g}"
    )
    if reduced is None or one["error"] / DOUBTFUL > _allowed(one):
        raise UserError(
            f"{folder} was saved, but stock transformers computes something else with it: {differs}. {BLAME}"
        )
    logger.warning("%s was saved, and its tensors are those of training, but %s. Compare its answers.", folder, differs)
    return False


def _allowed(one: Mapping[str, Any]) -> float:
    """Return the largest accepted difference of a record of :func:`qwenvl.train.export.distance.measures`."""
    return min(FLOAT32 + one["multiple"] * one["noise"], sys.float_info.max)


def _reduced_type(trainer: CheckpointingTrainer) -> str | None:
    """Return the half-precision type of training or of the files; None if both are float32."""
    args = trainer.args
    types = {trainer.model.dtype, trainer.saved_types.usual(trainer.model.dtype)}
    if args.fp16 or torch.float16 in types:
        return "float16"
    tensor_cores = torch.cuda.is_available() and torch.backends.cuda.matmul.allow_tf32  # fewer digits than float32
    return "bfloat16" if args.bf16 or torch.bfloat16 in types or tensor_cores else None


def _report_unverified(folder: Path, *, insisted: bool) -> None:
    """Warn that there was not enough memory for the check, which does not mean that the folder is wrong.

    Raises:
        UserError: The check was requested.
    """
    message = f"{folder} was saved, but not verified: there is not enough memory to open it beside the trainer's model."
    if insisted:
        raise UserError(f"{message} --verify_export auto accepts that.")
    logger.warning("%s", message)


def _run_fresh(arguments: Sequence[str]) -> dict[str, Any] | None:
    """Run :mod:`qwenvl.train.export.verify_process` outside of the job's process group.

    Returns:
        Its results; None if it ran out of memory.
    """
    root = str(Path(__file__).resolve().parents[2])
    launched = ("TORCHELASTIC_", "ACCELERATE_", "FSDP_")
    environment = {
        name: value for name, value in os.environ.items() if name not in _OF_LAUNCHERS and not name.startswith(launched)
    }
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun gives each process one thread; here only one works
        environment["OMP_NUM_THREADS"] = str(available_cores())
    command = [sys.executable, "-m", "qwenvl.train.export.verify_process", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode in (OUT_OF_MEMORY, -signal.SIGKILL):  # reported by itself, or killed by the system
        return None
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"problems": [f"the process that opens it ended early ({reason})"], "differences": []}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def _device(folder: Path) -> str:
    """Return the trainer's device if it has room for another model, else the CPU."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # torch's cache counts as used memory
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 1.5 * _bytes_of(folder) + 2**31:
        return f"cuda:{torch.cuda.current_device()}"
    return "cpu"
