"""Folders of adapters: what stands in them, and what is refused."""

from __future__ import annotations

import json

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from transformers import AutoModelForImageTextToText, BitsAndBytesConfig

from qwenvl.models.lora.adapters import AdapterSettings, add_adapters
from qwenvl.models.lora.files import (
    CONFIG_FILE,
    TRAINED_CONFIG,
    WEIGHTS_FILE,
    collect,
    describe_base,
    load,
    read_base,
    read_config,
    require_same_names,
    save,
    saved_names,
)
from qwenvl.models.lora.new_tokens import train_rows
from qwenvl.models.rope_scaling import extend_context
from qwenvl.models.trainable.freezing import set_model
from qwenvl.utils.errors import UserError
from tests.patches import install

QUERY = "model.language_model.layers.0.self_attn.q_proj"


@pytest.fixture
def adapted(load_tiny):
    """Function of a rank that makes a model with adapters, whole mergers and two rows of the vocabulary that train."""

    def make(rank=4, target=r".*layers\.0\.self_attn\.q_proj", **options):
        torch.manual_seed(rank)
        model = load_tiny("qwen3_vl")
        set_model(model, tune_mm_vision=False, tune_mm_mlp=True, tune_mm_llm=False, adapted=True)
        install(model)
        add_adapters(model, AdapterSettings(target, rank, 8, 0.0, **options))
        train_rows(model, [7, 3])
        describe_base(model, model.config._name_or_path)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += torch.randn_like(parameter)
        return model

    return make


def test_names_are_those_of_peft(adapted):
    names = saved_names(adapted(use_dora=True))
    layer = f"base_model.model.{QUERY}"
    assert {name for name in names if "merger" not in name} == {
        f"{layer}.lora_A.weight",
        f"{layer}.lora_B.weight",
        f"{layer}.lora_magnitude_vector",
        "base_model.model.model.language_model.embed_tokens.token_adapter.trainable_tokens_delta",
    }
    mergers = [name for name in names if "merger" in name]
    assert mergers and all(name.startswith("base_model.model.model.visual.") for name in mergers)


def test_a_saved_folder_is_opened_by_peft_and_read_back(adapted, tiny_checkpoint, tmp_path, mixture):
    model = adapted().eval()
    save(model, tmp_path / "new" / "folder", collect(model))
    folder = tmp_path / "new" / "folder"
    sample = mixture("qwen3_vl")["image"].inputs
    with torch.no_grad():
        expected = model(**sample).logits
        stock = PeftModel.from_pretrained(
            AutoModelForImageTextToText.from_pretrained(tiny_checkpoint("qwen3_vl")), folder
        ).eval()
        torch.testing.assert_close(stock(**sample).logits, expected, rtol=1e-4, atol=1e-4)
        again = adapted(4).eval()
        for parameter in saved_names(again).values():
            parameter.zero_()
        load(again, folder)
        assert torch.equal(again(**sample).logits, expected)


def test_the_config_says_what_else_the_adapters_need(adapted, tiny_checkpoint, tmp_path):
    model = adapted()
    save(model, tmp_path, collect(model))
    config = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert config["base_model_name_or_path"] == str(tiny_checkpoint("qwen3_vl").resolve()) == read_base(tmp_path)
    deepstack = [
        f"model.visual.deepstack_merger_list.{n}" for n in range(len(model.model.visual.deepstack_merger_list))
    ]
    assert sorted(config["modules_to_save"]) == sorted(["model.visual.merger", *deepstack])
    assert config["trainable_token_indices"] == {"embed_tokens": [7, 3]}
    assert config["inference_mode"] is True and model.peft_config["default"].inference_mode is False


def test_adapters_alone_need_nothing_else(load_tiny, tmp_path):
    model = load_tiny("qwen3_vl")
    set_model(model, tune_mm_vision=False, tune_mm_mlp=False, tune_mm_llm=False, adapted=True)
    add_adapters(model, AdapterSettings("language", 4, 8, 0.0))
    describe_base(model, "Qwen/Some-Model")
    config = model.peft_config["default"]
    assert config.base_model_name_or_path == "Qwen/Some-Model"
    assert config.modules_to_save is None and config.trainable_token_indices is None


def test_the_config_of_training_is_kept_without_its_quantization(adapted, tiny_checkpoint, tmp_path):
    """Whoever opens the folder merges into whole weights."""
    model = adapted()
    extend_context(model.config, 2)
    model.config.quantization_config = BitsAndBytesConfig(load_in_4bit=True)
    save(model, tmp_path, collect(model))
    assert "quantization_config" not in json.loads((tmp_path / TRAINED_CONFIG).read_text())
    assert model.config.quantization_config.load_in_4bit, "of the model in memory it stays"
    base = str(tiny_checkpoint("qwen3_vl"))
    native = read_config(tmp_path / "elsewhere", base).text_config
    assert native.rope_parameters["rope_type"] == "default"
    assert read_config(tmp_path, base).text_config.max_position_embeddings == 2 * native.max_position_embeddings


def test_another_rank_and_other_layers_are_refused(adapted, tmp_path):
    model = adapted()
    save(model, tmp_path, collect(model))
    with pytest.raises(UserError, match=r"lora_A.weight has another shape, \[4, \d+\] there, \[2, \d+\] here"):
        load(adapted(2), tmp_path)
    with pytest.raises(UserError, match=r"2 are missing \(.*v_proj.*\) and 2 fit nothing \(.*q_proj"):
        load(adapted(target=r".*layers\.0\.self_attn\.v_proj"), tmp_path)


def test_collected_tensors_are_copies(adapted):
    model = adapted()
    for name, tensor in collect(model).items():
        parameter = saved_names(model)[name]
        assert torch.equal(tensor, parameter) and tensor.data_ptr() != parameter.data_ptr()
        assert not tensor.requires_grad


def test_names_that_differ_are_listed_up_to_a_limit(tmp_path):
    many = {f"tensor{number}" for number in range(8)}
    require_same_names(tmp_path, many, set(many))
    with pytest.raises(UserError, match=r"8 are missing \(tensor0, .*, tensor5 \.\.\.\)\. It was saved"):
        require_same_names(tmp_path, set(), many)
    with pytest.raises(UserError, match=r"tensors 6 fit nothing \(tensor0, .*, tensor5\)\. It was saved"):
        require_same_names(tmp_path, {f"tensor{number}" for number in range(6)}, set())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "holds no adapters: adapter_config.json cannot be read"),
        ("{", "holds no adapters"),
        ("[]", "holds no adapters"),
        ("{}", "does not name the checkpoint"),
        ('{"base_model_name_or_path": ""}', "does not name the checkpoint"),
        ('{"base_model_name_or_path": 3}', "does not name the checkpoint"),
    ],
)
def test_a_folder_that_does_not_say_its_base_is_refused(content, message, tmp_path):
    if content is not None:
        (tmp_path / CONFIG_FILE).write_text(content)
    with pytest.raises(UserError, match=message):
        read_base(tmp_path)


def test_files_say_that_they_are_of_torch(adapted, tmp_path):
    """transformers refuses safetensors without it."""
    model = adapted()
    save(model, tmp_path, collect(model))
    with safe_open(tmp_path / WEIGHTS_FILE, "pt") as file:
        assert file.metadata() == {"format": "pt"}
