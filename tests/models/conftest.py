"""Samples made by the stock processors, and batches of them, independent of the trainer's own data path."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from qwenvl.families import FAMILIES
from qwenvl.models.loss.causal_lm import prepare_inputs
from qwenvl.models.vision.patchify import MediumShape
from tests.patches import frames_of

# what each sample of the mixture holds, in order
MIXTURE: dict[str, tuple[str, ...]] = {
    "text": (),
    "image": ("image",),
    "two images": ("image", "image"),
    "video": ("video",),
    "video, image": ("video", "image"),
}


@dataclass(frozen=True)
class StockSample:
    """One sample as stock transformers sees it, and what the trainer needs besides.

    Args:
        inputs: arguments of the stock model, without labels.
        labels: int64 [1, T].
        position_ids: int64 [4, 1, T]; rows 1-3 from the stock ``get_rope_index``.
        pixels: uint8, the frames of all media in the order of their tokens; None for text alone.
        media: their frames and grids.
        vision_mask: bool [1, T].
    """

    inputs: dict[str, Any]
    labels: Tensor
    position_ids: Tensor
    pixels: Tensor | None
    media: tuple[MediumShape, ...]
    vision_mask: Tensor

    @property
    def trained_tokens(self) -> int:
        return int((self.labels[:, 1:] != -100).sum())


def _picture(generator: np.random.Generator, height: int, width: int) -> Image.Image:
    return Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8))


def _process(processor: Any, media: Sequence[str], seed: int) -> dict[str, Any]:
    """Render and process one conversation with the stock processor."""
    generator = np.random.default_rng(seed)
    images, videos, content = [], [], []
    for number, kind in enumerate(media):
        content.append({"type": kind})
        if kind == "image":
            images.append(_picture(generator, 56 + 28 * number, 84))
        else:
            videos.append(generator.integers(0, 256, (4, 64, 96, 3), dtype=np.uint8))
    content.append({"type": "text", "text": "What is here? " * (1 + seed % 3)})
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat and " + "a dog " * (2 + seed)}]},
    ]
    text = processor.apply_chat_template(messages, tokenize=False)
    extra: dict[str, Any] = {}
    if videos:
        metadata = {"fps": 2.0, "total_num_frames": 4, "frames_indices": [0, 1, 2, 3], "duration": 2.0}
        extra = {"videos": videos, "do_sample_frames": False, "video_metadata": [dict(metadata) for _ in videos]}
    if images:
        extra["images"] = images
    return dict(processor(text=[text], return_tensors="pt", **extra))


def _media_in_token_order(inputs: dict[str, Any], processor: Any) -> tuple[Tensor | None, tuple[MediumShape, ...]]:
    """Interleave the processor's images and videos as their tokens stand in the text, and undo its patches."""
    sources = {
        kind: iter(_split_media(inputs.get(pixels), inputs.get(grids)))
        for kind, pixels, grids in (
            (1, "pixel_values", "image_grid_thw"),
            (2, "pixel_values_videos", "video_grid_thw"),
        )
    }
    frames, shapes, pending = [], list[MediumShape](), 0
    for kind, run in itertools.groupby(inputs["mm_token_type_ids"][0].tolist()):
        if kind == 0:
            continue
        if pending == 0:  # a video whose frames stand apart goes on over several runs
            rows, grid = next(sources[kind])
            shown = frames_of(rows, grid, processor.image_processor if kind == 1 else processor.video_processor)
            frames.append(shown[:1] if kind == 1 else shown)
            shapes.append((len(frames[-1]), *grid))
            pending = len(rows) // processor.image_processor.merge_size**2
        pending -= len(list(run))
    assert pending == 0 and all(next(source, None) is None for source in sources.values())
    return torch.cat([one.flatten() for one in frames]) if frames else None, tuple(shapes)


def _split_media(pixels: Tensor | None, grids: Tensor | None) -> list[tuple[Tensor, tuple[int, int, int]]]:
    if pixels is None or grids is None:
        return []
    shapes = [(int(t), int(h), int(w)) for t, h, w in grids.tolist()]
    return list(zip(pixels.split(grids.prod(-1).tolist()), shapes, strict=True))


def make_sample(model: PreTrainedModel, processor: Any, media: Sequence[str], seed: int) -> StockSample:
    """Make one sample; every second text token after the first media is trained, so that spans have gaps."""
    inputs = _process(processor, media, seed)
    types, ids = inputs["mm_token_type_ids"], inputs["input_ids"]
    accepted = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")
    positions, _ = model.model.get_rope_index(
        ids, mm_token_type_ids=types, **{name: inputs[name] for name in accepted if name in inputs}
    )
    text_positions = torch.arange(ids.shape[1]).view(1, 1, -1)
    labels = ids.clone()
    trained = torch.arange(ids.shape[1]) % 3 != 0
    labels[(types != 0) | ~trained[None]] = -100
    labels[:, : ids.shape[1] // 3] = -100
    pixels, media = _media_in_token_order(inputs, processor)
    position_ids = torch.cat([text_positions, positions])
    return StockSample(inputs, labels, position_ids, pixels, media, types != 0)


def _media(samples: Sequence[StockSample]) -> dict[str, Any]:
    pixels = [sample.pixels for sample in samples if sample.pixels is not None]
    shapes = tuple(shape for sample in samples for shape in sample.media)
    return {
        "num_samples": len(samples),
        **({"pixels": torch.cat(pixels), "media": shapes} if pixels else {}),
    }


def pad_batch(samples: Sequence[StockSample]) -> dict[str, Any]:
    """A batch [B, max T], padded on the right."""
    length = max(sample.labels.shape[1] for sample in samples)

    def pad(tensor: Tensor, value: int) -> Tensor:
        return torch.nn.functional.pad(tensor, (0, length - tensor.shape[-1]), value=value)

    return {
        "input_ids": torch.cat([pad(sample.inputs["input_ids"], 0) for sample in samples]),
        "labels": torch.cat([pad(sample.labels, -100) for sample in samples]),
        "position_ids": torch.cat([pad(sample.position_ids, 0) for sample in samples], dim=1),
        "attention_mask": torch.cat([pad(torch.ones_like(sample.labels), 0) for sample in samples]),
        "vision_rows": torch.cat([pad(sample.vision_mask, False) for sample in samples]).flatten().nonzero().squeeze(1),
        **_media(samples),
    }


def flatten_batch(samples: Sequence[StockSample]) -> dict[str, Any]:
    """One row [1, sum T]."""
    lengths = torch.tensor([0, *(sample.labels.shape[1] for sample in samples)])
    cu_seq_lens = lengths.cumsum(0).to(torch.int32)
    return {
        "input_ids": torch.cat([sample.inputs["input_ids"] for sample in samples], dim=1),
        "labels": torch.cat([sample.labels for sample in samples], dim=1),
        "position_ids": torch.cat([sample.position_ids for sample in samples], dim=2),
        "vision_rows": torch.cat([sample.vision_mask for sample in samples], dim=1).flatten().nonzero().squeeze(1),
        "cu_seq_lens_q": cu_seq_lens,
        "cu_seq_lens_k": cu_seq_lens,
        "max_length_q": int(lengths.max()),
        "max_length_k": int(lengths.max()),
        **_media(samples),
    }


BATCHES: dict[str, Callable[[Sequence[StockSample]], dict[str, Any]]] = {
    "padded": pad_batch,
    "flattened": flatten_batch,
}


@pytest.fixture(params=list(FAMILIES))
def family_name(request: pytest.FixtureRequest) -> str:
    """Every family in turn."""
    return str(request.param)


@pytest.fixture(params=["padded", "flattened"])
def layout(request: pytest.FixtureRequest) -> str:
    """Both batch layouts."""
    return str(request.param)


@pytest.fixture
def make_batch() -> Callable[[str, Sequence[StockSample]], dict[str, Any]]:
    """Function of layout and samples that makes a batch."""
    return lambda layout, samples: prepare_inputs(BATCHES[layout](samples))


@pytest.fixture
def load_tiny(tiny_checkpoint: Callable[[str], Path]) -> Callable[..., PreTrainedModel]:
    """Function of family and attention that loads a fresh tiny model in float32, in training mode."""

    def load(family: str, attention: str = "sdpa") -> PreTrainedModel:
        model = AutoModelForImageTextToText.from_pretrained(
            tiny_checkpoint(family), dtype=torch.float32, attn_implementation=attention
        )
        return model.train()

    return load


@pytest.fixture(scope="session")
def mixture(tiny_checkpoint: Callable[[str], Path]) -> Callable[[str], dict[str, StockSample]]:
    """Function of the family that makes the mixed samples, by what they hold; made once a session."""
    made: dict[str, dict[str, StockSample]] = {}

    def make(family: str) -> dict[str, StockSample]:
        if family not in made:
            path = tiny_checkpoint(family)
            model = AutoModelForImageTextToText.from_pretrained(path)
            processor = AutoProcessor.from_pretrained(path)
            made[family] = {
                name: make_sample(model, processor, media, seed) for seed, (name, media) in enumerate(MIXTURE.items())
            }
        return made[family]

    return make
