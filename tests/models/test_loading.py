"""Loading: the config decides, every weight is accounted for, and each mistake has its message."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from qwenvl.models.loading import (
    ATTENTION_PACKAGES,
    _has_kernels,
    _refusal,
    choose_attention,
    flash_obstacles,
    load_model,
    load_shapes,
)
from qwenvl.models.precision import resolve_dtype
from qwenvl.utils.errors import UserError


def load(path: Path | str):
    return load_model(str(path), dtype=torch.float32, attn_implementation="sdpa")


@pytest.fixture
def copy_checkpoint(tmp_path: Path, tiny_checkpoint: Callable[[str], Path]) -> Callable[..., Path]:
    """Function of family, folder name and an edit of the weights that makes a checkpoint of its own."""

    def copy(family: str, name: str = "checkpoint", edit: Callable[[dict], None] | None = None) -> Path:
        folder = tmp_path / name
        shutil.copytree(tiny_checkpoint(family), folder)
        if edit is not None:
            weights = load_file(folder / "model.safetensors")
            edit(weights)
            save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder

    return copy


def test_loads_what_the_config_says_with_every_weight(family_name, tiny_checkpoint):
    path = tiny_checkpoint(family_name)
    model = load(path)
    assert model.config.model_type == family_name
    state = model.state_dict()
    for name, tensor in load_file(path / "model.safetensors").items():
        if name in state:  # experts are stored one by one in some families
            assert torch.equal(state[name], tensor), name


def test_a_rank_that_reads_nothing_has_the_same_model_without_memory(family_name, tiny_checkpoint):
    """``tests/e2e/test_engines.py`` trains with it."""
    path = str(tiny_checkpoint(family_name))
    config = AutoConfig.from_pretrained(path)
    options = {"config": config, "dtype": torch.bfloat16, "attn_implementation": "sdpa"}
    read, empty = load_model(path, **options), load_shapes(path, **options)
    for kind in ("named_parameters", "named_buffers"):
        found, wanted = (dict(getattr(model, kind)()) for model in (empty, read))
        assert {name: (one.shape, one.dtype, one.device) for name, one in found.items()} == {
            name: (one.shape, one.dtype, one.device) for name, one in wanted.items()
        }
    assert all(torch.equal(value, dict(empty.named_buffers())[name]) for name, value in read.named_buffers())
    config.get_text_config().vocab_size = 2**22
    before = psutil.Process().memory_info().rss
    model = load_shapes(path, **options)
    assert psutil.Process().memory_info().rss - before < sum(one.nbytes for one in model.parameters()) / 4


def test_the_folder_name_decides_nothing(copy_checkpoint):
    model = load(copy_checkpoint("qwen3_vl", "qwen3-vl-4b-math"))
    assert type(model).__name__ == "Qwen3VLForConditionalGeneration"
    assert type(load(copy_checkpoint("qwen3_vl_moe", "qwen2-vl"))).__name__ == "Qwen3VLMoeForConditionalGeneration"


def test_a_folder_of_adapters_is_refused_with_the_way_out(copy_checkpoint):
    folder = copy_checkpoint("qwen3_vl")
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"the folder holds adapters\. Merge them first: python tools/merge_lora\.py"):
        load(folder)


def test_loading_keeps_the_config(family_name, tiny_checkpoint, tmp_path):
    path = tiny_checkpoint(family_name)
    model = load(path)
    assert model.config.get_text_config().use_cache == AutoConfig.from_pretrained(path).get_text_config().use_cache
    model.config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == json.loads((path / "config.json").read_text())


def test_a_missing_weight_is_named(copy_checkpoint):
    name = "model.visual.merger.norm.weight"
    with pytest.raises(UserError, match=f"1 missing in the files: {name}"):
        load(copy_checkpoint("qwen3_vl", edit=lambda weights: weights.pop(name)))


def test_a_renamed_weight_is_missing_and_unexpected(copy_checkpoint):
    old, new = "model.language_model.norm.weight", "model.language_model.final_norm.weight"

    def rename(weights):
        weights[new] = weights.pop(old)

    with pytest.raises(UserError) as error:
        load(copy_checkpoint("qwen3_vl", edit=rename))
    assert f"1 missing in the files: {old}" in str(error.value)
    assert f"1 unexpected in the files: {new}" in str(error.value)


def test_a_weight_of_another_shape_is_named_with_both(copy_checkpoint):
    name = "model.language_model.norm.weight"

    def cut(weights):
        weights[name] = weights[name][:-1].clone()

    with pytest.raises(
        UserError, match=r"1 of another shape: model.language_model.norm.weight \(file \(63,\), model \(64,\)\)"
    ):
        load(copy_checkpoint("qwen3_5", edit=cut))


def test_many_missing_weights_are_counted_not_all_listed(copy_checkpoint):
    def empty(weights):
        for name in [name for name in weights if name.startswith("model.language_model.layers.")]:
            del weights[name]

    with pytest.raises(UserError, match=r"and [0-9]+ more"):
        load(copy_checkpoint("qwen3_vl", edit=empty))


def test_dense_weights_are_not_a_mixture(copy_checkpoint, tiny_checkpoint):
    folder = copy_checkpoint("qwen3_vl")
    shutil.copy(tiny_checkpoint("qwen3_vl_moe") / "config.json", folder)
    with pytest.raises(UserError, match=r"missing in the files: .*experts") as error:
        load(folder)
    assert "unexpected in the files" in str(error.value)


def test_mixture_weights_are_not_dense(copy_checkpoint, tiny_checkpoint):
    folder = copy_checkpoint("qwen3_vl_moe")
    shutil.copy(tiny_checkpoint("qwen3_vl") / "config.json", folder)
    with pytest.raises(UserError, match=r"unexpected in the files: .*experts"):
        load(folder)


def test_a_missing_untied_output_projection_is_missing(copy_checkpoint):
    with pytest.raises(UserError, match=r"missing in the files: lm_head.weight"):
        load(copy_checkpoint("qwen2_5_vl", edit=lambda weights: weights.pop("lm_head.weight")))


def test_a_tied_output_projection_is_not_missing(tiny_checkpoint):
    path = tiny_checkpoint("qwen3_vl")
    assert "lm_head.weight" not in load_file(path / "model.safetensors")
    model = load(path)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


class TestMistakes:
    def test_no_such_folder(self, tmp_path):
        with pytest.raises(UserError, match="no such folder"):
            load(tmp_path / "nowhere")

    def test_no_config(self, tmp_path):
        with pytest.raises(UserError, match=r"no config\.json"):
            load(tmp_path)

    def test_broken_config(self, tmp_path):
        (tmp_path / "config.json").write_text("{broken")
        with pytest.raises(UserError, match=r"config\.json"):
            load(tmp_path)

    def test_config_without_model_type(self, tmp_path):
        (tmp_path / "config.json").write_text("{}")
        with pytest.raises(UserError, match="no model_type"):
            load(tmp_path)

    def test_unknown_model_type(self, tmp_path):
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        with pytest.raises(UserError, match=r"'llama'.*qwen3_vl"):
            load(tmp_path)

    def test_an_unknown_hub_name_without_network(self):
        with pytest.raises(UserError, match="no such folder, and no checkpoint of that name"):
            load("no-such-owner/no-such-model")

    def test_no_weights(self, copy_checkpoint):
        folder = copy_checkpoint("qwen3_vl")
        (folder / "model.safetensors").unlink()
        with pytest.raises(UserError, match="weights could not be loaded"):
            load(folder)

    def test_pickled_weights(self, copy_checkpoint):
        folder = copy_checkpoint("qwen3_vl")
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        with pytest.raises(UserError, match=r"pickle files \(pytorch_model\.bin\)"):
            load(folder)

    def test_a_damaged_safetensors_file(self, copy_checkpoint):
        folder = copy_checkpoint("qwen3_vl")
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
        with pytest.raises(UserError, match="could not be loaded"):
            load(folder)


class TestAttention:
    def test_auto_is_sdpa_without_a_gpu_and_says_why(self):
        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
        assert choose_attention("auto") == "sdpa"
        assert flash_obstacles() == dict.fromkeys(ATTENTION_PACKAGES, "there is no CUDA device")

    @pytest.mark.parametrize("name", ["sdpa", "eager"])
    def test_explicit_choices_are_kept(self, name):
        assert choose_attention(name) == name

    @pytest.mark.parametrize("name", ["flash_attention_2", "flash_attention_3", "flash_attention_4"])
    def test_unavailable_flash_attention_says_what_to_install(self, name):
        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
        with pytest.raises(UserError, match=f"{name}.*pip install flash-attn"):
            choose_attention(name)

    def test_auto_is_sdpa_in_float32(self):
        assert choose_attention("auto", half_precision=False) == "sdpa"

    def test_kernels_are_there_for_some_generations_of_gpus(self):
        capabilities = (7, 8, 9, 10)
        assert [_has_kernels("flash_attention_2", major) for major in capabilities] == [False, True, True, True]
        assert [_has_kernels("flash_attention_3", major) for major in capabilities] == [False, False, True, False]
        assert [_has_kernels("flash_attention_4", major) for major in capabilities] == [False, False, True, True]

    def test_transformers_has_the_last_word(self):
        """An importable package is not enough: flash-attn 4 alone can be imported as version 2 is."""
        if torch.cuda.is_available():
            pytest.skip("this machine has a GPU")
        for name in ATTENTION_PACKAGES:
            assert f"for {name.replace('_', ' ')}" in _refusal(name)

    def test_unknown_name(self):
        with pytest.raises(UserError, match="'flash' is not one of auto, sdpa"):
            choose_attention("flash")


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("auto", {"bf16": True, "masters": True}, torch.bfloat16),
        ("auto", {"bf16": True}, torch.float32),
        ("auto", {"masters": True}, torch.float32),
        ("auto", {"fp16": True, "masters": True}, torch.float32),
        ("auto", {}, torch.float32),
        ("bfloat16", {}, torch.bfloat16),
        ("float32", {"bf16": True, "masters": True}, torch.float32),
    ],
)
def test_dtype(name, options, expected):
    assert resolve_dtype(name, **({"bf16": False, "fp16": False, "masters": False} | options)) == expected


def test_dtype_mistakes():
    with pytest.raises(UserError, match="'half' is not one of auto"):
        resolve_dtype("half", bf16=False, fp16=False, masters=False)
    with pytest.raises(UserError, match="does not go with --fp16"):
        resolve_dtype("bfloat16", bf16=False, fp16=True, masters=False)
