"""Losses of samples from the stock forward pass: those of training, and in a batch those of the sample alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qwenvl.cli.inference_args import AskArguments, open_job, open_model
from qwenvl.inference.answer_rows import open_row
from qwenvl.inference.loss import token_losses, weighted_sum
from qwenvl.train.trainer import Trainer
from tests.e2e.conftest import registry, trainer_of
from tests.e2e.runs import losses_alone

__all__ = ["registry", "trainer_of"]

LIMITS: dict[str, Any] = {
    "max_pixels": 64 * 64,
    "min_pixels": 32 * 32,
    "video_max_pixels": 4 * 64 * 64,
    "video_min_pixels": 4 * 32 * 32,
    "video_max_frames": 4,
    "video_min_frames": 2,
}


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"])
def test_a_batch_gives_each_sample_the_losses_that_it_has_alone_and_in_training(
    family: str, tiny_checkpoint: Callable[[str], Path], registry: Path, trainer_of: Callable[..., Trainer]
) -> None:
    """Text, images and videos of several lengths, padded on the left; Qwen3.5 has linear attention too."""
    chosen = {"dataset_use": "mixed", "dataset_registry": str(registry), **LIMITS}
    asking = AskArguments(model_name_or_path=str(tiny_checkpoint(family)), **chosen)
    job = open_job(asking)
    model = open_model(asking, job.encoder)
    rows = [open_row(job, row) for row in range(job.num_rows)]
    examples = {line.line: example for row in rows for line, example in row if example is not None}
    assert len(examples) == 11 and len({len(one.encoded.tokens) for one in examples.values()}) > 5
    trained = losses_alone(trainer_of(family, per_device_train_batch_size=1))
    batch = token_losses(model, list(examples.values()))
    for found, (line, example) in zip(batch, examples.items(), strict=True):
        (alone,) = token_losses(model, [example])
        torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-5)
        assert weighted_sum(found, example) == pytest.approx(trained[line], rel=1e-4)
