"""Warnings of ``--dry_run`` about samples that nearly repeat others, and about evaluation data that is trained on."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from qwenvl.data.dataset import SampledTable
from qwenvl.data.duplicates.contents import read_contents
from qwenvl.data.duplicates.find import Match, find_matches
from qwenvl.data.encoding.encoder import SampleEncoder
from qwenvl.utils.cores import available_cores

logger = logging.getLogger(__name__)

_MOST_ROWS = 20_000
"""Most rows that are compared, in about half a minute; the tool compares any number."""
_TOOL = "tools/check_image.py --duplicates --dataset_use NAMES --eval_dataset_use NAMES"


def warn_of_duplicates(
    train: Sequence[SampledTable], evaluation: Sequence[SampledTable], encoder: SampleEncoder, cache: Path
) -> None:
    """Compare the rows of a run with each other, and warn about what repeats; say so where there are too many rows.

    Args:
        train: Training datasets.
        evaluation: Evaluation datasets.
        encoder: Encoder of the run.
        cache: Cache folder, which keeps the hashes of images.
    """
    tables = [*train, *evaluation]
    rows = sum(len(np.unique(table.rows)) for table in tables)
    if rows > _MOST_ROWS:
        logger.info("Near duplicates were not looked for in %s rows: %s does it once.", f"{rows:,}", _TOOL)
        return
    reserved = tuple(encoder.reserved_tokens)
    contents = [read_contents(table, reserved, encoder.allow_remote, cache, available_cores()) for table in tables]
    for warning in _describe(tables, find_matches(contents[: len(train)], contents[len(train) :])):
        logger.warning("%s", warning)


def _describe(tables: Sequence[SampledTable], matches: Sequence[Match]) -> Iterator[str]:
    for leak, what in (
        (False, "nearly repeat an earlier one"),
        (True, "show what the evaluation data show"),
    ):
        found = [match for match in matches if match.leak == leak]
        if found:
            first, other = (
                tables[place.table].table[place.row][place.member].origin for place in (found[0].sample, found[0].other)
            )
            reason = f"The first, {first}: {found[0].reason(other)}"
            yield f"Training samples that {what}: {len(found):,}. {reason} {_TOOL} lists all."
