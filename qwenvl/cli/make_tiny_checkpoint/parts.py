"""Random-weight parts for the connector lab: vision encoders and language models, saved like published ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SiglipImageProcessor,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from qwenvl.cli.make_tiny_checkpoint.processor import CLIP_STATISTICS, HALF_STATISTICS
from qwenvl.cli.make_tiny_checkpoint.shapes import VOCABULARY_MULTIPLE, Size
from qwenvl.cli.make_tiny_checkpoint.tokenizer import build_tokenizer
from qwenvl.utils.permissions import follow_umask

Part = Literal["clip", "siglip", "llama", "qwen2", "qwen3"]

IMAGE_SIZE = 64
PATCH_SIZE = 8


def build_part(part: Part, output: Path, *, size: Size = "tiny", seed: int = 0) -> None:
    """Write a folder of a vision encoder (``clip``, ``siglip``) or a language model.

    Args:
        part: Kind of encoder or language model.
        output: Folder to write.
        size: ``tiny`` for tests, ``demo`` for a model that can learn.
        seed: Seed of the random weights; the caller's random state does not change.
    """
    build = _BUILDERS[part]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, processor = build(size)
    output.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(output)
    processor.save_pretrained(output)
    follow_umask(output)


def read_text_template() -> str:
    """Return the Jinja source of a language model's chat template, which takes only text."""
    return (Path(__file__).parent / "text.jinja").read_text(encoding="utf-8")


def _vision_sizes(size: Size) -> dict[str, Any]:
    tiny = size == "tiny"
    return {
        "hidden_size": 32 if tiny else 128,
        "intermediate_size": 64 if tiny else 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 2 if tiny else 4,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
    }


def _clip(size: Size) -> tuple[PreTrainedModel, Any]:
    model = CLIPVisionModel(CLIPVisionConfig(**_vision_sizes(size)))
    return model, CLIPImageProcessor(size={"shortest_edge": IMAGE_SIZE}, crop_size=IMAGE_SIZE, **CLIP_STATISTICS)


def _siglip(size: Size) -> tuple[PreTrainedModel, Any]:
    model = SiglipVisionModel(SiglipVisionConfig(**_vision_sizes(size)))
    return model, SiglipImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}, **HALF_STATISTICS)


def _language_model(config_class: Any, model_class: Any) -> Callable[[Size], tuple[PreTrainedModel, Any]]:
    def build(size: Size) -> tuple[PreTrainedModel, Any]:
        tokenizer = build_tokenizer("qwen3_vl")
        tokenizer.chat_template = read_text_template()
        end_of_text, end_of_turn = tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>"])
        tiny = size == "tiny"
        config = config_class(
            vocab_size=-(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE,
            hidden_size=64 if tiny else 128,
            intermediate_size=96 if tiny else 384,
            num_hidden_layers=2 if tiny else 3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16 if tiny else 32,
            max_position_embeddings=4096,
            initializer_range=0.1 if tiny else 0.05,
            bos_token_id=end_of_text,
            eos_token_id=end_of_turn,
            tie_word_embeddings=config_class is not LlamaConfig,
        )
        model = model_class(config)
        model.generation_config = GenerationConfig(
            bos_token_id=end_of_text, pad_token_id=end_of_text, eos_token_id=[end_of_turn, end_of_text], do_sample=False
        )
        return model, tokenizer

    return build


_BUILDERS: dict[Part, Callable[[Size], tuple[PreTrainedModel, Any]]] = {
    "clip": _clip,
    "siglip": _siglip,
    "llama": _language_model(LlamaConfig, LlamaForCausalLM),
    "qwen2": _language_model(Qwen2Config, Qwen2ForCausalLM),
    "qwen3": _language_model(Qwen3Config, Qwen3ForCausalLM),
}
PARTS: tuple[Part, ...] = tuple(_BUILDERS)
