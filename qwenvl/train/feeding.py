"""The part of the Trainer that feeds it: which samples come when, on which rank, and where a resumed run goes on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from transformers import ProcessorMixin

from qwenvl.data.sampling import SampleOrder, Sharding
from qwenvl.train.loader import build_loader
from qwenvl.train.position import describe_order, read_batch_size, require_same_order, write_position
from qwenvl.train.saving import Records, SavingTrainer


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

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return this rank's training batches."""
        return build_loader(self.train_dataset, self.data_collator, self.args, self._order, self._sharding())

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Return this rank's evaluation batches."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        sharding = Sharding(self.args.eval_batch_size, self.args.world_size, self.args.process_index)
        order = SampleOrder(len(dataset), shuffle=False)
        return build_loader(dataset, self.data_collator, self.args, order, sharding)

    def require_same_order(self, checkpoint: str) -> None:
        """Check that a checkpoint's next sample is the one that comes next here.

        Raises:
            UserError: it was saved with other data or other settings of the order.
        """
        sharding = self._sharding()
        if self.args.auto_find_batch_size:  # the Trainer goes on with the size it had found
            sharding = replace(sharding, batch_size=read_batch_size(checkpoint) or sharding.batch_size)
        require_same_order(checkpoint, self._describe_order(sharding))

    def save_position(self, folder: Path) -> None:
        """Write how far the data are used, and what their order is made of."""
        sharding = self._sharding()
        if self.args.should_save:
            write_position(folder, self._describe_order(sharding), sharding, self.state.global_step)

    def _describe_order(self, sharding: Sharding) -> dict[str, Any]:
        return describe_order(self._order, sharding.step_size, self.train_dataset.content)

    def _sharding(self) -> Sharding:
        size = self._train_batch_size  # that of the flag, or a smaller one found by --auto_find_batch_size
        accumulation = self.args.gradient_accumulation_steps
        return Sharding(size, self.args.world_size, self.args.process_index, accumulation)
