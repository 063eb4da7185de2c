"""Evidence about samples: losses of training runs and of a scoring pass, joined by the places of the samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from qwenvl.evaluate.ranking import Evidence, Key, Losses, Views
from qwenvl.inference.other_images import VIEWS, View
from qwenvl.metrics.predictions import Prediction
from qwenvl.train.records.sample_losses import read_sample_losses
from qwenvl.utils.errors import UserError


class _Samples:
    """Numbers samples by their places."""

    def __init__(self) -> None:
        self.numbers: dict[Key, int] = {}
        self.ids: list[str | None] = []

    def number(self, key: Key, name: str | None) -> int:
        if key not in self.numbers:
            self.numbers[key] = len(self.ids)
            self.ids.append(name)
        return self.numbers[key]


def read_evidence(files: Sequence[Path], views: Mapping[View, Sequence[Prediction]] | None) -> Evidence:
    """Return all evidence.

    Args:
        files: Files of ``--log_sample_losses``; each continues the steps of the one before.
        views: Lines of a scoring pass by view; None for none.

    Raises:
        UserError: A file cannot be read, or nothing is left to rank.
    """
    samples = _Samples()
    losses, units = _read_losses(files, samples) if files else (None, {})
    scored = None if views is None else _read_views(views, samples, units)
    if not samples.numbers:
        raise UserError("There is no sample to rank: the files hold no losses, and no sample could be scored.")
    lengths = np.array([units.get(number, 0.0) for number in range(len(samples.ids))])
    return Evidence(list(samples.numbers), samples.ids, lengths, losses, scored)


def _read_losses(files: Sequence[Path], samples: _Samples) -> tuple[Losses, dict[int, float]]:
    """Read losses; the rows of one sample in one step, of a conversation trained as several rows, are added up.

    Returns:
        The losses, and the units of each sample by its number.
    """
    parts, first = list[np.ndarray](), 0
    for file in files:
        table = read_sample_losses(file)
        places = zip(*(table[name].to_pylist() for name in ("dataset", "file", "line", "member")), strict=True)
        numbers = [samples.number(key, name) for key, name in zip(places, table["id"].to_pylist(), strict=True)]
        step = table["step"].to_numpy() + first
        first = int(step.max(initial=first))
        parts.append(np.array([numbers, step, table["loss"].to_numpy(), table["tokens"].to_numpy()], np.float64))
    sample, step, loss, weight = np.concatenate(parts, axis=1)
    pairs, place = np.unique(np.stack([sample, step]), axis=1, return_inverse=True)
    sums = np.bincount(place.ravel(), loss, pairs.shape[1])
    weights = np.bincount(place.ravel(), weight, pairs.shape[1])
    used = weights > 0
    number, step = pairs[:, used].astype(np.int64)
    units = dict(zip(number.tolist(), weights[used].tolist(), strict=True))
    return Losses(number, step, sums[used] / weights[used]), units


def _read_views(views: Mapping[View, Sequence[Prediction]], samples: _Samples, units: dict[int, float]) -> Views:
    found: dict[View, dict[int, float]] = {view: {} for view in VIEWS}
    for view in VIEWS:
        for line in views[view]:
            if line.loss is not None and line.trained_tokens:
                number = samples.number((line.dataset, line.file, line.line, line.member), line.id)
                found[view][number] = line.loss / line.trained_tokens
                units.setdefault(number, line.trained_tokens)
    return Views(*(np.array([found[view].get(one, np.nan) for one in range(len(samples.ids))]) for view in VIEWS))
