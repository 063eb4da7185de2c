"""The dataset that DataLoader workers read: rows of registered annotation files to encoded samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from torch.utils.data import Dataset

from qwenvl.data.bin_packing import Packs
from qwenvl.data.encoding.encoded import Event, Item
from qwenvl.data.encoding.encoder import OverlengthError, SampleEncoder
from qwenvl.data.sample_stats import NOTHING, Measures
from qwenvl.data.sampler import FILLER, sample_rows, split_rows
from qwenvl.data.sources.table import AnnotationTable, open_annotations
from qwenvl.data.types import DatasetSpec, Sample
from qwenvl.utils.cache import array_hash, fingerprint
from qwenvl.utils.errors import SampleError, UserError


@dataclass(frozen=True)
class SampledTable:
    """An annotation table and the rows of it that a run uses.

    Args:
        table: The annotations.
        rows: int64 [n], numbers of the rows, in order; a row may be used more than once.
    """

    table: AnnotationTable
    rows: np.ndarray


def open_tables(specs: Sequence[DatasetSpec], seed: int, cache_dir: str | None = None) -> list[SampledTable]:
    """Open the datasets of a run and sample their rows.

    Args:
        specs: Datasets that ``--dataset_use`` names.
        seed: Seed of the choice of rows for ``name%X``.
        cache_dir: Folder for the indexes of annotation files; None for the default one.
    """
    tables = []
    for spec in specs:
        table = open_annotations(spec, cache_dir)
        tables.append(SampledTable(table, sample_rows(len(table), spec.sampling_percent, spec.name, seed)))
    return tables


def split_tables(
    tables: Sequence[SampledTable], ratio: float, seed: int
) -> tuple[list[SampledTable], list[SampledTable]]:
    """Split every table's rows into (training, evaluation) by ``ratio``; a row is never on both sides.

    Raises:
        UserError: a dataset has a single row.
    """
    train, evaluation = [], []
    for table in tables:
        unique = np.unique(table.rows)
        if len(unique) < 2:
            raise UserError(
                f"--eval_ratio cannot split dataset {table.table.spec.name!r}, of which one row is used. Use "
                "--eval_dataset_use instead."
            )
        _, held_out = split_rows(len(unique), ratio, seed)
        is_held_out = np.isin(table.rows, unique[held_out])
        train.append(replace(table, rows=table.rows[~is_held_out]))
        evaluation.append(replace(table, rows=unique[held_out]))
    return train, evaluation


@dataclass(frozen=True, slots=True)
class Measurement:
    """What is known of a row before its media are decoded.

    Args:
        measures: Measures of its usable samples, summed.
        whole: Measures of all its samples, however long they are; None where one has another problem.
        events: Events to report.
        error: Problem that must stop the run.
    """

    measures: Measures = NOTHING
    whole: Measures | None = None
    events: tuple[Event, ...] = ()
    error: UserError | None = None


class ConversationDataset(Dataset[Item]):
    """Rows of several datasets behind one index, or packs of such rows.

    Args:
        tables: The datasets.
        encoder: Encoder from records to model inputs.
        skip_bad_samples: Whether bad samples are left out and reported (``--on_bad_sample skip``), or stop the run.
        packs: Rows of each index; None where every row is an index of its own.
    """

    def __init__(
        self,
        tables: Sequence[SampledTable],
        encoder: SampleEncoder,
        skip_bad_samples: bool = False,
        packs: Packs | None = None,
    ) -> None:
        self.tables = list(tables)
        self.encoder = encoder
        self.skips_bad_samples = skip_bad_samples
        self._packs = packs
        self._borders = np.cumsum([len(table.rows) for table in self.tables])

    def __len__(self) -> int:
        return int(self._borders[-1]) if self._packs is None else len(self._packs)

    def packed(self, packs: Packs) -> ConversationDataset:
        """Return packs of these rows: each pack is one index.

        Args:
            packs: Packs of the indices of this dataset, which has no packs itself.
        """
        return ConversationDataset(self.tables, self.encoder, self.skips_bad_samples, packs)

    def add_up(self, measures: np.ndarray) -> np.ndarray:
        """Return the measures of every index: sums over the rows of each pack, or those of the rows themselves.

        Args:
            measures: :data:`~qwenvl.data.sample_stats.MEASURES` of every row.
        """
        return measures if self._packs is None else self._packs.add_up(measures)

    @cached_property
    def content(self) -> dict[str, str | None]:
        """Hashes of the content of the indices.

        ``rows``: the content of the annotation files, and which of their rows are used. ``packs``: which of these rows
        make each pack; None where every row is an index of its own.
        """
        rows = [(table.table.fingerprint, array_hash(table.rows)) for table in self.tables]
        packs = None if self._packs is None else array_hash(self._packs.samples, self._packs.borders)
        return {"rows": fingerprint(*rows), "packs": packs}

    def samples(self, index: int) -> tuple[Sample, ...]:
        """Return the annotation record(s) at an index: several where it is a pack, or the row itself is packed.

        Raises:
            SampleError: a row cannot be read.
        """
        if self._packs is None:
            return self._row(index)
        return tuple(sample for row in self._packs[index].tolist() for sample in self._row(row))

    def locate(self, index: int) -> tuple[int, int]:
        """Return the number of the table in :attr:`tables` of an index, without packs, and its row in that table."""
        number = int(np.searchsorted(self._borders, index, side="right"))
        first = int(self._borders[number - 1]) if number else 0
        return number, int(self.tables[number].rows[index - first])

    def locate_all(self) -> tuple[np.ndarray, np.ndarray]:
        """Return :meth:`locate` of every row: int64 [rows] each."""
        tables = np.repeat(np.arange(len(self.tables)), [len(table.rows) for table in self.tables])
        return tables, np.concatenate([table.rows for table in self.tables])

    def _row(self, index: int) -> tuple[Sample, ...]:
        number, row = self.locate(index)
        return self.tables[number].table[row]

    def __getitem__(self, index: int) -> Item:
        """Return the encoded row; nothing for :data:`~qwenvl.data.sampler.FILLER`. Never raises a UserError.

        A DataLoader would wrap what its workers raise into a text with their traceback.
        """
        if index == FILLER:
            return Item()
        item = Item()
        try:
            for sample in self.samples(index):
                item = self._add(item, sample)
        except SampleError as error:  # of the row itself
            return self._leave_out(error)
        except UserError as error:  # of the run, such as a video without anything that decodes videos
            return Item(error=error)
        return item

    def measure(self, table: int, row: int, known: Measures | None = None) -> Measurement:
        """Measure a row without decoding anything. Never raises a UserError, as ``[index]``.

        Args:
            table: Number of the table in :attr:`tables`.
            row: Row of its annotations.
            known: ``whole`` of an earlier measurement, so that a single sample need not be counted again.
        """
        used = whole = NOTHING
        usable, events = True, list[Event]()
        try:
            samples = self.tables[table].table[row]
            for sample in samples:
                try:
                    if known is None or len(samples) > 1:
                        counted = self.encoder.measure(sample)
                    else:
                        counted = known
                    whole = whole.plus(counted)
                    self.encoder.require_length(counted.tokens, sample, used.tokens)
                    used = used.plus(counted)
                except SampleError as error:
                    out = self._leave_out(error)
                    if out.error is not None:
                        return Measurement(error=out.error)
                    usable = usable and isinstance(error, OverlengthError)
                    events += out.events
        except SampleError as error:  # of the row itself
            out = self._leave_out(error)
            return Measurement(events=out.events, error=out.error)
        except UserError as error:
            return Measurement(error=error)
        return Measurement(used, whole if usable else None, tuple(events))

    def require_usable_sample(self, purpose: str = "training") -> None:
        """Find, without decoding, a first sample that can be trained on.

        Args:
            purpose: Purpose of the rows, for the message.

        Raises:
            UserError: a sample before it must stop the run, or there is none.
        """
        first: SampleError | None = None
        for index in range(len(self)):
            problem = self._problem(index)
            if problem is None:
                return
            error = self._leave_out(problem).error
            if error is not None:
                raise error
            first = first or problem
        raise UserError(f"None of the {len(self)} {purpose} rows can be used. The first one: {first}")

    def _problem(self, index: int) -> SampleError | None:
        """Return what is wrong with a row; None if one of its samples can be used."""
        problem: SampleError | None = None
        try:
            for sample in self.samples(index):
                try:
                    self.encoder.plans(sample)
                    return None
                except SampleError as error:
                    problem = problem or error
        except SampleError as error:
            problem = error
        return problem

    def _add(self, item: Item, sample: Sample) -> Item:
        """Encode one member of a row, and add it to the item, or the problem with it."""
        used = sum(len(one.tokens) for one in item.samples)
        try:
            reader = self.encoder.reader(sample, keep_images=True)
            plans = self.encoder.plans(sample, reader)
            self.encoder.require_length(sum(len(plan.tokens) for plan in plans), sample, used)
            encoded = self.encoder.encode(plans, sample, reader)
        except SampleError as error:
            out = self._leave_out(error)
            return Item(item.samples, (*item.events, *out.events), item.error or out.error)
        return Item((*item.samples, *encoded), (*item.events, *plans[0].events), item.error)

    def _leave_out(self, error: SampleError) -> Item:
        overlength = isinstance(error, OverlengthError)
        fatal = error.fatal if isinstance(error, OverlengthError) else not self.skips_bad_samples
        if fatal:
            hint = f"({'--overlength drop' if overlength else '--on_bad_sample skip'} leaves such samples out.)"
            return Item(error=SampleError(error.category, f"{error.reason} {hint}", error.origin))
        origin = error.origin
        assert origin is not None, error
        record = origin.record(error.category, error.reason)
        return Item(events=(Event("overlength" if overlength else "bad", origin.dataset, str(error), record),))
