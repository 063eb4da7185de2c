"""What a run reads: packs of the user's data, or packs of an assumed mixture where no data are named."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel

from qwenvl.config import ParsedArguments
from qwenvl.data.collator import Collator, for_model
from qwenvl.data.encoding.encoded import EncodedSample, Item, Medium
from qwenvl.data.encoding.mrope import VisionSpan, position_ids
from qwenvl.data.encoding.processor import AddedTokens
from qwenvl.data.encoding.tokenization import Tokens
from qwenvl.data.sample_stats import MEASURES, Measures
from qwenvl.families import Family
from qwenvl.models.vision.patchify import Patchify
from qwenvl.profiling.activation_memory import StepMemory, measure_step
from qwenvl.profiling.flops import Flops
from qwenvl.tasks.objective import Objective
from qwenvl.train.build.data import RunData, open_data
from qwenvl.train.dry_run.preflight import measure_heaviest
from qwenvl.train.schedule import slowest_over_mean

SAMPLE = 512
"""Tokens of a sample of the assumed mixture: an image of 16 x 16 tokens, 128 of text, and 128 that are trained."""
_SIDE, _BEFORE, _ANSWER = 16, 8, 128


@dataclass(frozen=True)
class AssumedData:
    """Full packs of samples of one image each.

    Args:
        config: Config of the model.
        pack: Tokens of a pack.
        tokens: Tokens of an epoch.
    """

    config: PretrainedConfig
    pack: int
    tokens: float

    @property
    def indices(self) -> int:
        """Number of packs of an epoch."""
        return max(1, round(self.tokens / self.pack))

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return SAMPLE

    def measure(self, model: PreTrainedModel, _: ParsedArguments) -> StepMemory:
        """Return the memory of a micro-batch."""
        sample = _sample(self.config)
        batch = for_model(Collator(0, flatten=True)([Item((sample,) * self._samples)]))
        objective = Objective()
        return measure_step(model, objective.prepare(batch), objective)

    def work(self, flops: Flops, _: ParsedArguments, __: int) -> tuple[float, float]:
        """Return (operations of an epoch, work of the slowest rank / mean)."""
        patches = (_SIDE * self.config.vision_config.spatial_merge_size) ** 2
        one = Measures(1, SAMPLE, _ANSWER, patches, SAMPLE**2, patches**2, 1)
        counted = float(flops.count(np.array([one], MEASURES)).sum())
        return counted * self._samples * self.indices, 1.0

    def patchify(self) -> Patchify:
        """Return a conversion of pixels to patches, whose values do not matter here."""
        vision, grey = self.config.vision_config, torch.full((3,), 127.5)
        return Patchify(vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size, grey, grey)

    @property
    def added_tokens(self) -> AddedTokens:
        """Tokens added to the vocabulary: none."""
        return AddedTokens()

    @property
    def objective(self) -> Objective:
        """Language modelling."""
        return Objective()

    @property
    def _samples(self) -> int:
        return max(1, self.pack // SAMPLE)


def _sample(config: Any) -> EncodedSample:
    vision = config.vision_config
    side = _SIDE * vision.spatial_merge_size
    ids = torch.full((SAMPLE,), config.image_token_id + 1)
    mask = torch.zeros(SAMPLE, dtype=torch.bool)
    mask[_BEFORE : _BEFORE + _SIDE**2] = True
    ids[mask] = config.image_token_id
    labels = torch.where(torch.arange(SAMPLE) >= SAMPLE - _ANSWER, ids, -100)
    positions = position_ids(SAMPLE, [VisionSpan(_BEFORE, (1, _SIDE, _SIDE))])
    pixels = torch.zeros(1, side * vision.patch_size, side * vision.patch_size, 3, dtype=torch.uint8)
    return EncodedSample(Tokens(ids, labels, positions, mask), (Medium(pixels, (1, side, side)),))


@dataclass(frozen=True)
class UserData:
    """Packs of the data that the flags name, measured as ``--dry_run`` measures them."""

    data: RunData

    @classmethod
    def open(cls, parsed: ParsedArguments, family: Family, config: PretrainedConfig) -> UserData:
        """Open and pack the data.

        Raises:
            UserError: They cannot be used.
        """
        return cls(open_data(parsed, family, config))

    @property
    def indices(self) -> int:
        """Number of packs of an epoch."""
        return len(self.data.train)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        assert self.data.arranged.measures is not None
        return int(self.data.arranged.measures["tokens"].max())

    def measure(self, model: PreTrainedModel, parsed: ParsedArguments) -> StepMemory:
        """Return the memory of the heaviest micro-batch."""
        return measure_heaviest(model, self.data, self._packs(), parsed)

    def work(self, flops: Flops, parsed: ParsedArguments, ranks: int) -> tuple[float, float]:
        """Return (operations of an epoch, work of the slowest rank / mean)."""
        costs = flops.count(self._packs())
        return float(costs.sum()), slowest_over_mean(self.data.order, costs, parsed.training, ranks)

    def patchify(self) -> Patchify:
        """Return the processor's conversion of pixels to patches."""
        return Patchify.from_processor(self.data.processor)

    @property
    def added_tokens(self) -> AddedTokens:
        """Tokens added to the vocabulary."""
        return self.data.added_tokens

    @property
    def objective(self) -> Objective:
        """Objective of the training."""
        return self.data.objective

    def _packs(self) -> np.ndarray:
        assert self.data.arranged.measures is not None
        return self.data.train.add_up(self.data.arranged.measures)
