"""Tiny checkpoints: stock classes open them, generation works, and they have the traits the other tests rely on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.video_utils import VideoMetadata

from qwenvl.cli.make_tiny_checkpoint.command import build_tiny_checkpoint
from qwenvl.cli.make_tiny_checkpoint.shapes import TIED_FAMILIES
from qwenvl.cli.make_tiny_checkpoint.tokenizer import ADDED_TOKENS, SPECIAL_TOKENS, build_tokenizer
from qwenvl.families import FAMILIES, get_family
from qwenvl.utils.errors import UserError

Checkpoint = Callable[..., Path]
ALL_FAMILIES = list(FAMILIES)


def user(*parts: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a conversation of one user turn."""
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "Describe it."}]}]


def model_inputs(processor: Any, kind: str) -> dict[str, torch.Tensor]:
    """Return the inputs of a text, an image or a video question, made by the processor alone."""
    pixels = np.random.default_rng(0).integers(0, 255, (4, 64, 96, 3), dtype=np.uint8)
    parts = {
        "text": [],
        "image": [{"type": "image", "image": Image.fromarray(pixels[0])}],
        "video": [{"type": "video", "video": pixels}],
    }[kind]
    metadata = VideoMetadata(total_num_frames=4, fps=2.0, frames_indices=[0, 1, 2, 3])
    options = {"do_sample_frames": False, "video_metadata": [metadata]} if kind == "video" else {}
    return processor.apply_chat_template(
        user(*parts),
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=options,
    )


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_stock_classes_open_the_folder_and_generate(tiny_checkpoint: Checkpoint, family: str) -> None:
    folder = tiny_checkpoint(family)
    model, loading = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    processor = AutoProcessor.from_pretrained(folder)
    assert not any(loading.values()), loading
    assert model.config.model_type == family
    assert sum(parameter.numel() for parameter in model.parameters()) < 500_000
    for kind in ("text", "image", "video"):
        inputs = model_inputs(processor, kind)
        generated = model.generate(**inputs, max_new_tokens=2, min_new_tokens=2)
        assert generated.shape[1] == inputs["input_ids"].shape[1] + 2
        placeholder = {"image": model.config.image_token_id, "video": model.config.video_token_id}
        for name, token in placeholder.items():
            assert (token in inputs["input_ids"]) == (name == kind)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_embeddings_are_tied_as_in_the_small_models_and_untied_as_in_the_large(
    tiny_checkpoint: Checkpoint, family: str
) -> None:
    model = AutoModelForImageTextToText.from_pretrained(tiny_checkpoint(family))
    shared = model.lm_head.weight is model.get_input_embeddings().weight
    assert shared == (family in TIED_FAMILIES) == model.config.tie_word_embeddings


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_configuration_follows_the_tokenizer_and_the_family(tiny_checkpoint: Checkpoint, family: str) -> None:
    folder = tiny_checkpoint(family)
    config = json.loads((folder / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert config["image_token_id"] == tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert config["video_token_id"] == tokenizer.convert_tokens_to_ids("<|video_pad|>")
    assert config["vision_start_token_id"] == tokenizer.convert_tokens_to_ids("<|vision_start|>")
    assert text.get("pad_token_id") is None  # a padding id would zero a row, and break building under ZeRO-3
    assert text["vocab_size"] > len(tokenizer)
    rope = text["rope_parameters"]
    head_dim = text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"]
    assert 2 * sum(rope["mrope_section"]) == head_dim * rope.get("partial_rotary_factor", 1.0)
    assert ("layer_types" in text and "linear_attention" in text["layer_types"]) == get_family(family).linear_attention
    assert bool(vision.get("deepstack_visual_indexes")) == family.startswith("qwen3_vl")
    if family == "qwen2_5_vl":
        assert set(vision["fullatt_block_indexes"]) < set(range(vision["depth"]))  # some layers see windows only
    if get_family(family).moe:
        assert text["num_experts_per_tok"] == 2 and 2 * text["moe_intermediate_size"] != text["hidden_size"]


def test_same_seed_same_bytes_and_the_random_state_is_kept(tmp_path: Path) -> None:
    torch.manual_seed(7)
    state = torch.random.get_rng_state()
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        build_tiny_checkpoint("qwen3_5_moe", tmp_path / name, seed=seed)
    assert torch.equal(state, torch.random.get_rng_state())

    def read(name: str, file: str) -> bytes:
        return (tmp_path / name / file).read_bytes()

    assert {path.name for path in (tmp_path / "a").iterdir()} == {path.name for path in (tmp_path / "b").iterdir()}
    assert all(read("a", path.name) == read("b", path.name) for path in (tmp_path / "a").iterdir())
    assert read("a", "model.safetensors") != read("c", "model.safetensors")
    assert read("a", "tokenizer.json") == read("c", "tokenizer.json")


def test_demo_size_has_two_to_five_million_parameters(tmp_path: Path) -> None:
    build_tiny_checkpoint("qwen3_vl", tmp_path, size="demo")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert 2_000_000 < sum(parameter.numel() for parameter in model.parameters()) < 5_000_000


def test_unknown_family_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="qwen9_vl"):
        build_tiny_checkpoint("qwen9_vl", tmp_path)


# Tokenizer


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_5"])
def test_tokenizer_reloads_with_the_same_class_and_ids(tiny_checkpoint: Checkpoint, family: str) -> None:
    built, loaded = build_tokenizer(family), AutoTokenizer.from_pretrained(tiny_checkpoint(family))
    assert type(loaded) is type(built)
    assert loaded.get_vocab() == built.get_vocab()
    assert set(loaded.all_special_tokens) == set(SPECIAL_TOKENS)
    assert (loaded.eos_token, loaded.pad_token, loaded.bos_token) == ("<|im_end|>", "<|endoftext|>", None)
    ids = loaded.convert_tokens_to_ids([*SPECIAL_TOKENS, *ADDED_TOKENS])
    assert ids == list(range(len(loaded) - len(ids), len(loaded)))
    assert [loaded(token).input_ids for token in (*SPECIAL_TOKENS, *ADDED_TOKENS)] == [[token] for token in ids]
    text = "<|im_start|><think>\nhi</think><|im_end|>"
    assert loaded.decode(loaded(text).input_ids, skip_special_tokens=True) == "<think>\nhi</think>"


@pytest.mark.parametrize("text", ["user\nassistant\n", "12 345", "a\n\n  b", "don't", "x = [1, 2]\r\n\r\ny"])
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_5"])
def test_text_is_split_as_qwen_splits_it(family: str, text: str) -> None:
    pieces = [piece for piece, _ in build_tokenizer(family).backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    expected = {
        "user\nassistant\n": ["user", "Ċ", "assistant", "Ċ"],
        "12 345": ["1", "2", "Ġ", "3", "4", "5"],
        "a\n\n  b": ["a", "ĊĊ", "Ġ", "Ġb"],
        "don't": ["don", "'t"],
        "x = [1, 2]\r\n\r\ny": ["x", "Ġ=", "Ġ[", "1", ",", "Ġ", "2", "]čĊčĊ", "y"],
    }
    assert pieces == expected[text]


def test_neighbouring_newlines_are_one_token() -> None:
    tokenizer = build_tokenizer("qwen3_vl")  # so that an answer starting with newlines can merge with the header's
    assert [len(tokenizer("\n" * count).input_ids) for count in (1, 2, 3)] == [1, 1, 1]


TOKENIZER = build_tokenizer("qwen3_vl")


@given(st.text(max_size=60))
@settings(max_examples=200)
def test_any_text_survives_the_round_trip(text: str) -> None:
    normal = TOKENIZER.backend_tokenizer.normalizer.normalize_str  # NFC, as Qwen's; between special tokens
    decoded = TOKENIZER.decode(TOKENIZER(text, add_special_tokens=False).input_ids)
    assert normal(decoded) == normal(text)


# Chat templates

IMAGE, VIDEO = {"type": "image", "image": "a.png"}, {"type": "video", "video": "b.mp4"}
WEATHER = {"name": "get_weather", "arguments": {"city": "Paris"}}


def text_part(text: str) -> dict[str, str]:
    """Return a typed text part."""
    return {"type": "text", "text": text}


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "text": [{"role": "user", "content": "Hi  \n"}, {"role": "assistant", "content": "\nYes \n"}],
    "system": [{"role": "system", "content": "Be  short."}, {"role": "user", "content": "Hi"}],
    "system parts": [{"role": "system", "content": [text_part("Be "), text_part("short.")]}, *user()],
    "media": [
        *user(IMAGE, VIDEO, text_part("and"), IMAGE),
        {"role": "assistant", "content": [text_part("Two"), text_part(" pictures")]},
        *user(VIDEO),
    ],
    "assistant first": [{"role": "assistant", "content": "Hello"}, {"role": "user", "content": "Hi"}],
    "calls": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "Wait.", "tool_calls": [{"function": WEATHER}, WEATHER]},
        {"role": "tool", "content": "sunny"},
        {"role": "tool", "content": [IMAGE, text_part("warm")]},
        {"role": "assistant", "content": "Sun."},
    ],
    "bare call": [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "", "tool_calls": [{**WEATHER, "arguments": '{"city": "Paris"}'}]},
    ],
}


@pytest.mark.parametrize("generate", [False, True])
@pytest.mark.parametrize("vision_id", [False, True])
@pytest.mark.parametrize("name", list(CONVERSATIONS))
@pytest.mark.parametrize(("family", "original"), [("qwen3_vl", "qwen3vl"), ("qwen2_5_vl", "qwen2_5vl")])
def test_templates_behave_as_the_published_ones(
    tiny_checkpoint: Checkpoint,
    shared_folder: Path,
    family: str,
    original: str,
    name: str,
    vision_id: bool,
    generate: bool,
) -> None:
    published = json.loads((shared_folder / "processors" / original / "chat_template.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint(family))
    options: dict[str, Any] = {"tokenize": False, "add_generation_prompt": generate, "add_vision_id": vision_id}
    ours = tokenizer.apply_chat_template(CONVERSATIONS[name], **options)
    assert ours == tokenizer.apply_chat_template(
        CONVERSATIONS[name], chat_template=published["chat_template"], **options
    )


def render(folder: Path, messages: list[dict[str, Any]], **options: Any) -> str:
    """Return the rendered conversation."""
    return AutoTokenizer.from_pretrained(folder).apply_chat_template(messages, tokenize=False, **options)


@pytest.mark.parametrize("system", [True, False])
@pytest.mark.parametrize("template", ["instruct", "thinking"])
def test_tools_are_listed_in_one_system_turn(tiny_checkpoint: Checkpoint, template: str, system: bool) -> None:
    tool = {"type": "function", "function": {"name": "get_weather", "parameters": {}}}
    messages = [{"role": "system", "content": "Be short."}] * system + [{"role": "user", "content": "Hi"}]
    rendered = render(tiny_checkpoint("qwen3_vl", template), messages, tools=[tool])
    turn, rest = rendered.split("<|im_end|>\n", 1)
    assert turn.startswith("<|im_start|>system\n") and turn.count("Be short.") == system
    assert '"name": "get_weather"' in turn.split("<tools>\n")[1].split("\n</tools>")[0]
    assert rest == "<|im_start|>user\nHi<|im_end|>\n"


def test_qwen2_vl_template_adds_the_default_system_turn(tiny_checkpoint: Checkpoint) -> None:
    rendered = render(tiny_checkpoint("qwen2_vl"), user(IMAGE), add_vision_id=True, add_generation_prompt=True)
    assert rendered == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nPicture 1: <|vision_start|><|image_pad|><|vision_end|>Describe it.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_thinking_template_trims_and_keeps_only_the_last_reasoning(tiny_checkpoint: Checkpoint) -> None:
    messages = [
        {"role": "user", "content": [IMAGE, text_part(" One? ")]},
        {"role": "assistant", "content": "<think>\nfirst\n</think>\n\n1 \n"},
        {"role": "user", "content": "Two?\n"},
        {"role": "assistant", "content": "", "reasoning_content": " second ", "tool_calls": [{"function": WEATHER}]},
        {"role": "tool", "content": "sun"},
        {"role": "assistant", "content": "2"},
    ]
    assert render(tiny_checkpoint("qwen3_5"), messages) == (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|> One?<|im_end|>\n"
        "<|im_start|>assistant\n1<|im_end|>\n"
        "<|im_start|>user\nTwo?<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nsecond\n</think>\n\n"
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>"
        "<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\nsun\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n2<|im_end|>\n"
    )


def test_thinking_template_opens_or_closes_the_reasoning(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint("qwen3_5")
    assert render(folder, user(), add_generation_prompt=True).endswith("<|im_start|>assistant\n<think>\n")
    closed = render(folder, user(), add_generation_prompt=True, enable_thinking=False)
    assert closed.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    with pytest.raises(Exception, match="No turn of the user"):
        render(folder, [{"role": "assistant", "content": "Hello"}])
