"""``sample_losses.parquet``: the loss of each sample each time it was trained (``--log_sample_losses``).

=========  =====================================================================================
dataset    registry name
file       annotation file, or name and split of a Hugging Face dataset
line       line of a JSONL file, or item of an array or table, from 1
member     place inside a packed row, from 1; null in an ordinary row
id         the sample's own ``id``; null where it has none
epoch      number of the pass over the data, from 0
step       optimizer step, from 1
loss       loss summed over the sample's units (trained tokens, phrases, ...), before the step
tokens     number of these units; with weights of answers, both are weighted sums
=========  =====================================================================================

A conversation that is trained as several rows has a line for each. The order is that of the steps, and in a step that
of dataset, file and line, however many ranks there are.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from qwenvl.tasks.objective import weights_of_samples
from qwenvl.utils.cache import replacing
from qwenvl.utils.distributed import gather_objects, is_main_process
from qwenvl.utils.errors import Origin, UserError

logger = logging.getLogger(__name__)

FILE_NAME = "sample_losses.parquet"
SCHEMA = pa.schema(
    [
        ("dataset", pa.string()),
        ("file", pa.string()),
        ("line", pa.int64()),
        ("member", pa.int32()),
        ("id", pa.string()),
        ("epoch", pa.int32()),
        ("step", pa.int64()),
        ("loss", pa.float64()),
        ("tokens", pa.float64()),
    ]
)
_ORDER = [(name, "ascending") for name in ("step", "dataset", "file", "line", "member")]


class SampleLosses:
    """Keeps the losses of this rank's samples, and writes those of all ranks before each checkpoint.

    Losses stay on their device until a log line or a checkpoint is written. Rows after the checkpoint that a run
    resumes from are removed, so that a step that is trained again stands in the file once.

    Args:
        output_dir: Output folder of the run.
        wanted: Whether losses are kept (``--log_sample_losses``).
    """

    def __init__(self, output_dir: str, wanted: bool) -> None:
        self.wanted = wanted
        self._path = Path(output_dir) / FILE_NAME
        self._beginning = 0  # step of the checkpoint that the run resumed from
        self._forget()

    def _forget(self) -> None:
        self._origins, self._weights, self._losses = list[Origin](), list[np.ndarray](), list[Tensor]()
        self._steps = list[tuple[int, int, Sequence[Origin], np.ndarray, Sequence[Tensor]]]()
        self._tables = list[pa.Table]()

    def start_over(self) -> None:
        """Forget what was trained since the run began or resumed; every rank must call it."""
        self._forget()
        if not is_main_process() or not self._path.exists():
            return
        if self._beginning:
            _rewrite(self._path, pa.table(SCHEMA.empty_table()), until=self._beginning)
        else:
            self._path.unlink()

    def take_up(self, step: int) -> None:
        """Continue the file of a run that resumes; every rank must call it.

        Args:
            step: Step of the checkpoint.
        """
        self._beginning = step
        if self.wanted and is_main_process() and not self._path.exists():
            logger.warning("There is no %s: it will begin with step %d.", self._path, step + 1)
        self.start_over()

    def count(self, batch: Mapping[str, Any], origins: Sequence[Origin]) -> None:
        """Note the samples of a prepared batch on the host.

        Args:
            batch: Prepared batch.
            origins: Origins of its samples, in order.
        """
        if self.wanted:
            self._origins += origins
            self._weights.append(weights_of_samples(batch))

    def add(self, losses: Tensor | None) -> None:
        """Add the losses of a batch's samples, [samples] on the device.

        Raises:
            UserError: The task does not tell them.
        """
        if self.wanted:
            if losses is None:
                raise UserError("--log_sample_losses: this task has no losses of single samples. Leave it out.")
            self._losses.append(losses)

    def end_step(self, step: int, epoch: int, *, taken: bool) -> None:
        """Keep the losses of a step, or drop them if the step was skipped."""
        if taken and self.wanted:
            self._steps.append((step, epoch, self._origins, np.concatenate(self._weights), self._losses))
        self._origins, self._weights, self._losses = [], [], []

    def collect(self) -> None:
        """Read the losses of the steps since the last call from the device."""
        if not self._steps:
            return
        losses = torch.cat([one for step in self._steps for one in step[-1]]).cpu().numpy()
        weights = np.concatenate([step[-2] for step in self._steps])
        rows = [(step, epoch, one) for step, epoch, origins, *_ in self._steps for one in origins]
        columns: dict[str, Any] = {
            name: [getattr(origin, name) for *_, origin in rows] for name in ("dataset", "file", "line", "member", "id")
        }
        columns |= {"step": [row[0] for row in rows], "epoch": [row[1] for row in rows]}
        columns |= {"loss": losses.astype(np.float64), "tokens": weights}
        self._tables.append(pa.table(columns, SCHEMA))
        self._steps = []

    def write(self) -> None:
        """Add the losses of all ranks since the last call to the file; every rank must call it."""
        if not self.wanted:
            return
        self.collect()
        mine = pa.concat_tables([SCHEMA.empty_table(), *self._tables])
        self._tables = []
        found = pa.concat_tables(gather_objects(mine))
        if is_main_process() and (found.num_rows or not self._path.exists()):
            _rewrite(self._path, found.sort_by(_ORDER))


def _rewrite(path: Path, added: pa.Table, until: int | None = None) -> None:
    """Write the rows of a file and further ones to the file, in one move.

    Args:
        path: File; need not exist.
        added: Rows to add.
        until: Last step whose rows of the file are kept; None to keep all.
    """
    with replacing(path) as temporary, pq.ParquetWriter(temporary, SCHEMA, compression="zstd") as writer:
        if path.exists():
            with pq.ParquetFile(path) as before:
                for batch in before.iter_batches():
                    writer.write_batch(batch if until is None else batch.filter(pc.less_equal(batch["step"], until)))
        if added.num_rows or not path.exists():
            writer.write_table(added)


def read_sample_losses(path: Path) -> pa.Table:
    """Read a file of losses.

    Raises:
        UserError: It cannot be read, or lacks a column.
    """
    try:
        found = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read: {error}. Training with --log_sample_losses True writes it.") from error
    missing = [name for name in SCHEMA.names if name not in found.column_names]
    if missing:
        raise UserError(f"{path} has no column {', '.join(missing)}: training with --log_sample_losses True writes it.")
    return found.select(SCHEMA.names)
