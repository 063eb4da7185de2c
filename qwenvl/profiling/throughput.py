"""Measure training between two log lines: rates, shares of padding and waiting, memory, MFU."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qwenvl.data.sample_stats import MEASURES, NOTHING, Measures
from qwenvl.profiling.flops import Flops


def measure_batch(batch: Mapping[str, Any]) -> Measures:
    """Return the summed measures of a batch's samples, without padding; zeros for a batch without a usable sample.

    Args:
        batch: Result of :func:`qwenvl.models.loss.causal_lm.prepare_inputs`, on the host.
    """
    if not batch["num_samples"]:  # a filler batch, for a rank without samples
        return NOTHING
    lengths = batch["cu_seq_lens_q"].diff() if "cu_seq_lens_q" in batch else batch["attention_mask"].sum(1)
    tokens: list[int] = lengths.tolist()  # Python numbers, as squares of int32 overflow
    frames = [(t, h * w) for _, t, h, w in batch.get("media", ())]
    return Measures(
        samples=len(tokens),
        tokens=sum(tokens),
        trained_tokens=len(batch.get("targets", ())),  # rows of the vocabulary projection
        patches=sum(t * patches for t, patches in frames),
        tokens_squared=sum(length**2 for length in tokens),
        patches_squared=sum(t * patches**2 for t, patches in frames),
        rows=len(tokens),
    )


class Throughput:
    """Counts the samples that this rank trains on, and the time that it takes.

    The clock starts with the first request for a batch, and is stopped during evaluation and saving (:meth:`paused`).

    Args:
        flops: Operations of the model's training.
        peak: Peak operations per second of a device; None if not known.
        device: Device of this rank.
        clock: Function that returns seconds since an arbitrary moment.
    """

    def __init__(
        self,
        flops: Flops,
        peak: float | None,
        device: torch.device,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.clock = clock
        self._flops, self._peak, self._device = flops, peak, device
        self.start_over()

    def start_over(self) -> None:
        """Reset all counts, and stop the clock."""
        self._running_since: float | None = None
        self._seconds = 0.0
        self._forget_counts()

    def _forget_counts(self) -> None:
        self._measures, self._positions, self._waited = NOTHING, 0, 0.0
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def run(self) -> None:
        """Start the clock, if it is not running."""
        if self._running_since is None:
            self._running_since = self.clock()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the time inside of the context; training work queued on the device before still counts."""
        running = self._running_since is not None
        if running and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # a GPU works asynchronously
        self._read_clock()
        self._running_since = None
        try:
            yield
        finally:
            if running:
                self.run()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time inside of the context as waiting for data, too."""
        start = self.clock()
        try:
            yield
        finally:
            self._waited += self.clock() - start

    def count(self, batch: Mapping[str, Any]) -> None:
        """Count a micro-batch of training."""
        self._measures = self._measures.plus(measure_batch(batch))
        self._positions += batch["input_ids"].numel()

    def take(self, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return the figures since the last call, over all ranks, and reset them; every rank must call it.

        Args:
            gather: Function that gathers a tensor [1, n] of each rank to [ranks, n].

        Returns:
            Figures by their names in the log; ``peak_memory_gib`` not on the CPU, ``mfu`` only if the device's peak is
            known, and ``data_wait_share_max`` only with several ranks.
        """
        self._read_clock()
        memory = torch.cuda.max_memory_allocated(self._device) if self._device.type == "cuda" else 0
        dtype = torch.float32 if self._device.type == "mps" else torch.float64
        own = (*self._measures, self._positions, self._waited, memory, self._seconds)
        rows = gather(torch.tensor([own], dtype=dtype, device=self._device)).cpu().numpy()
        self._seconds = 0.0
        self._forget_counts()
        return {name: float(f"{value:.5g}") for name, value in self._figures(rows).items()}

    def _read_clock(self) -> None:
        if self._running_since is not None:
            now = self.clock()
            self._seconds += now - self._running_since
            self._running_since = now

    def _figures(self, rows: np.ndarray) -> dict[str, float]:
        *counts, positions, _, _, _ = (float(total) for total in rows.sum(0))
        waited, memory, seconds = rows[:, -3], float(rows[:, -2].max()), np.maximum(rows[:, -1], 1e-9)
        slowest, ranks = float(seconds.max()), len(rows)
        measures = Measures(*(int(total) for total in counts))
        rates = {
            "tokens_per_second": measures.tokens / slowest,
            "trained_tokens_per_second": measures.trained_tokens / slowest,
            "samples_per_second": measures.samples / slowest,
        }
        figures = {
            **rates,
            **{f"{name}_per_device": rate / ranks for name, rate in rates.items() if "tokens" in name},
            "padding_share": 1 - measures.tokens / positions if positions else 0.0,
            "data_wait_share": float((waited / seconds).mean()),
        }
        if ranks > 1:
            figures["data_wait_share_max"] = float((waited / seconds).max())
        if self._device.type == "cuda":
            figures["peak_memory_gib"] = memory / 2**30
        if self._peak is not None:
            figures |= self._utilization(measures, slowest * ranks * self._peak)
        return figures

    def _utilization(self, measures: Measures, possible: float) -> dict[str, float]:
        """Return the needed share of the possible operations: in total, of the tower and of the language model."""
        vision, language = (float(part) / possible for part in self._flops.split(np.array(measures, MEASURES)))
        return {"mfu": vision + language, "mfu_vision": vision, "mfu_language": language}
