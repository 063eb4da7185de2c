"""What the speed of a run is counted over."""

from __future__ import annotations

from collections.abc import Callable

import torch

from qwenvl.train.trainer import Trainer


def test_a_run_that_begins_again_counts_anew(trainer_of: Callable[..., Trainer]) -> None:
    """As with ``--auto_find_batch_size``: what ran with a batch that was too large is no part of the figures."""
    trainer = trainer_of()
    found = []
    for begins in (False, True):
        trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 2, torch.device("cpu"))
        if begins:
            trainer.callback_handler.on_train_begin(trainer.args, trainer.state, trainer.control)
        found.append(trainer.speed.throughput.take(lambda own: own)["tokens_per_second"])
    assert found[0] > 0 and found[1] == 0
