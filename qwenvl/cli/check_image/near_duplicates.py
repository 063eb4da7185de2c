"""``--duplicates``: samples that nearly repeat others, and training samples that evaluation shows, as problems."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qwenvl.cli.check_image.tables import Problem
from qwenvl.data.dataset import SampledTable
from qwenvl.data.duplicates.contents import read_contents
from qwenvl.data.duplicates.find import Place, find_matches
from qwenvl.data.sources.table import AnnotationTable
from qwenvl.utils.errors import Origin


def find_near_duplicates(
    tables: Sequence[AnnotationTable],
    evaluation: Sequence[AnnotationTable],
    reserved_tokens: Sequence[str],
    allow_remote: bool,
    cache: Path,
    workers: int,
) -> dict[int, list[Problem]]:
    """Return the problems of each table by its number, in the order of its rows.

    Args:
        tables: Datasets that are checked, all of their rows.
        evaluation: Evaluation datasets, all of their rows.
        reserved_tokens: Strings that no text of a usable sample contains.
        allow_remote: Media may be fetched by http(s).
        cache: Cache folder.
        workers: Number of processes.
    """
    used = [SampledTable(table, np.arange(len(table))) for table in (*tables, *evaluation)]
    contents = [read_contents(table, reserved_tokens, allow_remote, cache, workers) for table in used]
    problems = defaultdict[int, list[Problem]](list)
    for match in find_matches(contents[: len(tables)], contents[len(tables) :]):
        origin, other = (_origin(used, place) for place in (match.sample, match.other))
        found = Problem(match.sample.row, match.sample.member, origin, match.category, match.reason(other))
        problems[match.sample.table].append(found)
    return {table: sorted(found, key=lambda one: (one.row, one.member)) for table, found in problems.items()}


def _origin(tables: Sequence[SampledTable], place: Place) -> Origin:
    return tables[place.table].table[place.row][place.member].origin
