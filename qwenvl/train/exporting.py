"""The finished folder, held against the trainer: stock transformers computes the same with it, in a fresh process."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file
from torch import Tensor

from qwenvl.data.collation import EncodedSample, Item, for_model
from qwenvl.data.dataset import ConversationDataset
from qwenvl.data.encoding import Plan
from qwenvl.data.sizes import VideoPlan
from qwenvl.data.types import Sample
from qwenvl.models.adapter_files import CONFIG_FILE, WEIGHTS_FILE
from qwenvl.models.expert_layout import weight_files
from qwenvl.models.head_objective import HeadObjective
from qwenvl.models.loss import run_model, tell_host
from qwenvl.models.patches import Patchify
from qwenvl.models.readout import readout_of
from qwenvl.train.saving import SavingTrainer
from qwenvl.train.trainer import QwenVLTrainer
from qwenvl.train.wholeness import BLAME
from qwenvl.utilities.distributed import from_main_process
from qwenvl.utilities.errors import SampleError, UserError

logger = logging.getLogger(__name__)

TOLERANCES = {"float32": 1e-3, "reduced": 5e-2}
"""Mean difference of logits that is taken for rounding, in standard deviations of the logits. ``reduced``: either side
computes in bfloat16 or float16, whose digits differ from one device and kernel to another."""

_LOOKED_AT = 64  # rows among which the shortest are taken
_LONGEST = 2048  # tokens of a sample to compare with
_ROWS = 32  # positions whose logits are compared
_OF_LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Case:
    """A sample to compare with.

    Args:
        plan: of the sample.
        encoded: its tokens and pixels.
    """

    plan: Plan
    encoded: EncodedSample


def verify_export(trainer: QwenVLTrainer, datasets: Sequence[ConversationDataset | None], processor: Any) -> None:
    """Have a fresh process open the finished folder, and compare its logits with the trainer's; every rank calls it.

    The head of a task is opened there too, and its scores of the same samples are compared.

    Args:
        trainer: that has saved it.
        datasets: whose first samples are compared with; None for those there are not.
        processor: of the checkpoint, which says how patches are cut.

    Raises:
        UserError: it cannot be opened, or computes something else.
    """
    args, folder = trainer.args, Path(trainer.args.output_dir)
    obstacle = from_main_process(lambda: _obstacle(folder) if args.verify_export == "auto" else "")
    if getattr(trainer.model, "is_quantized", False):
        obstacle = "its base had 4 bits in training and has all of them now, which moves the logits"
    if args.verify_export is False or obstacle:
        logger.info(
            "The finished folder is not opened again to compare logits: %s.", obstacle or "--verify_export false"
        )
        return
    cases = [case for dataset in datasets if dataset is not None for case in _cases(dataset)][:2]
    patchify = Patchify.from_processor(processor)
    logits = [trainer_logits(trainer, case) for case in cases]
    scores = [trainer_scores(trainer, case) for case in cases]
    tensors = {
        f"{number}.{name}": tensor.contiguous()
        for number, (case, (rows, values), found) in enumerate(zip(cases, logits, scores, strict=True))
        for name, tensor in {**_stock_inputs(case, patchify), "rows": rows, "logits": values, **found}.items()
    }
    from_main_process(partial(_compare, folder, tensors, trainer))


def trainer_logits(trainer: SavingTrainer, case: Case) -> tuple[Tensor, Tensor]:
    """Return which positions of a sample are compared, and what the model in training computes there.

    Returns:
        int64 [n], and float32 [n, V], both on the host.
    """
    assert trainer.data_collator is not None
    batch = for_model(trainer.data_collator([Item((case.encoded,))]))
    inputs = tell_host(batch)
    length = batch["input_ids"].shape[1]
    rows = torch.linspace(0, length - 1, min(_ROWS, length)).round().long()
    inputs = trainer._prepare_inputs(inputs | {"kept_positions": rows, "targets": None})
    model = trainer._wrap_model(trainer.model, training=False)
    model.eval()
    with torch.no_grad(), trainer.compute_loss_context_manager():
        logits = run_model(model, inputs).logits
    return rows, logits[0].float().cpu()


def trainer_scores(trainer: QwenVLTrainer, case: Case) -> dict[str, Tensor]:
    """Return ``scores`` float32 [units, outputs], what the head of a task says of a sample; nothing without one."""
    if readout_of(trainer.model) is None or not isinstance(trainer.objective, HeadObjective):
        return {}
    assert trainer.data_collator is not None
    batch = for_model(trainer.data_collator([Item((case.encoded,))]))
    inputs = trainer._prepare_inputs(trainer.objective.prepare(batch))
    model = trainer._wrap_model(trainer.model, training=False)
    with torch.no_grad(), trainer.compute_loss_context_manager():
        return {"scores": run_model(model, inputs).logits.float().cpu()}


def _cases(dataset: ConversationDataset) -> Iterator[Case]:
    """Yield the shortest of the first samples with media, and of those without; as much of that as there is."""
    shortest: dict[bool, tuple[Plan, Sample]] = {}
    for index in range(min(_LOOKED_AT, len(dataset))):
        for sample, plan in _plans(dataset, index):
            best = shortest.get(bool(plan.media))
            if len(plan.tokens) <= _LONGEST and (best is None or len(plan.tokens) < len(best[0].tokens)):
                shortest[bool(plan.media)] = (plan, sample)
    for plan, sample in shortest.values():
        yield Case(plan, dataset.encoder.encode(plan, sample))


def _plans(dataset: ConversationDataset, index: int) -> Iterator[tuple[Sample, Plan]]:
    try:
        samples = dataset.samples(index)
    except SampleError:  # which training has counted already
        return
    for sample in samples:
        try:
            plan = dataset.encoder.plan(sample)
        except SampleError:
            continue
        yield sample, plan


def _stock_inputs(case: Case, patchify: Patchify) -> dict[str, Tensor]:
    """Return what a stock model's ``forward`` takes of a sample, without positions."""
    inputs = {"input_ids": case.plan.tokens.input_ids[None]}
    for kind, suffix in (("image", ""), ("video", "_videos")):
        chosen = [
            (plan, medium)
            for plan, medium in zip(case.plan.media, case.encoded.media, strict=True)
            if isinstance(plan, VideoPlan) == (kind == "video")
        ]
        if chosen:
            patches = [patchify.cpu()(medium.frames.flatten(), [medium.shape]) for _, medium in chosen]
            inputs[f"pixel_values{suffix}"] = torch.cat(patches)
            inputs[f"{kind}_grid_thw"] = torch.tensor([plan.grid for plan, _ in chosen])
    videos = [plan for plan in case.plan.media if isinstance(plan, VideoPlan)]
    if videos:
        seconds = [patchify.temporal_patch_size / video.sampled_fps for video in videos]
        inputs["second_per_grid_ts"] = torch.tensor(seconds)
    return inputs


def _obstacle(folder: Path) -> str:
    """Return why the model does not fit once more into memory; empty where it does."""
    needed, free = _bytes_of(folder) * 1.3 + 2**30, psutil.virtual_memory().available
    if needed <= free:
        return ""
    return (
        f"it takes {needed / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} are free (--verify_export true insists)"
    )


def _bytes_of(folder: Path) -> int:
    """Return the size of the weights, those of an adapter with its base model's."""
    files = [file for file in folder.glob("*model*.safetensors") if (file.name == WEIGHTS_FILE) == _is_adapter(folder)]
    if _is_adapter(folder):
        base = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))["base_model_name_or_path"]
        files += map(Path, weight_files(base, {}))
    return sum(file.stat().st_size for file in files)


def _is_adapter(folder: Path) -> bool:
    return (folder / CONFIG_FILE).is_file()


def _compare(folder: Path, tensors: Mapping[str, Tensor], trainer: SavingTrainer) -> None:
    """Run the fresh process and judge what it says.

    Raises:
        UserError: the folder cannot be opened, or the logits are not those of the trainer.
    """
    dtype = str(trainer.model.dtype).removeprefix("torch.")
    with tempfile.TemporaryDirectory() as scratch:
        cases = Path(scratch) / "cases.safetensors"
        save_file(dict(tensors), cases)
        said = _run_fresh([str(folder), str(cases), "--dtype", dtype, "--device", _device(folder)])
    reduced = trainer.args.bf16 or trainer.args.fp16 or {dtype, trainer.args.save_dtype} & {"bfloat16", "float16"}
    tolerance = TOLERANCES["reduced" if reduced else "float32"]
    worst = max((one["mean"] for one in said["differences"]), default=0.0)
    if said["problems"]:
        raise UserError(f"{folder} was saved, but stock transformers finds: {'; '.join(said['problems'])}. {BLAME}")
    if not worst <= tolerance:
        raise UserError(
            f"{folder} was saved, but stock transformers computes something else with it: its logits differ by "
            f"{worst:.2g} standard deviations in the mean, where {tolerance:g} is rounding. {BLAME}"
        )
    logger.info(
        "Verified: a fresh process opened %s with stock transformers; its logits differ by %.1g standard deviations in "
        "the mean (%g is allowed), for %d samples.",
        *(folder, worst, tolerance, len(said["differences"])),
    )


def _run_fresh(arguments: Sequence[str]) -> dict[str, Any]:
    """Run :mod:`qwenvl.evaluate.export_check` outside of the job's process group; return what it says."""
    root = str(Path(__file__).resolve().parents[2])
    launched = ("TORCHELASTIC_", "ACCELERATE_", "FSDP_")
    environment = {
        name: value for name, value in os.environ.items() if name not in _OF_LAUNCHERS and not name.startswith(launched)
    }
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, environment.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "qwenvl.evaluate.export_check", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout.strip().splitlines()
    if done.returncode or not lines:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"problems": [f"the process that opens it ended early ({reason})"], "differences": []}
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def _device(folder: Path) -> str:
    """Return the trainer's own device where there is room beside the trainer, else the CPU."""
    if torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > 1.5 * _bytes_of(folder) + 2**31:
        return f"cuda:{torch.cuda.current_device()}"
    return "cpu"
