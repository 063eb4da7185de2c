"""Contexts: what YaRN's settings become in a config, and which checkpoints fit them."""

from __future__ import annotations

import json

import pytest
from transformers import AutoConfig

from qwenvl.models.lora.files import TRAINED_CONFIG
from qwenvl.models.rope_scaling import context_length, describe_context, extend_context, require_same_context
from qwenvl.utils.errors import UserError


@pytest.fixture
def config(tiny_checkpoint):
    """The config of a tiny checkpoint with a native context of 1,000 positions."""
    found = AutoConfig.from_pretrained(tiny_checkpoint("qwen3_vl"))
    found.text_config.max_position_embeddings = 1000
    return found


def test_settings_of_yarn_are_added_to_those_of_the_checkpoint(config):
    before = dict(config.text_config.rope_parameters)
    assert context_length(config) == 1000 and describe_context(config) == "1,000 positions"
    extend_context(config, 1.5)
    text = config.text_config
    wanted = {"rope_type": "yarn", "factor": 1.5, "original_max_position_embeddings": 1000}
    assert dict(text.rope_parameters) == before | wanted
    assert context_length(config) == text.max_position_embeddings == 1500
    assert describe_context(config) == "1,500 positions, 1.5 x the native 1,000, by YaRN"


def test_the_factor_counts_from_the_native_length_whatever_was_before(config):
    extend_context(config, 2)
    extend_context(config, 4)
    assert config.text_config.rope_parameters["original_max_position_embeddings"] == 1000
    assert context_length(config) == 4000
    extend_context(config, 2, native_length=300)
    assert config.text_config.rope_parameters["original_max_position_embeddings"] == 300
    assert context_length(config) == 600


def test_another_way_to_extend_is_refused_and_the_older_name_goes(config):
    config.text_config.rope_parameters = {"rope_type": "default", "type": "mrope", "rope_theta": 1e4}
    extend_context(config, 2)
    assert "type" not in config.text_config.rope_parameters
    config.text_config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(UserError, match="has rope_type 'dynamic'"):
        extend_context(config, 2)


@pytest.mark.parametrize("adapters", [False, True])
def test_a_checkpoint_of_another_context_is_refused(adapters, config, tmp_path):
    other = "config.json" if adapters else TRAINED_CONFIG
    config.to_json_file(tmp_path / (TRAINED_CONFIG if adapters else "config.json"))
    require_same_context(config, str(tmp_path))
    extend_context(config, 2)
    with pytest.raises(UserError, match=r"with the native context, and this run has a context of 2 x 1000 positions"):
        require_same_context(config, str(tmp_path))
    config.to_json_file(tmp_path / (TRAINED_CONFIG if adapters else "config.json"))
    require_same_context(config, str(tmp_path))
    extend_context(config, 2, native_length=900)
    with pytest.raises(UserError, match=r"with a context of 2 x 1000 positions, and this run has a context of 2 x 900"):
        require_same_context(config, str(tmp_path))
    assert not (tmp_path / other).exists()


def test_a_checkpoint_of_an_older_transformers_has_the_native_context(config, tmp_path):
    """It has neither a ``text_config`` nor ``rope_parameters``."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2_vl", "rope_scaling": {"type": "mrope"}}))
    require_same_context(config, str(tmp_path))
    extend_context(config, 2)
    with pytest.raises(UserError, match="with the native context"):
        require_same_context(config, str(tmp_path))
