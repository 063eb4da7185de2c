"""Nothing that Qwen3.5 checkpoints hold is lost: layers for multi-token prediction, and the types of tensors."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForImageTextToText

from qwenvl.cli.make_tiny_checkpoint.command import build_tiny_checkpoint
from qwenvl.cli.merge_lora import main as merge_main
from qwenvl.inference.generate import open_chat_model
from tests.e2e.runs import LORA, REPOSITORY, changed, flags, run_on_two_ranks, train, weights
from tests.e2e.test_engines import FSDP2

ONE_STEP: dict[str, Any] = {"max_steps": 1, "dataset_use": "pictures,text", "data_flatten": False}


def mtp(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in weights(folder).items() if name.startswith("mtp.")}


def require_carried(folder: Path, source: Path) -> None:
    """The layer is that of the source to the bit, the index knows where it is, and transformers opens the folder."""
    wanted, found = mtp(source), mtp(folder)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) and found[name].dtype == wanted[name].dtype for name in wanted)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    held = {name: file.name for file in folder.glob("model-*.safetensors") for name in load_file(file)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights(folder).values())
    assert json.loads((folder / "config.json").read_text())["text_config"]["mtp_num_hidden_layers"] == 1
    _, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values())


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in bfloat16, with ``A_log`` and norms of linear attention in float32, as Qwen3.5 was published."""
    folder = tmp_path_factory.mktemp("half")
    build_tiny_checkpoint("qwen3_5", folder, dtype=torch.bfloat16)
    return folder


def test_checkpoints_and_finished_folders_hold_the_layer_as_it_was(
    half: Path, registry: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever type and size the files are asked to have; and a run resumes from such a checkpoint."""
    caplog.set_level(logging.INFO)
    settings = {
        **ONE_STEP,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_dtype": "bfloat16",
        "max_shard_size": "9KB",
    }
    output = train(half, tmp_path / "run", registry, **settings, verify_export=True)
    require_carried(output, half)
    require_carried(output / "checkpoint-1", half)
    assert "Saved bit for bit as in the checkpoint, not trained: 15 tensors (mtp.*)." in caplog.text
    train(half, tmp_path / "run", registry, **settings | {"max_steps": 2})
    require_carried(output / "checkpoint-2", half)
    again = train(output, tmp_path / "again", registry, **ONE_STEP)
    require_carried(again, half)


def types(folder: Path) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in weights(folder).items()}


def test_tensors_have_the_types_of_the_source(half: Path, registry: Path, tmp_path: Path) -> None:
    """Trained in bfloat16, in float32, merged after adapters were trained beside them, or cast at the end."""
    source = types(half)
    wide = {name for name, dtype in source.items() if dtype == torch.float32}
    assert {name.rpartition("linear_attn.")[2] for name in wide} == {"A_log", "norm.weight"}
    trained = train(half, tmp_path / "run", registry, **ONE_STEP, model_dtype="bfloat16", verify_export=True)
    assert types(trained) == source
    opened = dict(open_chat_model(str(trained), device="cpu").model.named_parameters())
    assert {name for name, value in opened.items() if value.dtype == torch.float32} == wide, "as servers compute"
    assert changed(half, trained) >= {name for name in wide if name.endswith("A_log")}
    saved = {"save_strategy": "steps", "save_steps": 1, "verify_export": True}
    masters = train(half, tmp_path / "masters", registry, **ONE_STEP, **saved, bf16=True)
    assert types(masters) == source and json.loads((masters / "config.json").read_text())["dtype"] == "bfloat16"
    kept = weights(masters / "checkpoint-1")
    assert set(types(masters / "checkpoint-1").values()) == {torch.float32, torch.bfloat16}, "mtp.* as it was"
    assert all(torch.equal(value, kept[name].to(value.dtype)) for name, value in weights(masters).items())
    adapter = train(half, tmp_path / "adapter", registry, **ONE_STEP, **LORA, bf16=True, verify_export=True)
    assert merge_main(["--adapter", str(adapter), "--output", str(tmp_path / "merged")]) == 0
    assert types(tmp_path / "merged") == source
    assert not changed(half, tmp_path / "merged") & wide
    cast = train(half, tmp_path / "cast", registry, **ONE_STEP, save_dtype="bfloat16")
    assert set(types(cast).values()) == {torch.bfloat16}


@pytest.mark.slow
def test_deepspeed_saves_float32_parts_so(half: Path, registry: Path, tmp_path: Path) -> None:
    """It computes with them in bfloat16; trained ones are its master weights, frozen ones the checkpoint's own."""
    pytest.importorskip("deepspeed")
    saved = {**ONE_STEP, "bf16": True, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1e-2}
    runs: dict[str, dict[str, Any]] = {
        "trained": {"deepspeed": REPOSITORY / "configs" / "zero3.json", "verify_export": True},
        "frozen": {"deepspeed": REPOSITORY / "configs" / "zero3.json", "tune_mm_llm": False},
        "zero2": {"deepspeed": REPOSITORY / "configs" / "zero2.json"},
    }
    commands = {name: flags(half, tmp_path / name, registry, **saved, **run) for name, run in runs.items()}
    split = run_on_two_ranks(tmp_path, commands, {"trained": "ZeRO-3", "frozen": "ZeRO-3", "zero2": "ZeRO-2"})
    source = types(half)
    wide = {name for name, dtype in source.items() if dtype == torch.float32}
    for name, output in split.items():
        for folder in (output, output / "checkpoint-1"):
            assert types(folder) == source, name
        if name == "frozen":
            assert not changed(half, output) & wide
        else:
            assert changed(half, output) >= {part for part in wide if part.endswith("A_log")}
            found = weights(output)
            assert any((found[part] != found[part].bfloat16()).any() for part in wide), "not rounded"


def test_merged_folders_hold_the_layer_and_adapters_need_none(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    base = tiny_checkpoint("qwen3_5_moe")
    adapter = train(base, tmp_path / "adapter", registry, **ONE_STEP, **LORA)
    assert not any("mtp." in name for name in weights(adapter))
    assert merge_main(["--adapter", str(adapter), "--output", str(tmp_path / "merged")]) == 0
    require_carried(tmp_path / "merged", base)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "settings"),
    [("ZeRO-3", {"deepspeed": str(REPOSITORY / "configs" / "zero3.json")}), ("FSDP2", FSDP2)],
    ids=["zero3", "fsdp2"],
)
def test_every_engine_carries_the_layer(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path, engine: str, settings: dict[str, Any]
) -> None:
    source = tiny_checkpoint("qwen3_5")
    asked = {**ONE_STEP, **settings, "save_strategy": "steps", "save_steps": 1}
    command = flags(source, tmp_path / "run", registry, **asked)
    output = run_on_two_ranks(tmp_path, {"run": command}, engine)["run"]
    require_carried(output, source)
    require_carried(output / "checkpoint-1", source)


def test_a_config_that_promises_a_layer_that_is_not_there_is_said_and_mended(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As folders that stock transformers saved are."""
    source = tmp_path / "stock"
    shutil.copytree(tiny_checkpoint("qwen3_5"), source)
    file = source / "model.safetensors"
    tensors = {name: tensor for name, tensor in load_file(file).items() if not name.startswith("mtp.")}
    save_file(tensors, file, metadata={"format": "pt"})
    output = train(source, tmp_path / "run", registry, **ONE_STEP)
    assert "config.json says mtp_num_hidden_layers 1, but 0 such layers" in caplog.text
    assert json.loads((output / "config.json").read_text())["text_config"]["mtp_num_hidden_layers"] == 0
    assert (output / "model.safetensors").is_file() and not mtp(output)
