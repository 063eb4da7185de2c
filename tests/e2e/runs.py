"""Runs of the trainer through its front door, and what tests look at afterwards."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig

from qwenvl.config import arguments_to_yaml, parse_arguments
from qwenvl.data.encoding.processor import processor_limits
from qwenvl.families import get_family
from qwenvl.train.build.data import open_config, open_data
from qwenvl.train.build.model import open_model
from qwenvl.train.checkpointing_trainer import Records
from qwenvl.train.records.sample_losses import FILE_NAME as SAMPLE_LOSSES
from qwenvl.train.records.sample_losses import read_sample_losses
from qwenvl.train.run import build_trainer
from qwenvl.train.train_qwen import main
from qwenvl.train.trainer import Trainer

REPOSITORY = Path(__file__).resolve().parents[2]

ERROR = re.compile(r"^(?:\[rank \d+\] )?\d\d:\d\d:\d\d error: (.*)", re.MULTILINE)
"""A message that a run ended with."""

SETTINGS: dict[str, Any] = {
    "dataset_use": "mixed",
    "tune_mm_vision": True,
    "tune_mm_mlp": True,
    "tune_mm_llm": True,
    "max_pixels": "64*64",
    "min_pixels": "32*32",
    "video_max_pixels": "4*64*64",
    "video_min_pixels": "4*32*32",
    "video_max_frames": 4,
    "video_min_frames": 2,
    "model_max_length": 2048,
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.1,
    "max_steps": 3,
    "save_strategy": "no",
    "dataloader_num_workers": 0,
    "report_to": "none",
    "disable_tqdm": True,
    "attn_implementation": "sdpa",
    "verify_export": False,  # tests/e2e/test_export.py tries it; a process of its own takes seconds
}

LORA: dict[str, Any] = {
    "tune_mm_llm": False,
    "tune_mm_mlp": False,
    "tune_mm_vision": False,
    "lora_enable": True,
    "lora_r": 4,
    "lora_alpha": 8,
}
"""Settings that train adapters alone."""


def flags(model: Path, output: Path, registry: Path, **settings: Any) -> list[str]:
    """Return the command line of a run: ``SETTINGS``, changed by ``settings``; None leaves a flag out."""
    named = {"model_name_or_path": model, "output_dir": output, "dataset_registry": registry, **SETTINGS, **settings}
    return [text for name, value in named.items() if value is not None for text in (f"--{name}", str(value))]


def train(model: Path, output: Path, registry: Path, **settings: Any) -> Path:
    """Train in this process; return the output folder."""
    assert main(flags(model, output, registry, **settings)) == 0
    return output


def kill_tree(process: subprocess.Popen[Any]) -> None:
    """Kill a process and all that it started; the ranks of torchrun lead sessions of their own."""
    for one in (*psutil.Process(process.pid).children(recursive=True), process):
        one.kill()


def torchrun(script: Path, *arguments: str, ranks: int = 2, seconds: float = 900, **environment: str) -> str:
    """Run a Python file on several ranks of this machine; return what they printed, also written beside it."""
    environment |= os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    printed = script.with_suffix(".log")
    with (
        printed.open("w") as log,
        subprocess.Popen(
            [*command, str(script), *arguments],
            env=environment,
            cwd=REPOSITORY,
            stdout=log,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            code: int | None = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            kill_tree(process)
            code = None
    text = printed.read_text()
    assert code == 0, f"{'stopped after its time' if code is None else code}: {text[-6000:]}"
    return text


RUNNER = """
import json, sys
from accelerate.state import AcceleratorState
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from qwenvl.config import parse_arguments
from qwenvl.train import run as setup
from qwenvl.train.trainer import Trainer
from qwenvl.utils.distributed import gather_objects, run_program, shut_down
from qwenvl.utils.logging import setup_logging


def engine_of(model):
    if isinstance(model, DistributedDataParallel):
        return "DDP"
    if isinstance(model, FSDPModule) and any(isinstance(value, DTensor) for value in model.parameters()):
        return "FSDP2"
    stage = model.zero_optimization_stage()
    assert stage < 3 or all(value.ds_tensor.numel() < max(value.ds_numel, 2) for value in model.parameters())
    return f"ZeRO-{stage}" + (" offload" if model.zero_use_cpu_optimizer() else "")


class ObservedTrainer(Trainer):
    def train(self, **options):
        result = super().train(**options)
        engines.append(engine_of(self.model_wrapped))
        return result


setup_logging("info")
setup.Trainer = ObservedTrainer
engines = []
for arguments in json.load(open(sys.argv[1])):
    assert setup.run(parse_arguments(arguments)) == 0
    gather_objects(None)
    AcceleratorState._reset_state()
json.dump(engines, open(sys.argv[1] + ".engines", "w"))
shut_down()
run_program(lambda: 0)
"""


def run_on_two_ranks(
    folder: Path, commands: dict[str, list[str]], engine: str | dict[str, str], before: str = "", **options: Any
) -> dict[str, Path]:
    """Run command lines one after another in the same two processes.

    Args:
        folder: the command lines' output folders are in it, by the names of ``commands``.
        commands: the command lines.
        engine: what has to have trained them; for each, where they differ.
        before: Python lines that the processes run first.
        options: of :func:`torchrun`.

    Returns:
        The output folders.
    """
    (folder / "runner.py").write_text(before + RUNNER)
    (folder / "commands.json").write_text(json.dumps(list(commands.values())))
    torchrun(folder / "runner.py", str(folder / "commands.json"), **options)
    wanted = [engine if isinstance(engine, str) else engine[name] for name in commands]
    assert json.loads((folder / "commands.json.engines").read_text()) == wanted
    return {name: folder / name for name in commands}


def weights(folder: Path) -> dict[str, Tensor]:
    """Return the tensors in a folder's safetensors files, by the names they have there."""
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118  not a dict
    assert found, f"{folder} holds no weights"
    return found


def largest_difference(one: Path, other: Path) -> float:
    """Return the largest difference of a weight of two folders, which must hold the same tensors."""
    left, right = weights(one), weights(other)
    assert left.keys() == right.keys()
    return max(float((left[name] - right[name]).abs().max()) for name in left)


def read_config(folder: Path) -> dict[str, Any]:
    """Return a folder's config as transformers reads it, without the folder's name."""
    config: dict[str, Any] = AutoConfig.from_pretrained(folder).to_dict()
    return {name: value for name, value in config.items() if name not in ("_name_or_path", "transformers_version")}


def equal_bits(one: Path, other: Path) -> bool:
    """Return whether two folders hold the same tensors, bit for bit."""
    left, right = weights(one), weights(other)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def history(folder: Path, key: str = "loss") -> list[float]:
    """Return the logged values of a run, in order."""
    state = json.loads((folder / "trainer_state.json").read_text())
    return [line[key] for line in state["log_history"] if key in line]


def read_annotations(registry: Path, name: str) -> list[dict[str, Any]]:
    """Return the records of a dataset that ``registry`` lies beside."""
    return json.loads((registry.parent / f"{name}.json").read_text())


def changed(before: Path, after: Path, prefixes: Sequence[str] = ("",)) -> set[str]:
    """Return the names of the tensors that differ between two folders, of those that start with a prefix."""
    left, right = weights(before), weights(after)
    assert left.keys() == right.keys()
    return {name for name in left if name.startswith(tuple(prefixes)) and not torch.equal(left[name], right[name])}


def open_trainer(model: Path, output: Path, registry: Path, **settings: Any) -> Trainer:
    """Return the trainer of a run with its model and data, before it trains."""
    parsed = parse_arguments(flags(model, output, registry, **settings))
    config = open_config(parsed)
    data = open_data(parsed, get_family(config.model_type), config)
    opened = open_model(parsed, data.processor, config, data.added_tokens, objective=data.objective)
    records = Records(arguments_to_yaml(parsed), processor_limits(data.processor))
    return build_trainer(parsed, opened, data, records)


def losses_alone(trainer: Trainer) -> dict[int, tuple[float, int]]:
    """Return (loss, units) of each training sample by its line, from batches of one sample in the objective itself."""
    found = {}
    with torch.no_grad():
        for batch in trainer.get_train_dataloader():
            loss, _ = trainer.objective.compute(trainer.model, batch)
            (origin,) = batch["origins"]
            found[origin.line] = (float(loss), int(batch["num_units"]))
    return found


def logged_losses(folder: Path) -> dict[int, tuple[float, float]]:
    """Return (loss, units) by line of a run of one epoch with ``--log_sample_losses``; no line stands there twice."""
    rows = read_sample_losses(folder / SAMPLE_LOSSES).to_pylist()
    found = {row["line"]: (row["loss"], row["tokens"]) for row in rows}
    assert len(found) == len(rows)
    return found
