"""The objective of ``--task grounding``: masks of phrases from the attention of a frozen model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from qwenvl.config import ParsedArguments, TaskArguments
from qwenvl.data.dataset import SampledTable
from qwenvl.data.encoding.encoder import SampleEncoder
from qwenvl.models.loss.causal_lm import prepare_inputs, run_model
from qwenvl.tasks.grounding.metrics import MaskRecord, compare_masks, mask_metrics
from qwenvl.tasks.grounding.module import GroundingReadout, GroundingSettings
from qwenvl.tasks.grounding.phrases import MaskReader, Region
from qwenvl.tasks.grounding.predict import mask_pixels, readout_inputs, split_masks
from qwenvl.tasks.grounding.sam import MaskRefiner
from qwenvl.tasks.grounding.unet import mask_loss
from qwenvl.tasks.objective import Objective, Task
from qwenvl.utils.devices import copy_to_device
from qwenvl.utils.errors import UserError


@dataclass
class Grounding(Objective):
    """Objective of phrase grounding; a unit is a phrase.

    Args:
        settings: Hyperparameters of the module.
        sam: Checkpoint of SAM; None for coarse masks only.
    """

    settings: GroundingSettings
    sam: str | None = None
    unit = "phrases"
    attention = "sdpa"  # the probe needs queries and keys, which other implementations do not expose

    def build_readout(self, config: PretrainedConfig) -> GroundingReadout:
        """Return the U-Net, with SAM if it is configured.

        Raises:
            UserError: the checkpoint of SAM cannot be opened.
        """
        text: Any = config.get_text_config()
        refiner = None
        if self.sam is not None:
            layers, hidden_size = text.num_hidden_layers, text.hidden_size
            refiner = MaskRefiner.from_checkpoint(self.sam, layers, hidden_size, self.settings.seed)
        return GroundingReadout(config, self.settings, refiner)

    def prepare(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Add the token positions of phrases and images; see :meth:`Objective.prepare`."""
        regions: list[tuple[Region, ...]] = batch["sample_targets"]
        places = [[region.place for region in of_sample] for of_sample in regions]
        sizes = [[target.shape for target in region.targets] for of_sample in regions for region in of_sample]
        inputs = readout_inputs(batch, places, sizes, with_images=self.sam is not None)
        prepared = prepare_inputs(batch)
        for name in ("kept_positions", "targets"):
            prepared.pop(name)
        samples = [number for number, of_sample in enumerate(regions) for _ in of_sample]
        return prepared | {"readout_inputs": inputs, "sample_of_unit": torch.tensor(samples, dtype=torch.long)}

    def count(self, batch: Mapping[str, Any]) -> int:
        """Return the number of phrases of a batch."""
        return sum(len(regions) for regions in batch["sample_targets"])

    def compute(self, model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Any]:
        """Return the summed loss of all masks, coarse and from SAM with equal weight, and the model's output."""
        output = run_model(model, batch)
        found = [
            torch.stack(
                [
                    mask_loss(logits, copy_to_device(torch.from_numpy(target), logits.device))
                    for logits, target in zip(masks, region.targets, strict=True)
                ]
            ).sum()
            for region, masks in self._masks(output.logits, batch)
        ]
        losses = torch.stack(found) if found else output.logits.new_zeros(0)
        output.unit_losses = losses.detach()
        return losses.sum() if found else output.logits.sum(), output

    def records(self, output: Any, batch: Mapping[str, Any]) -> list[MaskRecord]:
        """Return comparisons of the finest masks, in pixels of the images as they are shown."""
        return [
            compare_masks(mask_pixels(masks[-1], region.mask.size), region.mask.pixels())
            for region, masks in self._masks(output.logits, batch)
        ]

    def metrics(self, records: Sequence[MaskRecord]) -> dict[str, float]:
        """Return :func:`qwenvl.tasks.grounding.metrics.mask_metrics`."""
        return mask_metrics(records)

    def _masks(self, output: Tensor, batch: Mapping[str, Any]) -> Iterator[tuple[Region, list[Tensor]]]:
        """Yield every phrase with the logits of its masks, coarse mask first."""
        regions = [region for of_sample in batch["sample_targets"] for region in of_sample]
        return zip(regions, split_masks(output, [[t.shape for t in region.targets] for region in regions]), strict=True)


def open_grounding(
    parsed: ParsedArguments,
    config: PretrainedConfig,
    train: Sequence[SampledTable],
    held_out: Sequence[SampledTable],
    encoder: SampleEncoder,
) -> Task:
    """Return the task of a run, for :attr:`qwenvl.tasks.registry.TaskKind.open`."""
    del config, train, held_out
    chosen = parsed.tasks
    settings = GroundingSettings(
        resolution=chosen.mask_resolution,
        merge=chosen.attention_merge,
        channels=chosen.mask_channels,
        learning_rate=chosen.head_lr,
        seed=parsed.training.seed,
    )
    finer = () if chosen.sam_model_name_or_path is None else (settings.refined_resolution,)
    return Task(Grounding(settings, chosen.sam_model_name_or_path), _reader(encoder, (settings.resolution, *finer)))


def checking_reader(chosen: TaskArguments, encoder: SampleEncoder | None) -> MaskReader:
    """Return a reader of masks for ``tools/check_image.py``.

    Raises:
        UserError: there is no encoder, because no model is given.
    """
    if encoder is None:
        raise UserError(f"--task {chosen.task} needs --model_name_or_path, to find the tokens of phrases.")
    return _reader(encoder)


def _reader(encoder: SampleEncoder, resolutions: tuple[int, ...] = ()) -> MaskReader:
    return MaskReader(encoder.tokenizer, encoder.template.turn_end, encoder.settings.merge_size, resolutions)
