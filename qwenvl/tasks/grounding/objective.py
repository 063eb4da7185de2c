"""What ``--task grounding`` learns: masks of phrases, from the attention of a model that stays as it is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from qwenvl.models.loss.causal_lm import tell_host
from qwenvl.tasks.grounding.metrics import MaskRecord, compare_masks, mask_metrics
from qwenvl.tasks.grounding.module import GroundingReadout, GroundingSettings
from qwenvl.tasks.grounding.phrases import Region
from qwenvl.tasks.grounding.predict import mask_pixels, readout_inputs, split_masks
from qwenvl.tasks.grounding.sam import MaskRefiner
from qwenvl.tasks.grounding.unet import mask_loss
from qwenvl.tasks.objective import Objective


@dataclass
class Grounding(Objective):
    """Masks of phrases; a unit is a phrase.

    Args:
        settings: of the module that trains.
        sam: a checkpoint of SAM; None for coarse masks alone.
    """

    settings: GroundingSettings
    sam: str | None = None
    unit = "phrases"
    attention = "sdpa"  # others do not show queries and keys

    def build_readout(self, config: PretrainedConfig) -> GroundingReadout:
        """Return the U-Net, and SAM where it is asked for.

        Raises:
            UserError: there is no such SAM.
        """
        text: Any = config.get_text_config()
        refiner = None
        if self.sam is not None:
            layers, hidden_size = text.num_hidden_layers, text.hidden_size
            refiner = MaskRefiner.from_checkpoint(self.sam, layers, hidden_size, self.settings.seed)
        return GroundingReadout(config, self.settings, refiner)

    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Say what looks where."""
        regions: list[tuple[Region, ...]] = batch["sample_targets"]
        places = [[region.place for region in of_sample] for of_sample in regions]
        sizes = [[target.shape for target in region.targets] for of_sample in regions for region in of_sample]
        inputs = readout_inputs(batch, places, sizes, with_pictures=self.sam is not None)
        prepared = tell_host(batch)
        for name in ("kept_positions", "targets"):
            prepared.pop(name)
        return prepared | {"readout_inputs": inputs}

    def count(self, batch: Mapping[str, Any]) -> int:
        """Return the phrases of a batch."""
        return sum(len(regions) for regions in batch["sample_targets"])

    def summed_loss(self, output: Tensor, batch: Mapping[str, Any]) -> Tensor:
        """Return the losses of all masks, those of SAM as much as the coarse ones."""
        losses = [
            mask_loss(logits, torch.from_numpy(target).to(logits.device))
            for region, masks in self._masks(output, batch)
            for logits, target in zip(masks, region.targets, strict=True)
        ]
        return torch.stack(losses).sum() if losses else output.sum()

    def records(self, output: Tensor, batch: Mapping[str, Any]) -> list[MaskRecord]:
        """Return how the finest masks fit, in pixels of the pictures as they are shown."""
        return [
            compare_masks(mask_pixels(masks[-1], region.mask.size), region.mask.pixels())
            for region, masks in self._masks(output, batch)
        ]

    def metrics(self, records: Sequence[MaskRecord]) -> dict[str, float]:
        """Return :func:`qwenvl.tasks.grounding.metrics.mask_metrics`."""
        return mask_metrics(records)

    def _masks(self, output: Tensor, batch: Mapping[str, Any]) -> Iterator[tuple[Region, list[Tensor]]]:
        """Yield every phrase with the logits of its masks, the coarse one first."""
        regions = [region for of_sample in batch["sample_targets"] for region in of_sample]
        return zip(regions, split_masks(output, [[t.shape for t in region.targets] for region in regions]), strict=True)
