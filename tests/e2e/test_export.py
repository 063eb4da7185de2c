"""The finished folder: whole, named and typed as it should be, and the same model to stock transformers."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from qwenvl.train import run as setup
from qwenvl.train.checkpoint.folder_check import read_source, require_whole
from qwenvl.train.export import verify_process as export_check
from qwenvl.train.train_qwen import main
from qwenvl.train.trainer import Trainer
from qwenvl.utils.errors import UserError
from tests.e2e.runs import LORA, REPOSITORY, flags, run_on_two_ranks, train, weights

CHECK: dict[str, Any] = {"max_steps": 1, "dataset_use": "pictures,text"}


def _json(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


@pytest.fixture(scope="module")
def saved(tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A verified folder of small bfloat16 files, with a checkpoint in the precision of training beside them."""
    asked = {"save_dtype": "bfloat16", "max_shard_size": "200KB", "save_strategy": "steps", "save_steps": 1}
    output = tmp_path_factory.mktemp("export") / "run"
    return train(tiny_checkpoint("qwen3_vl"), output, registry, **CHECK, **asked, verify_export=True)


def test_weights_have_the_precision_and_sizes_asked_for(saved: Path, tiny_checkpoint: Callable[[str], Path]) -> None:
    trained, written = weights(saved / "checkpoint-1"), weights(saved)
    assert written.keys() == trained.keys() == weights(tiny_checkpoint("qwen3_vl")).keys()
    assert all(torch.equal(written[name], trained[name].bfloat16()) for name in trained)
    assert {tensor.dtype for tensor in trained.values()} == {torch.float32}
    index = _json(saved / "model.safetensors.index.json")
    files = sorted(saved.glob("model-*-of-*.safetensors"))
    assert len(files) > 1 and not (saved / "model.safetensors").exists()
    held = {name: file.name for file in files for name in load_file(file)}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in written.values())
    assert all(
        sum(t.nbytes for t in load_file(file).values()) <= 200_000 or len(load_file(file)) == 1 for file in files
    )
    config = _json(saved / "config.json")
    assert [part["dtype"] for part in (config, config["text_config"], config["vision_config"]) if "dtype" in part] == [
        "bfloat16"
    ] * sum("dtype" in part for part in (config, config["text_config"], config["vision_config"]))
    model, report = AutoModelForImageTextToText.from_pretrained(saved, output_loading_info=True)
    assert model.dtype == torch.bfloat16
    assert not report["missing_keys"] and not report["unexpected_keys"]


def test_files_of_an_earlier_model_do_not_stay(
    saved: Path, tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    """transformers prefers one file to several: a left-over one would be loaded."""
    shutil.copytree(saved, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    train(tiny_checkpoint("qwen3_vl"), tmp_path / "run", registry, **CHECK)
    assert [file.name for file in (tmp_path / "run").glob("model*")] == ["model.safetensors"]


class _Changing(Trainer):
    """Doubles a weight in the saved files."""

    def save_final(self, card: Any = None) -> None:
        super().save_final(card)
        path = Path(self.args.output_dir) / "model.safetensors"
        tensors = load_file(path)
        name = next(name for name in tensors if name.endswith("layers.1.mlp.down_proj.weight"))
        tensors[name] *= 2
        save_file(tensors, path, {"format": "pt"})


def test_a_folder_that_computes_something_else_ends_the_run(
    tiny_checkpoint: Callable[[str], Path],
    registry: Path,
    tmp_path: Path,
    fail: Callable[[list[str]], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(setup, "Trainer", _Changing)
    message = fail(flags(tiny_checkpoint("qwen3_vl"), tmp_path, registry, **CHECK, verify_export=True))
    assert "finds: 1 tensors are not those of training: model.language_model.layers.1.mlp.down_proj.weight." in message
    assert (tmp_path / "model.safetensors").exists()


def _without(*names: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return remove


def _renamed(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({name.replace("model.visual.", "visual."): value for name, value in tensors.items()}, file)


def _with_a_head(folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    head = torch.zeros_like(tensors["model.language_model.embed_tokens.weight"])
    save_file(tensors | {"lm_head.weight": head}, file)


def _untied(folder: Path) -> None:
    config = _json(folder / "config.json")
    config["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config))


def _of_another_precision(folder: Path) -> None:
    file = folder / "model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file)


@pytest.fixture(scope="module")
def whole(tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in one file, as trained."""
    return train(tiny_checkpoint("qwen3_vl"), tmp_path_factory.mktemp("whole") / "run", registry, **CHECK)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without("chat_template.jinja"), "the chat template is missing"),
        (_without("processor_config.json", "preprocessor_config.json"), "the image processor is missing"),
        (_without("tokenizer.json"), "the tokenizer is missing"),
        (_without("generation_config.json"), "generation_config.json is missing"),
        (_without("model.safetensors"), "there are no weights"),
        (_renamed, r"not named as in the checkpoint it was trained from; missing: model\.visual\..*; new: visual\."),
        (_with_a_head, "ties lm_head.weight to .*, but the files hold two different tensors"),
        (_untied, "lm_head.weight is missing from the weights, and config.json does not tie it"),
        (_of_another_precision, r"config.json says float32, but tensors are of another precision: .*\(float16\)"),
    ],
)
def test_what_is_missing_or_wrong_is_named(
    whole: Path,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    source = read_source(str(tiny_checkpoint("qwen3_vl")))
    require_whole(str(whole), source)
    shutil.copytree(whole, tmp_path / "run")
    damage(tmp_path / "run")
    with pytest.raises(UserError, match=f"was saved, but is not complete:\n  .*{message}"):
        require_whole(str(tmp_path / "run"), source)


def test_a_missing_part_of_the_weights_is_named(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "run")
    (tmp_path / "run" / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(UserError, match=r"weight files are missing that .*index.json names: model-00002-of-00004"):
        require_whole(str(tmp_path / "run"), None)


class _Forgetful(Trainer):
    """Loses the chat template of whatever it saves."""

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        (Path(output_dir or self.args.output_dir) / "chat_template.jinja").unlink()


def test_a_checkpoint_that_lacks_something_ends_the_run_and_stays(
    tiny_checkpoint: Callable[[str], Path],
    registry: Path,
    tmp_path: Path,
    fail: Callable[[list[str]], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(setup, "Trainer", _Forgetful)
    steps = {"save_strategy": "steps", "save_steps": 1}
    message = fail(flags(tiny_checkpoint("qwen3_vl"), tmp_path, registry, **CHECK, **steps))
    assert "checkpoint-1 was saved, but is not complete" in message
    assert (tmp_path / "checkpoint-1" / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"verify_export": "maybe"}, "--verify_export maybe is not one of true, false, auto."),
        ({"max_shard_size": "5 boxes"}, "--max_shard_size 5 boxes is not a size"),
        ({"max_shard_size": "0GB"}, "--max_shard_size 0GB is not a size"),
    ],
)
def test_flags_are_checked(
    tmp_path: Path, registry: Path, fail: Callable[[list[str]], str], settings: dict[str, Any], message: str
) -> None:
    assert message in fail(flags(tmp_path, tmp_path / "out", registry, **settings))


def test_an_adapter_folder_is_opened_with_its_base(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model: Any = AutoModelForImageTextToText.from_pretrained(whole)
    config = LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj", init_lora_weights=False)
    adapted = get_peft_model(model, config).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    for name in ("chat_template.jinja", "processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(whole / name, tmp_path / "adapter")
    require_whole(str(tmp_path / "adapter"), None)
    ids = torch.arange(5, 25)[None]
    with torch.no_grad():
        logits = adapted(input_ids=ids).logits[0]
    rows = torch.tensor([3, 19])
    save_file({"0.input_ids": ids, "0.rows": rows, "0.logits": logits[rows]}, tmp_path / "cases.safetensors")
    known = {"tensors": {}, "scales": {}}
    (tmp_path / "weights.json").write_text(json.dumps(known))
    arguments = [str(tmp_path / name) for name in ("adapter", "cases.safetensors", "weights.json")]
    assert export_check.main([*arguments, "--dtype", "float32"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["problems"] == []
    assert said["differences"][0]["error"] < 1e-5 and said["differences"][0]["noise"] == 0
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    half = {name: tensor for name, tensor in tensors.items() if "layers.0" not in name or "lora_A" in name}
    save_file(half, tmp_path / "adapter" / "adapter_model.safetensors")
    with pytest.raises(UserError, match="the adapter holds one half alone of .*layers.0"):
        require_whole(str(tmp_path / "adapter"), None)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ZeRO-3", "FSDP2"])
def test_two_ranks_that_share_the_weights_out_verify_the_folder(
    engine: str, tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path
) -> None:
    """Every rank takes part in the trainer's logits and checksums; the fresh process has the whole model."""
    sharded: dict[str, Any] = {"fsdp": True, "fsdp_config": REPOSITORY / "configs" / "fsdp2.json"}
    if engine == "ZeRO-3":
        config = _json(REPOSITORY / "configs" / "zero3.json")
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        (tmp_path / "zero3.json").write_text(json.dumps(config))
        sharded = {"deepspeed": tmp_path / "zero3.json"}
    asked = {**CHECK, **sharded, "verify_export": True, "use_cpu": True}
    kinds: dict[str, dict[str, Any]] = {"whole": {}, "adapters": {**LORA, "bf16": True, "tune_mm_mlp": True}}
    model = tiny_checkpoint("qwen3_vl")
    commands = {name: flags(model, tmp_path / name, registry, **asked | kind) for name, kind in kinds.items()}
    run_on_two_ranks(tmp_path, commands, engine)
    assert (tmp_path / "runner.log").read_text().count("Verified: a fresh process opened") == 2


def test_the_run_says_what_it_verified(
    tiny_checkpoint: Callable[[str], Path], registry: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = flags(tiny_checkpoint("qwen2_5_vl"), tmp_path, registry, max_steps=1, verify_export="auto")
    assert main(command) == 0
    said = re.search(
        r"its logits differ by (\S+) standard deviations .+ \(0\.001 is allowed\)", capsys.readouterr().err
    )
    assert said is not None and float(said[1]) < 1e-5
