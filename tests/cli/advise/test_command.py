"""``tools/advise.py``: its figures are those of ``--dry_run``, and its commands are accepted."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from benchmarks.step_samples import make_config
from qwenvl.cli.advise.candidates import KINDS, candidates
from qwenvl.cli.advise.choice import Limits, choose
from qwenvl.cli.advise.command import PAGE, AdviseArguments, advise, command_of, limits_of, main, open_estimator
from qwenvl.config import parse_arguments
from qwenvl.config.parsing.parser import parse_class
from qwenvl.config.parsing.recipes import read_recipe
from qwenvl.families import FAMILIES
from qwenvl.train.train_qwen import main as train
from tests.e2e.runs import REPOSITORY, SETTINGS

DATA = {name: value for name, value in SETTINGS.items() if "pixels" in name or "frames" in name}
GIB = 2**30


def arguments(model: Path, registry: Path, output: Path, **settings: Any) -> AdviseArguments:
    named = {"dataset_use": "mixed", "gpus": "4xH100-80G", "model_max_length": 1024, "options": 9, **DATA, **settings}
    named |= {"model": model, "dataset_registry": registry, "output_dir": output}
    return parse_class(
        AdviseArguments, [text for name, value in named.items() for text in (f"--{name}", str(value))], PAGE
    )


def flags_of(command: str) -> list[str]:
    return shlex.split(command.partition("scripts/launch.sh ")[2])


def megabytes(text: str) -> float:
    number, unit = text.split()
    return float(number.replace(",", "")) * {"MiB": 1, "GiB": 1024}[unit]


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl", "qwen3_vl_moe"])
def test_the_figures_are_those_of_a_dry_run_of_the_printed_command(
    family: str, tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path, caplog: Any
) -> None:
    given = arguments(tiny_checkpoint(family), registry, tmp_path / "out")
    found = [estimate for estimates in advise(given).fitting.values() for estimate in estimates]
    engines = {(one.candidate.kind, one.candidate.engine.name) for one in found}
    assert {engine for kind, engine in engines if kind == "LoRA"} == {
        *("DDP", "ZeRO-2", "ZeRO-3", "FSDP2", "ZeRO-3 offload")
    }
    assert ("QLoRA", "DDP") in engines
    for one in found[:: 2 if family == "qwen3_vl" else 6]:
        caplog.clear()
        computed = ["--dry_run", "--dry_run_devices", "4", "--device_peak_tflops", "989.5"]
        assert train([*flags_of(command_of(given, one)), *computed]) == 0
        text = next(line.getMessage() for line in caplog.records if line.message.startswith("Dry run"))
        for part, size in one.parts.items():
            printed = re.search(rf"(?m)^{re.escape(part)} +([\d.,]+ \w+)$", text)
            assert printed is not None, part
            assert megabytes(printed[1]) == pytest.approx(size / 2**20, abs=0.051), (part, one)
        assert f"{one.steps:,} in all" in text
        hours = re.search(r"(?m)^hours +([\d.e-]+) ", text)
        assert hours is not None and float(hours[1]) == pytest.approx(one.hours, rel=5e-3)


@pytest.mark.parametrize(
    ("family", "gpus"), [("qwen3_vl", "1xL4"), ("qwen3_vl", "64xH200"), *((name, "8xA100-40G") for name in FAMILIES)]
)
def test_every_command_is_accepted_by_training(
    family: str, gpus: str, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """For a config alone: without data, without weights."""
    config = tiny_checkpoint(family) / "config.json"
    given = AdviseArguments(model=str(config), gpus=gpus, model_max_length=2048, checkpoint="M", max_pixels=50000)
    advice = advise(given)
    assert not advice.missing
    for estimates in advice.fitting.values():
        for one in estimates:
            command = flags_of(command_of(given, one))
            quantized = ["--dry_run"] if one.candidate.kind == "QLoRA" else []  # it needs a GPU to run
            parsed = parse_arguments([*command, *quantized])
            assert parsed.model.model_name_or_path == "M" and parsed.data.max_pixels == 50000
            assert parsed.training.gradient_accumulation_steps == max(1, round(2**18 / 2048 / one.candidate.gpus))


def test_lora_is_that_of_the_recipes() -> None:
    """Of mixtures: in models without experts the target has no effect."""
    recipe = read_recipe("configs/lora_qwen3vl_30b_a3b.yaml")
    assert {name: str(recipe[name]) for name in KINDS["LoRA"]} == {
        name: str(value) for name, value in KINDS["LoRA"].items()
    }


def test_the_launcher_takes_the_command(tiny_checkpoint: Callable[[str], Path]) -> None:
    given = AdviseArguments(model=str(tiny_checkpoint("qwen3_vl") / "config.json"), gpus="16xH100", options=1)
    command = command_of(given, advise(given).fitting["all parts"][0])
    assert command.startswith("NNODES=2 NODE_RANK=$RANK MASTER_ADDR=$HOST NPROC_PER_NODE=8 bash ")
    done = subprocess.run(
        ["bash", "-c", f"export DRY_RUN=1 RANK=1 HOST=other; {command}"], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "--nnodes 2 --node_rank 1 --nproc_per_node 8 --master_addr other" in done.stdout


def test_what_would_fit_fits_and_half_of_it_does_not(tmp_path: Path) -> None:
    make_config("2b").save_pretrained(tmp_path)
    given = AdviseArguments(model=str(tmp_path), gpus="1xRTX-4090", options=1, host_memory=8.0)
    estimator, limits = open_estimator(given), limits_of(given)
    missing = choose(estimator, limits, ["all parts"]).missing["all parts"]
    found = re.match(r"(\d+) GPUs of this kind with ZeRO-[23]", missing)
    assert found is not None and int(found[1]) in (2, 4, 8) and missing.endswith("; or LoRA"), missing
    for count, fits in ((int(found[1]), True), (int(found[1]) // 2, False)):
        several = replace(limits, gpus=replace(limits.gpus, count=count))
        assert ("all parts" in choose(estimator, several, ["all parts"]).fitting) == fits
    host = re.search(r"ZeRO-3 offload with ([\d.]+) GiB of host memory", missing)
    assert host is not None
    with_host = replace(limits, host=int(float(host[1]) * GIB) + GIB)
    assert choose(estimator, with_host, ["all parts"]).fitting["all parts"][0].candidate.engine.offloads


def test_a_smaller_kind_of_training_that_does_not_fit_either_is_not_named(
    tiny_checkpoint: Callable[[str], Path],
) -> None:
    given = AdviseArguments(model=str(tiny_checkpoint("qwen3_vl") / "config.json"), gpus="1xL4", options=1)
    estimator, limits = open_estimator(given), limits_of(given)
    full = replace(limits, reserve=limits.gpus.usable)
    assert choose(estimator, full, ["all parts"]).missing["all parts"] == "GPUs of more memory"


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_vl_moe"])
def test_qlora_holds_the_linear_layers_of_the_language_model_in_four_bits(
    family: str, tiny_checkpoint: Callable[[str], Path]
) -> None:
    """Stacked experts are no linear layers, and bitsandbytes leaves them as they are."""
    given = AdviseArguments(model=str(tiny_checkpoint(family) / "config.json"), gpus="1xL4", options=1)
    found = {kind: estimates[0].states.weights for kind, estimates in advise(given).fitting.items()}
    with torch.device("meta"):
        stock: Any = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(tiny_checkpoint(family)))
    layers = [layer for layer in stock.model.language_model.modules() if isinstance(layer, torch.nn.Linear)]
    elements = sum(layer.weight.numel() for layer in layers)
    assert found["LoRA"] - found["QLoRA"] == pytest.approx(elements * (2 - 0.5 - 0.127 / 8), abs=1)


@pytest.mark.parametrize(("words", "fits"), [(300, True), (1300, False)], ids=["short rows", "a long row"])
def test_shorter_packs_leave_no_row_out(
    words: int, fits: bool, tiny_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    turns = [
        [{"from": "human", "value": "Count."}, {"from": "gpt", "value": "one " * length}] for length in (300, words)
    ]
    (tmp_path / "rows.json").write_text(json.dumps([{"conversations": each} for each in turns] * 4))
    (tmp_path / "registry.py").write_text(
        f"data_dict = {{'mixed': {{'annotation_path': '{tmp_path}/rows.json', 'data_path': ''}}}}\n"
    )
    given = arguments(tiny_checkpoint("qwen3_vl"), tmp_path / "registry.py", tmp_path, model_max_length=2048)
    estimator, limits = open_estimator(given), limits_of(given)
    least = [
        min(estimator.estimate(one, 1.0).all for one in candidates("merger", 4, [pack], 4096, sharded=True))
        for pack in (1024, 2048)
    ]
    between: Limits = replace(limits, reserve=limits.gpus.usable - sum(least) // 2)
    found = choose(estimator, between, ["merger"]).fitting.get("merger", ())
    assert {one.candidate.pack for one in found} == ({1024} if fits else set())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--gpus", "8xH100"], ["--model is missing"]),
        (["--model", "/nowhere", "--gpus", "8xH100"], ["/nowhere", "no such folder"]),
        (["--model", "{config}", "--gpus", "8xH1000"], ["H1000", "H100"]),
        (["--model", "{config}", "--gpus", "8xA100"], ["40 or 80 GB", "8xA100-40G"]),
        (["--model", "{config}", "--gpus", "0xA100-40G"], ["8xH100-80G"]),
        (["--model", "{config}", "--gpus", "1xL4", "--mfu", "1.5"], ["--mfu 1.5"]),
        (["--model", "{config}", "--gpus", "1xL4", "--dataset_use", "mixed"], ["tokenizer", "--processor"]),
        (["--model", "{registry}", "--gpus", "1xL4"], ["no config.json"]),
    ],
)
def test_mistakes_are_told(
    flags: list[str],
    words: list[str],
    tiny_checkpoint: Callable[[str], Path],
    registry: Path,
    tmp_path: Path,
    caplog: Any,
) -> None:
    config = tmp_path / "config.json"
    config.write_bytes((tiny_checkpoint("qwen3_vl") / "config.json").read_bytes())
    assert main([flag.format(config=config, registry=registry) for flag in flags]) == 1
    message = caplog.records[-1].getMessage()
    assert all(word in message for word in words), message


def test_prints_a_table_and_the_assumptions(
    tiny_checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", str(tiny_checkpoint("qwen3_vl")), "--gpus", "2xL4", "--mfu", "0.3", "--options", "1"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"(?m)^1 +all parts +DDP +off +8,192 +16 ", text)
    assert "30% (--mfu) of 121 TFLOP/s" in text
    assert text.count("bash scripts/launch.sh") == 5
