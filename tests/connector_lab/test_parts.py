"""Putting parts together: their weights, templates and vocabularies, and what the parts' operations are counted as."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoTokenizer

from qwenvl.cli.connector_lab.build import ConnectorSettings, build_lab
from qwenvl.connector_lab.config import CONNECTORS, Connector
from qwenvl.connector_lab.family import FAMILY
from qwenvl.data.encoding.processor import open_processor
from qwenvl.data.media.resize import ImagePlan
from qwenvl.data.sample_stats import MEASURES, measure_row
from qwenvl.data.types import ImageItem
from qwenvl.profiling.flops import Trained, training_flops
from qwenvl.utils.errors import UserError
from tests.e2e.runs import weights

NOTHING = Trained(vision=False, merger=False, language=False)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_texts_are_rendered_by_the_language_models_own_template(
    name: str, lab: Callable[..., Path], part: Callable[[str], Path]
) -> None:
    processor: Any = open_processor(str(lab("clip", name)))
    alone = AutoTokenizer.from_pretrained(part(name))
    turns = [("system", "Be short."), ("user", "What is {{ this }}?"), ("assistant", "a 'square'\n")]
    plain = [{"role": role, "content": text} for role, text in turns]
    parts = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    expected = alone.apply_chat_template(plain, tokenize=False)
    assert processor.apply_chat_template(plain, tokenize=False) == expected
    assert processor.apply_chat_template(parts, tokenize=False) == expected
    parts[1]["content"] = [{"type": "image"}, *parts[1]["content"]]  # type: ignore[misc]
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    assert processor.apply_chat_template(parts, tokenize=False) == expected.replace("What", f"{picture}What")


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_the_language_model_is_the_one_that_came_in(
    name: str, lab: Callable[..., Path], part: Callable[[str], Path]
) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    whole = AutoModelForImageTextToText.from_pretrained(lab("clip", name)).eval()
    alone = AutoModelForCausalLM.from_pretrained(part(name)).eval()
    with torch.no_grad():
        torch.testing.assert_close(whole(input_ids=ids).logits, alone(input_ids=ids).logits)
    assert (whole.lm_head.weight is whole.get_input_embeddings().weight) == alone.config.tie_word_embeddings


def test_tokens_of_pictures_are_taught_where_they_are_missing(part: Callable[[str], Path], tmp_path: Path) -> None:
    """The vocabulary grows, and what was there stays."""
    tokenizer = AutoTokenizer.from_pretrained(part("qwen3"))
    model = AutoModelForCausalLM.from_pretrained(part("qwen3"))
    engine = tokenizer.backend_tokenizer.to_str().replace("<|image_pad|>", "<|unknown_a|>")
    (tmp_path / "text").mkdir()
    model.save_pretrained(tmp_path / "text")
    tokenizer.save_pretrained(tmp_path / "text")
    for file in (tmp_path / "text").glob("tokenizer*.json"):
        file.write_text(file.read_text().replace("<|image_pad|>", "<|unknown_a|>"))
    assert "<|unknown_a|>" in engine
    build_lab(str(part("clip")), str(tmp_path / "text"), ConnectorSettings("mlp"), tmp_path / "lab")
    processor: Any = open_processor(str(tmp_path / "lab"))
    config = AutoModelForImageTextToText.from_pretrained(tmp_path / "lab").config
    assert processor.tokenizer.convert_tokens_to_ids("<|image_pad|>") == config.image_token_id == len(tokenizer)
    grown = weights(tmp_path / "lab")["model.language_model.embed_tokens.weight"]
    before = weights(tmp_path / "text")["model.embed_tokens.weight"]
    assert torch.equal(grown[: len(tokenizer)], before[: len(tokenizer)])


def test_parts_that_do_not_fit_are_named(part: Callable[[str], Path], tmp_path: Path) -> None:
    settings = ConnectorSettings("mlp")
    with pytest.raises(UserError, match="'qwen3' is not supported by the lab: clip_vision_model"):
        build_lab(str(part("qwen3")), str(part("qwen3")), settings, tmp_path)
    for file in part("llama").iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(UserError, match="it has no chat template"):
        build_lab(str(part("clip")), str(tmp_path), settings, tmp_path / "lab")


@pytest.mark.parametrize("connector", CONNECTORS)
def test_operations_grow_with_a_picture_as_they_are_counted(connector: Connector, lab: Callable[..., Path]) -> None:
    """Differences of two sizes: what is the same for every picture is not counted."""
    visual = AutoModelForImageTextToText.from_pretrained(lab("siglip", connector=connector)).model.visual
    config = AutoModelForImageTextToText.from_pretrained(lab("siglip", connector=connector)).config
    flops = training_flops(config, FAMILY, NOTHING)
    found, said = [], []
    for grid in ((1, 4, 8), (1, 8, 8)):
        patches = torch.zeros(grid[1] * grid[2], 3 * 8 * 8)
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            visual.train()(patches, grid_thw=torch.tensor([grid]))
        found.append(counter.get_total_flops())
        plan = ImagePlan(ImageItem(""), (0, 0), grid, (0, 0))
        measures = np.array(measure_row(10, 1, [plan]), MEASURES)
        said.append(int(flops.split(measures)[0]))
    assert found[1] - found[0] == said[1] - said[0]
