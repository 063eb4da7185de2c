"""Model and data of ``step.py``: a Qwen3-VL of a given size, and short and long samples of images and text."""

from __future__ import annotations

import math

import numpy as np
import torch
from transformers import Qwen3VLConfig

from qwenvl.data.encoding.encoded import EncodedSample, Medium
from qwenvl.data.encoding.mrope import VisionSpan, position_ids
from qwenvl.data.encoding.tokenization import Tokens

VOCABULARY, TEXT = 151_936, 1000  # columns; ids of random text are below 1000, the image token's id is 1000

# hidden size, feed-forward, layers, heads, key heads; tower: hidden size, feed-forward, blocks, blocks with deepstack.
# Values of the published Qwen3-VL checkpoints; "tiny" has its own proportions, and runs on a CPU.
SIZES = {
    "tiny": ((256, 768, 6, 4, 2), (128, 256, 4, (1, 2, 3))),
    "2b": ((2048, 6144, 28, 16, 8), (1024, 4096, 24, (5, 11, 17))),
    "4b": ((2560, 9728, 36, 32, 8), (1024, 4096, 24, (5, 11, 17))),
    "8b": ((4096, 12288, 36, 32, 8), (1152, 4304, 27, (8, 16, 24))),
}


def make_config(size: str) -> Qwen3VLConfig:
    """Return a Qwen3-VL config of a size's shapes."""
    (hidden, inner, layers, heads, keys), (vision, vision_inner, depth, deepstack) = SIZES[size]
    head = 128 if size != "tiny" else 64
    return Qwen3VLConfig(
        text_config={
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": keys,
            "head_dim": head,
            "vocab_size": VOCABULARY if size != "tiny" else VOCABULARY // 4,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_interleaved": True,
                "mrope_section": [24, 20, 20] if size != "tiny" else [12, 10, 10],
            },
        },
        vision_config={
            "hidden_size": vision,
            "intermediate_size": vision_inner,
            "depth": depth,
            "num_heads": 16 if size != "tiny" else 4,
            "out_hidden_size": hidden,
            "deepstack_visual_indexes": list(deepstack),
        },
        image_token_id=TEXT,
        tie_word_embeddings=size in ("2b", "4b"),
    )


def make_samples(config: Qwen3VLConfig, count: int, pack_length: int, *, images: bool = True) -> list[EncodedSample]:
    """Return a typical mixture of samples: half with an image if there are images, with texts from short to long."""
    generator = np.random.default_rng(0)
    longest = pack_length // 2
    samples = []
    for number in range(count):
        text = int(min(longest // 2, max(24, generator.lognormal(math.log(longest / 24), 1.0))))
        side = int(generator.integers(8, 8 + max(2, int(math.sqrt(longest) / 2)))) * 2
        grid = (1, side, side) if images and number % 2 else None
        samples.append(_make_sample(config, text, max(8, text // 3), grid, generator))
    return samples


def _make_sample(
    config: Qwen3VLConfig, text: int, answer: int, grid: tuple[int, int, int] | None, generator: np.random.Generator
) -> EncodedSample:
    merge, patch = config.vision_config.spatial_merge_size, config.vision_config.patch_size
    merged = None if grid is None else (1, grid[1] // merge, grid[2] // merge)
    visual = 0 if merged is None else math.prod(merged)
    length = text + visual
    ids = torch.from_numpy(generator.integers(0, TEXT, length))
    mask = torch.zeros(length, dtype=torch.bool)
    mask[8 : 8 + visual] = True
    ids[mask] = config.image_token_id
    labels = torch.full((length,), -100)
    labels[-answer:] = ids[-answer:]
    spans = [] if merged is None else [VisionSpan(8, merged)]
    media: tuple[Medium, ...] = ()
    if grid is not None:
        size = (1, grid[1] * patch, grid[2] * patch, 3)
        media = (Medium(torch.from_numpy(generator.integers(0, 256, size, dtype=np.uint8)), grid),)
    return EncodedSample(Tokens(ids, labels, position_ids(length, spans), mask), media)
