"""A small byte-level BPE tokenizer with Qwen's split rule, normaliser and special tokens, and its own merges."""

from __future__ import annotations

import json

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import Qwen2Tokenizer
from transformers.models.qwen3_5.tokenization_qwen3_5 import Qwen3_5Tokenizer

from qwenvl.cli.make_tiny_checkpoint.corpus import corpus

NUM_MERGES = 640

# The names and order of the Qwen2.5 and Qwen3 tokenizers; the ids follow the vocabulary of this package.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Single tokens that count as ordinary text: decoding with skip_special_tokens keeps them.
ADDED_TOKENS = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)


def tokenizer_class(family: str) -> type[Qwen2Tokenizer] | type[Qwen3_5Tokenizer]:
    r"""Return the class that ``AutoTokenizer`` uses for the family; the two differ in how they split marks (\p{M})."""
    return Qwen3_5Tokenizer if family.startswith("qwen3_5") else Qwen2Tokenizer


def build_tokenizer(family: str) -> Qwen2Tokenizer | Qwen3_5Tokenizer:
    """Train the tokenizer on the corpus of this package.

    Args:
        family: ``model_type`` of the checkpoint.

    Returns:
        A tokenizer of the family's class: 256 bytes and the merges first, then the special and added tokens.
    """
    vocab, merges = _train(family)
    tokens = [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    tokens += [AddedToken(token, special=False, normalized=False) for token in ADDED_TOKENS]
    return tokenizer_class(family)(
        vocab=vocab,
        merges=merges,
        unk_token=None,
        bos_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        added_tokens_decoder={len(vocab) + index: token for index, token in enumerate(tokens)},
        clean_up_tokenization_spaces=False,
        model_max_length=32768,
    )


def _train(family: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return vocabulary and merges, trained with the family's own normaliser and split rule."""
    pipeline = tokenizer_class(family)().backend_tokenizer
    trainee = Tokenizer(BPE())
    trainee.normalizer = pipeline.normalizer
    trainee.pre_tokenizer = pipeline.pre_tokenizer
    trainee.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = BpeTrainer(
        vocab_size=len(alphabet) + NUM_MERGES, initial_alphabet=alphabet, special_tokens=[], show_progress=False
    )
    trainee.train_from_iterator(corpus(), trainer)
    model = json.loads(trainee.to_str())["model"]
    return model["vocab"], [tuple(merge) for merge in model["merges"]]
