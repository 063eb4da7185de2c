"""Speed of training: tokens and samples a second over all ranks, since the last log line."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from qwenvl.data.tokenization import IGNORE_INDEX


class Throughput:
    """Counts what this rank has trained on between two log lines."""

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self._start = time.perf_counter()
        self._tokens = self._trained = self._samples = 0

    def count(self, batch: Mapping[str, Any]) -> None:
        """Count a micro-batch; padding does not count."""
        mask = batch.get("attention_mask")
        self._tokens += int(mask.sum()) if mask is not None else batch["input_ids"].numel()
        self._trained += int((batch["labels"] != IGNORE_INDEX).sum())
        self._samples += len(batch["cu_seq_lens_q"]) - 1 if "cu_seq_lens_q" in batch else len(batch["input_ids"])

    def counts(self, device: torch.device) -> torch.Tensor:
        """Return float64 [3]: tokens, trained tokens and samples of this rank, for summing over ranks."""
        dtype = torch.float32 if device.type == "mps" else torch.float64
        return torch.tensor([self._tokens, self._trained, self._samples], dtype=dtype, device=device)

    def rates(self, totals: torch.Tensor) -> dict[str, float]:
        """Turn the counts of all ranks into rates, and start anew.

        Args:
            totals: :meth:`counts`, summed over ranks.

        Returns:
            ``tokens_per_second``, ``trained_tokens_per_second`` and ``samples_per_second`` of the whole run.
        """
        seconds = max(time.perf_counter() - self._start, 1e-9)
        names = ("tokens_per_second", "trained_tokens_per_second", "samples_per_second")
        self._restart()
        return {name: round(float(value) / seconds, 2) for name, value in zip(names, totals.tolist(), strict=True)}
