"""Experts arrive in memory the right way round from every layout of files, and are saved as they were published."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from qwenvl.models.loading import load_model, load_weights
from qwenvl.models.moe_checkpoint import weight_files
from qwenvl.utils.errors import UserError

FAMILY = "qwen3_vl_moe"


def load(path: Path):
    return load_model(str(path), dtype=torch.float32, attn_implementation="sdpa")


def turned(tensors: dict[str, Tensor], end: str = "") -> dict[str, Tensor]:
    """Return tensors with the experts whose names end so transposed: from memory's layout to the published one."""
    return {
        name: tensor.transpose(1, 2).contiguous() if ".experts." in name and name.endswith(end) else tensor
        for name, tensor in tensors.items()
    }


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def stored(tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> Callable[..., tuple[Path, dict[str, Tensor]]]:
    """Function of the experts' width and an edit that makes a checkpoint; returns it and what must be in memory."""

    def make(name: str, width: int, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]):
        folder = tmp_path / name
        shutil.copytree(tiny_checkpoint(FAMILY), folder)
        config = json.loads((folder / "config.json").read_text())
        config["text_config"]["moe_intermediate_size"] = width
        (folder / "config.json").write_text(json.dumps(config))
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
        names = load_file(folder / "model.safetensors").keys()  # without what is tied
        expected = {name: tensor for name, tensor in model.state_dict().items() if name in names}
        save_file(edit(expected), folder / "model.safetensors", {"format": "pt"})
        return folder, expected

    return make


WIDTHS = {"not square": 24, "first one square": 32, "second one square": 64}


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("edit", [turned, dict], ids=["published", "saved by transformers"])
def test_both_layouts_load_and_are_saved_as_published(stored, tmp_path, width, edit, caplog):
    folder, expected = stored("checkpoint", WIDTHS[width], edit)
    before = get_checkpoint_conversion_mapping(FAMILY)
    model = load(folder)
    state = model.state_dict()
    assert equal({name: state[name] for name in expected}, expected)
    model.save_pretrained(tmp_path / "saved")
    reads_well = edit is dict or width == "not square"
    published = edit is turned or width == "not square"  # else stock transformers would read the wrong layout
    saved = turned(expected) if published else expected
    assert equal(load_file(tmp_path / "saved" / "model.safetensors"), saved)
    load_weights(model, str(tmp_path / "saved"))
    assert equal({name: model.state_dict()[name] for name in expected}, expected)
    after = get_checkpoint_conversion_mapping(FAMILY)
    assert [vars(rule.operations[0]) for rule in after] == [vars(rule.operations[0]) for rule in before]
    stock = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved").state_dict()
    assert equal({name: stock[name] for name in expected}, expected) == reads_well
    assert ("stock transformers cannot recognise" in caplog.text) == (not reads_well)


def test_layouts_in_several_files_are_read(stored):
    folder, expected = stored("checkpoint", 32, turned)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {name: f"model-0000{1 + name.endswith('down_proj')}-of-00002.safetensors" for name in tensors}
    for file in set(names.values()):
        save_file({name: tensors[name] for name in tensors if names[name] == file}, folder / file, {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    state = load(folder).state_dict()
    assert equal({name: state[name] for name in expected}, expected)


def test_two_layouts_in_one_checkpoint_are_refused(stored):
    folder, _ = stored("checkpoint", 24, lambda tensors: turned(tensors, "down_proj"))
    with pytest.raises(UserError, match=r"down_proj is stored as \[experts, in, out\], and .*gate_up_proj as"):
        load(folder)


@pytest.mark.parametrize("fused", [False, True], ids=["one by one", "fused"])
def test_experts_of_qwen3_5_load_fused_and_one_by_one(tiny_checkpoint, tmp_path, fused):
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint("qwen3_5_moe"), folder)
    stock = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    if fused:
        assert not AutoConfig.from_pretrained(folder).tie_word_embeddings
        save_file(dict(stock), folder / "model.safetensors", {"format": "pt"})
    model = load(folder)
    assert equal(dict(model.state_dict()), dict(stock))
    model.save_pretrained(tmp_path / "saved")
    stored = {name: t for name, t in load_file(folder / "model.safetensors").items() if not name.startswith("mtp.")}
    assert equal(load_file(tmp_path / "saved" / "model.safetensors"), stored)


@pytest.mark.parametrize("sharded", [False, True])
def test_files_of_a_repository_are_found_in_the_cache_that_is_named(sharded, tmp_path):
    """In the layout of huggingface_hub; there is no network."""
    place = tmp_path / "models--org--name"
    snapshot = place / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text("abc")
    names = ["model-00001-of-00001.safetensors"] if sharded else ["model.safetensors"]
    for name in names:
        save_file({"weight": torch.zeros(2)}, snapshot / name)
    if sharded:
        index = {"metadata": {"total_size": 8}, "weight_map": {"weight": names[0]}}
        (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weight_files("org/name", {"cache_dir": str(tmp_path)}) == [str(snapshot / name) for name in names]


def test_a_folder_without_weights_has_no_files(tmp_path):
    assert weight_files(str(tmp_path), {}) == []
