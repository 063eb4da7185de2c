"""Measure how far logits are from exact ones, so that faults in few rows are noticed and rounding is not reported.

A fault may touch all rows, the rows behind a clip (wrong positions), the rows of one expert, or those of one token (a
row of the embedding). Rounding touches all rows a little, and in a mixture of experts a few rows much, whose tokens it
sends to other experts. So three measures are taken (:func:`measures`): medians by content, which single rows do not
move; the tenth of all rows that is furthest off; and the third row from the top. The further into the tail, the larger
the accepted multiple of the measured effect of rounding. Measured over all tiny checkpoints in bfloat16, whole and with
adapters: medians at most 1.6 times that effect, the tenth 1.9, the third row 5.1; a wrong row of the embedding moves
the third row by 14 times or more, one of the experts of the last layer the tenth by 4.8, positions behind clips wrong
by 1 the medians by 7.9, except in Qwen3.5, where they are as small as rounding and found in float32 only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

CONTENT = ("before any image or clip", "in images", "behind an image", "in clips", "behind a clip")
"""Content of a position: its own token, or the last image or clip before it."""

MEDIAN, TENTH, THIRD = 3.0, 4.0, 12.0
"""Largest accepted multiples of the effect of rounding: of medians, of a tenth of the rows, and of the third row."""

_ROWS = 32  # positions of each content whose logits are compared
_FEWEST = 8  # rows of a content that have a median of their own


class Rows(NamedTuple):
    """Differences of a sample's rows.

    Args:
        content: int64 [n], content of each row.
        error: float32 [n], result of :func:`row_differences` for the compared model.
        noise: float32 [n], the same for the effect of rounding; 0 in float32.
    """

    content: Tensor
    error: Tensor
    noise: Tensor


def content_of(input_ids: Tensor, config: Any) -> Tensor:
    """Return the content of each position, an index into :data:`CONTENT`: int64 [T].

    Args:
        input_ids: int64 [T].
        config: Config of the model, with the ids of its placeholders.
    """
    media = (input_ids == config.image_token_id).long() + 2 * (input_ids == config.video_token_id).long()
    last_seen = (torch.arange(len(media)) * (media > 0)).cummax(0).values
    return (2 * media[last_seen] - (media > 0).long()).clamp(min=0)


def compared_rows(content: Tensor) -> Tensor:
    """Return up to 32 positions of each content, evenly spread over it: int64 [n], in order."""
    chosen = []
    for kind in content.unique():
        own = (content == kind).nonzero()[:, 0]
        chosen.append(own[torch.linspace(0, len(own) - 1, min(_ROWS, len(own))).round().long()])
    return torch.cat(chosen).sort().values


def row_differences(found: Tensor, exact: Tensor) -> Tensor:
    """Return each row's mean absolute difference in standard deviations of all exact logits: float32 [n].

    A row with a value that is not finite is infinitely far off.

    Args:
        found: float32 [n, V].
        exact: float32 [n, V].
    """
    apart = (found - exact).abs().mean(-1) / exact.std().clamp(min=1e-9)
    return torch.where(apart.isfinite(), apart, torch.inf)


def measures(samples: Sequence[Rows]) -> Iterator[dict[str, Any]]:
    """Yield what is compared: ``where``, its ``error``, its ``noise``, and the accepted ``multiple`` of the noise."""
    for sample in samples:
        yield _median("in a sample", sample, torch.ones_like(sample.content, dtype=torch.bool))
        for kind, count in zip(*sample.content.unique(return_counts=True), strict=True):
            if count >= _FEWEST:
                yield _median(CONTENT[int(kind)], sample, sample.content == kind)
    error = torch.cat([sample.error for sample in samples])
    noise = torch.cat([sample.noise.clamp(min=sample.noise.median()) for sample in samples])
    for rank, multiple in ((len(error) // 10, TENTH), (2, THIRD)):
        if 2 <= rank < len(error):
            worst = (error - multiple * noise).argsort(descending=True)[rank]
            where = f"in {rank + 1} of {len(error)} rows"
            yield {"where": where, "error": float(error[worst]), "noise": float(noise[worst]), "multiple": multiple}


def _median(where: str, sample: Rows, chosen: Tensor) -> dict[str, Any]:
    error, noise = float(sample.error[chosen].median()), float(sample.noise[chosen].median())
    return {"where": where, "error": error, "noise": noise, "multiple": MEDIAN}
