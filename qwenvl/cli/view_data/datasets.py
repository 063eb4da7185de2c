"""The page of datasets: samples used and left out, lengths, media statistics and packs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any
from urllib.parse import quote

import numpy as np

from qwenvl.cli.view_data.charts import histogram, legend, pack_bars, shares
from qwenvl.cli.view_data.rows import MediaStatistics
from qwenvl.data.bin_packing import lower_bound
from qwenvl.data.dataset import ConversationDataset
from qwenvl.data.encoding.encoded import Event
from qwenvl.data.packing.lengths import RowLengths
from qwenvl.data.packing.plan import PackPlan
from qwenvl.report.html import table

SHOWN_PACKS = 60
LISTED = 500


def usage(rows: ConversationDataset, measures: np.ndarray) -> Iterator[str]:
    """Yield a table and bars of what each dataset contributes after ``%`` sampling.

    Args:
        rows: Rows of the run.
        measures: Measures of these rows.
    """
    tables, _ = rows.locate_all()
    names = names_of(rows)
    cells, used, tokens = list[list[str]](), list[float](), list[float]()
    for number, one in enumerate(rows.tables):
        own = measures[tables == number]
        used.append(float(own["samples"].sum()))
        tokens.append(float(own["tokens"].sum()))
        counts = (len(one.table), len(one.rows), *(int(own[name].sum()) for name in ("samples", "tokens")))
        percent = f"{one.table.spec.sampling_percent:g}%"
        trained = int(own["trained_tokens"].sum())
        cells.append([names[number], percent, *(f"{count:,}" for count in (*counts, trained))])
    head = ("Dataset", "Taken", "Rows in files", "Rows used", "Samples trained on", "Tokens", "Trained tokens")
    yield (
        f'<section class="panel"><h2>What is used</h2>{table(head, cells)}{legend(names)}'
        f"{shares('samples', names, used)}{shares('tokens', names, tokens)}"
        '<p class="note">Exact, from all rows after % sampling.</p></section>'
    )


def names_of(rows: ConversationDataset) -> list[str]:
    """Return the names of the datasets."""
    return [one.table.spec.name for one in rows.tables]


def distributions(
    rows: ConversationDataset, measures: np.ndarray, media: Mapping[str, MediaStatistics]
) -> Iterator[str]:
    """Yield the histograms of every dataset.

    Args:
        rows: Rows of the run.
        measures: Measures of these rows; the lengths are exact.
        media: Media statistics of some of the rows, by dataset.
    """
    tables, _ = rows.locate_all()
    for number, name in enumerate(names_of(rows)):
        own = measures[(tables == number) & (measures["samples"] > 0)]
        found = media.get(name, MediaStatistics())
        figures = (
            histogram("Tokens", own["tokens"], "tokens"),
            histogram("Trained tokens", own["trained_tokens"], "tokens"),
            histogram("Images per sample", found.images, "images"),
            histogram("Resolution after resizing", found.pixels, "pixels"),
            histogram("Turns", found.turns, "turns"),
            histogram("Length of videos", found.seconds, "s"),
        )
        yield (
            f'<section><h2>{escape(name)} <a class="more" href="index.html#dataset={quote(name)}">samples</a></h2>'
            f'<div class="figures">{"".join(figures)}</div><p class="note">Tokens: exact, from all {len(own):,} rows '
            f"used. Images, resolution, turns and videos: from {found.samples:,} samples drawn at random.</p></section>"
        )


def left_out(lengths: RowLengths) -> Iterator[str]:
    """Yield the samples that training leaves out: counts by reason, and a list with reasons."""
    events = [event for event in lengths.events if event.record]
    if not events:
        yield '<section class="panel"><h2>Left out</h2><p class="note">Nothing.</p></section>'
        return
    counts = Counter((event.dataset, str(event.record["category"])) for event in events)
    rows = [(dataset, category, f"{count:,}") for (dataset, category), count in sorted(counts.items())]
    listed = [_line(event) for event in events[:LISTED]]
    more = f'<p class="note">And {len(events) - LISTED:,} more.</p>' if len(events) > LISTED else ""
    yield (
        f'<section class="panel"><h2>Left out</h2><div class="reason-counts">'
        f"{table(('Dataset', 'Reason', 'Samples'), rows)}</div><details><summary>"
        f'All of them</summary><div class="reasons">'
        f"{table(('Dataset', 'Place', 'Id', 'Reason'), listed)}</div>{more}</details></section>"
    )


def _line(event: Event) -> tuple[str, str, str, str]:
    record: dict[str, Any] = event.record
    return event.dataset, f"{record['file']}:{record['line']}", str(record["id"] or ""), str(record["reason"])


def packs(rows: ConversationDataset, plan: PackPlan) -> Iterator[str]:
    """Yield packs as bars, and statistics of their fill.

    Args:
        rows: Rows of the run, not packed.
        plan: Packing plan of these rows.
    """
    capacity = rows.encoder.max_length
    tokens = plan.measures["tokens"]
    if not len(plan.packs):
        return
    tables, _ = rows.locate_all()
    names = names_of(rows)
    shown = np.unique(np.linspace(0, len(plan.packs) - 1, min(SHOWN_PACKS, len(plan.packs))).round().astype(np.int64))
    members: Sequence[Sequence[tuple[int, int]]] = [
        [(int(tables[one]), int(tokens[one])) for one in plan.packs[pack].tolist()] for pack in shown.tolist()
    ]
    of_packs = plan.packs.add_up(tokens)
    fill = float(of_packs.sum()) / (capacity * len(plan.packs))
    yield (
        f'<section class="panel"><h2>Packs</h2><p>{len(plan.packs):,} packs of up to {capacity:,} tokens, '
        f"{fill:.2%} full; fewer than {lower_bound(tokens, capacity):,} are not possible.</p>{legend(names)}"
        f"{pack_bars(members, capacity, names)}"
        f'<p class="note">{len(shown):,} of them, evenly spread; each is a bar of its samples.</p></section>'
        f'<section class="after"><div class="figures">{histogram("Fill of packs", of_packs / capacity * 100, "%")}'
        f"{histogram('Samples per pack', plan.packs.add_up(plan.measures['samples']), 'samples')}</div></section>"
    )
