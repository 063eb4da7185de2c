from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from qwenvl.config import ParsedArguments, parse_arguments

REPOSITORY = Path(__file__).resolve().parents[2]
NAMES = sorted(path.stem for path in (REPOSITORY / "scripts").glob("sft_*.sh"))
RANKS = ("CUDA_VISIBLE_DEVICES", "NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "DRY_RUN")


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the launchers in a folder whose name has spaces."""
    folder = tmp_path_factory.mktemp("somewhere") / "my repo $HOME"
    for name in ("scripts", "configs"):
        shutil.copytree(REPOSITORY / name, folder / name)
    return folder


def run(script: Path, *flags: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if name not in RANKS}
    command = ["bash", str(script), *flags]
    return subprocess.run(command, cwd=cwd, env=clean | environment, capture_output=True, text=True, timeout=900)


def dry(script: Path, *flags: str, cwd: Path, **environment: str) -> list[str]:
    done = run(script, *flags, cwd=cwd, DRY_RUN="1", **environment)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


def after_entry_point(command: list[str]) -> list[str]:
    place = next(index for index, word in enumerate(command) if word.endswith("qwenvl/train/train_qwen.py"))
    return command[place + 1 :]


def parsed_here(flags: list[str]) -> ParsedArguments:
    pytest.importorskip("deepspeed")
    return parse_arguments([*flags, "--report_to", "none", "--use_cpu"])


def test_the_official_sizes_are_here() -> None:
    sizes = ("qwen2_5vl_7b", "qwen3vl_2b", "qwen3vl_30b_a3b", "qwen3vl_32b", "qwen3vl_4b", "qwen3vl_8b")
    assert {f"sft_{size}" for size in sizes} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_every_script_gives_valid_arguments(copied: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "my runs"
    flags = after_entry_point(
        dry(copied / "scripts" / f"{name}.sh", "--seed", "3", cwd=tmp_path, OUTPUT_DIR=str(folder), DATASETS="a%50, b")
    )
    result = parsed_here(flags)
    assert result.training.output_dir == str(folder)
    assert result.data.dataset_use == "a%50, b"
    assert result.training.seed == 3
    assert Path(result.given["deepspeed"]).stem in ("zero2", "zero3")


@pytest.mark.parametrize("name", NAMES)
def test_a_script_is_its_recipe(tmp_path: Path, name: str) -> None:
    of_script = parsed_here(after_entry_point(dry(REPOSITORY / "scripts" / f"{name}.sh", cwd=tmp_path))).given
    of_recipe = parsed_here([str(REPOSITORY / "configs" / f"{name}.yaml")]).given
    assert of_script == of_recipe


def test_the_environment_sets_every_value(copied: Path, tmp_path: Path) -> None:
    environment = {
        "MODEL": "my model",
        "LR": "3e-6",
        "BATCH_SIZE": "3",
        "GRAD_ACCUM": "5",
        "RUN_NAME": "r",
        "EPOCHS": "2",
        "DEEPSPEED": "",
    }
    environment |= {
        "NPROC_PER_NODE": "7",
        "NNODES": "2",
        "NODE_RANK": "1",
        "MASTER_ADDR": "host",
        "MASTER_PORT": "1234",
    }
    command = dry(copied / "scripts" / "sft_qwen3vl_4b.sh", cwd=tmp_path, **environment)
    torchrun = " ".join(command)
    assert "--nnodes 2 --node_rank 1 --nproc_per_node 7 --master_addr host --master_port 1234" in torchrun
    result = parsed_here(after_entry_point(command))
    assert result.model.model_name_or_path == "my model"
    assert (result.training.learning_rate, result.training.gradient_accumulation_steps) == (3e-6, 5)
    assert (result.training.per_device_train_batch_size, result.training.per_device_eval_batch_size) == (3, 6)
    assert result.training.deepspeed is None
    assert (result.training.run_name, result.training.num_train_epochs) == ("r", 2)


@pytest.mark.parametrize(("visible", "processes"), [("0,1,5", "3"), ("2", "1"), ("", "1")])
def test_one_process_a_visible_device(copied: Path, tmp_path: Path, visible: str, processes: str) -> None:
    command = dry(copied / "scripts" / "launch.sh", "x.yaml", cwd=tmp_path, CUDA_VISIBLE_DEVICES=visible)
    assert command[command.index("--nproc_per_node") + 1] == processes


def test_several_machines_need_an_address(copied: Path, tmp_path: Path) -> None:
    done = run(copied / "scripts" / "launch.sh", "x.yaml", cwd=tmp_path, NNODES="2", DRY_RUN="1")
    assert done.returncode != 0
    assert "MASTER_ADDR" in done.stderr


def test_words_reach_the_program_as_written(copied: Path, tmp_path: Path) -> None:
    words = ["a b.yaml", "--run_name", "x 'y' \"z\" $HOME *", "--chat_template_kwargs", '{"a": "b c"}']
    program = copied / "python here"
    program.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv))\n")
    program.chmod(0o755)
    done = run(copied / "scripts" / "launch.sh", *words, cwd=tmp_path, PYTHON=str(program))
    assert done.returncode == 0, done.stderr
    assert after_entry_point(json.loads(done.stdout)) == words


def test_a_failing_program_fails_the_script(copied: Path, tmp_path: Path) -> None:
    assert run(copied / "scripts" / "sft_qwen3vl_2b.sh", cwd=tmp_path, PYTHON="false").returncode == 1


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed")
def test_shellcheck() -> None:
    scripts = [str(path) for path in (REPOSITORY / "scripts").glob("*.sh")]
    done = subprocess.run(["shellcheck", "-x", *scripts], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout


def zero(name: str) -> dict[str, Any]:
    return json.loads((REPOSITORY / "configs" / f"{name}.json").read_text())


@pytest.mark.parametrize("name", ["zero2", "zero3", "zero3_offload"])
def test_deepspeed_settings(name: str, tmp_path: Path) -> None:
    settings = zero(name)
    assert not {"optimizer", "scheduler"} & set(settings)  # the trainer makes both: rates differ by module
    assert settings["bf16"]["enabled"] == settings["fp16"]["enabled"] == "auto"
    stage = settings["zero_optimization"]["stage"]
    assert settings["zero_optimization"]["overlap_comm"] is True  # right from DeepSpeed 0.19 on, which is required
    assert settings["data_types"] == {"grad_accum_dtype": "fp32"}  # the sum of many micro-batches keeps its digits
    assert stage == 2 or settings["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True
    flags = ["--model_name_or_path", "m", "--dataset_use", "a", "--output_dir", str(tmp_path), "--tune_mm_llm"]
    training = parsed_here([*flags, "--deepspeed", str(REPOSITORY / "configs" / f"{name}.json"), "--bf16"]).training
    filled = training.hf_deepspeed_config
    assert filled.is_zero3() == (stage == 3)
    assert filled.is_offload() == (name == "zero3_offload")
    assert filled.get_value("bf16.enabled") is True


@pytest.mark.parametrize(("processes", "given", "threads"), [(1, "", None), (1000, "", "1"), (1, "3", "3")])
def test_each_process_has_its_share_of_the_cores(
    processes: int, given: str, threads: str | None, tmp_path: Path
) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "threads $OMP_NUM_THREADS"\n')
    python.chmod(0o755)
    environment = {"PYTHON": str(python), "NPROC_PER_NODE": str(processes), "OMP_NUM_THREADS": given}
    done = run(REPOSITORY / "scripts" / "launch.sh", cwd=tmp_path, **environment)
    assert done.stdout == f"threads {threads or len(os.sched_getaffinity(0))}\n", done.stderr
