"""The part of the Trainer that feeds it: which samples come when, on which rank, and where a resumed run goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from transformers import ProcessorMixin

from qwenvl.data.sampler import SampleOrder, Sharding
from qwenvl.train.dataloader import build_loader
from qwenvl.train.resume.sampler_state import (
    Repeats,
    begins_again,
    count_repeats,
    describe_order,
    read_batch_size,
    require_same_order,
    write_position,
)
from qwenvl.train.saving_trainer import Records, SavingTrainer


class FeedingTrainer(SavingTrainer):
    """A Trainer whose batches come in an order that is known beforehand.

    Args:
        order: in which samples are trained on.
        processor: saved with every checkpoint.
        records: saved with every checkpoint.
        options: of the stock Trainer.
    """

    def __init__(self, order: SampleOrder, processor: ProcessorMixin, records: Records, **options: Any) -> None:
        super().__init__(processor, records, **options)
        self._order = order
        self._repeats = Repeats(asked=self.args.ignore_data_skip)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return this rank's training batches."""
        return build_loader(self.train_dataset, self.data_collator, self.args, self._order, self._sharding())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Return this rank's evaluation batches."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        sharding = Sharding(self.args.eval_batch_size, self.args.world_size, self.args.process_index)
        order = SampleOrder(len(dataset), shuffle=False)
        return build_loader(dataset, self.data_collator, self.args, order, sharding)

    def begins_again(self, checkpoint: str) -> bool:
        """Whether the epoch of a checkpoint begins again, as ``--ignore_data_skip`` asks for.

        Otherwise its next sample has to be the one that comes next here.

        Raises:
            UserError: it was saved with other data or other settings of the order.
        """
        sharding = self._sharding()
        if self.args.auto_find_batch_size:  # the Trainer goes on with the size it had found
            sharding = replace(sharding, batch_size=read_batch_size(checkpoint) or sharding.batch_size)
        described = self._describe_order(sharding)
        if self.args.ignore_data_skip:
            return begins_again(checkpoint, described)
        require_same_order(checkpoint, described)
        return False

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        """Take up the state of the run, and return the epoch and its micro-batch to go on with.

        The Trainer computes both from the steps taken, some of which may be repeated ones.
        """
        begin: tuple[int, int] = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is None:
            return begin
        step, again = self.state.global_step, self.args.ignore_data_skip
        repeated = count_repeats(resume_from_checkpoint, step, num_update_steps_per_epoch, again=again)
        self._repeats = replace(self._repeats, steps=repeated)
        epoch, steps = divmod(step - repeated, num_update_steps_per_epoch)
        return epoch, steps * self.args.gradient_accumulation_steps

    def save_position(self, folder: Path) -> None:
        """Write how far the data are used, and what their order is made of."""
        sharding = self._sharding()
        if self.args.should_save:
            described, step = self._describe_order(sharding), self.state.global_step
            write_position(folder, described, sharding, step, self._repeats)

    def _describe_order(self, sharding: Sharding) -> dict[str, Any]:
        return describe_order(self._order, sharding.step_size, self.train_dataset.content)

    def _sharding(self) -> Sharding:
        size = self._train_batch_size  # that of the flag, or a smaller one found by --auto_find_batch_size
        accumulation = self.args.gradient_accumulation_steps
        return Sharding(size, self.args.world_size, self.args.process_index, accumulation)
