"""The results of the experiments as one page: tables, losses, scores by image shown, and some answers."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from qwenvl.cli.connector_lab.format import COLUMNS, cells, trained_parts, verdict
from qwenvl.cli.connector_lab.runner import Result, collapse_of
from qwenvl.report.chart import Chart, Line, draw
from qwenvl.report.html import build_page, table
from qwenvl.report.images import image_tag

TITLE = "Does the image reach the language model?"

_LEAD = (
    "Each run combines a vision encoder, a connector and a language model, trains the parts that it names, and answers "
    "held-out questions: with their own images, with those of other samples, and with blank ones. If the right image "
    "does not help, the image does not reach the language model, whatever the loss says."
)
_NOTE = (
    "tokens: tokens of the first held-out image. trained: trainable parameters of the stage that has the most. loss by "
    "epoch: held-out loss in nats per trained token, for each stage on its own data. right: score with the own image, "
    "with a 95% bootstrap interval. empty: answers that end before their first word. looks: yes if the interval of the "
    "difference between the right and the swapped image excludes zero."
)
_VIEWS = (("shown", "own image"), ("swapped", "another's"), ("blank", "blank"))
_WIDTH, _LEFT, _ROW, _BAR = 400, 118, 50, 13


def build_lab_page(results: Sequence[Result]) -> str:
    """Return the HTML page.

    Args:
        results: Results of the shown runs, from :func:`qwenvl.cli.connector_lab.runner.run_experiment`.
    """
    collapsed = [result for result in results if collapse_of(result["answers"])]
    warnings = "".join(
        f'<p class="says wrong"><strong class="verdict">{escape(result["name"])}: '
        f"{escape(collapse_of(result['answers']))}.</strong></p>"
        for result in collapsed
    )
    groups = [
        _group(name, [result for result in results if result["group"] == name])
        for name in dict.fromkeys(result["group"] for result in results)
    ]
    return build_page(
        TITLE, f"<p>{_LEAD}</p>", warnings, *groups, f'<p class="note rest">{_NOTE}</p>', _answers(results)
    )


def _group(name: str, results: Sequence[Result]) -> str:
    told = "".join(
        f"<p><strong>{escape(result['name'])}</strong>: {escape(result['about'])}. Trains: "
        f'{escape(trained_parts(result))}. <span class="note">{escape(verdict(result))}</span></p>'
        for result in results
    )
    return (
        f'<section><h2>{escape(name)}</h2><div class="panel">{table(COLUMNS, [cells(one) for one in results])}</div>'
        f'<div class="top rest"><div class="panel"><h2>Right answers by image shown</h2>{draw_bars(results)}</div>'
        f'<div class="panel"><h2>Held-out loss</h2><p class="note">nats per trained token, after each epoch</p>'
        f"{draw(_losses(results))}</div></div>"
        f'<details class="rest"><summary>What each run says</summary>{told}</details></section>'
    )


def _losses(results: Sequence[Result]) -> Chart:
    """Return the losses of the runs; the stages of a run follow each other."""
    return Chart("Held-out loss", tuple(Line(one["name"], tuple(_points(one["stages"]))) for one in results), log=True)


def _points(stages: Sequence[dict[str, Any]]) -> list[tuple[float, float]]:
    points: list[tuple[float, float]] = []
    for stage in stages:
        before = points[-1][0] if points else 0.0
        points += [(before + step, loss) for step, _, loss in stage["held_out"]]
    return points


def draw_bars(results: Sequence[Result]) -> str:
    """Return a bar chart of the scores of each run with each kind of image, with their intervals."""
    rows = [(one["name"], one["blind"][0]["scores"]) for one in results if one["blind"] and one["blind"][0]["count"]]
    if not rows:
        return '<p class="note">No run could be compared.</p>'
    height = _ROW * len(rows) + 26
    marks = "".join(
        f'<li><svg class="mark" viewBox="0 0 28 8" aria-hidden="true"><rect class="bar b{place}" width="28" '
        f'height="8"/></svg>{name}</li>'
        for place, (_, name) in enumerate(_VIEWS)
    )
    drawn = _grid(height) + "".join(_bars(name, scores, _ROW * place) for place, (name, scores) in enumerate(rows))
    said = "; ".join(
        f"{name}: " + ", ".join(f"{label} {scores[view]['value']:.0%}" for view, label in _VIEWS)
        for name, scores in rows
    )
    return (
        f'<ul class="legend">{marks}</ul><svg class="chart" viewBox="0 0 {_WIDTH} {height}" role="img" '
        f'aria-label="{escape(said)}">{drawn}</svg>'
    )


def _x(share: float) -> float:
    return _LEFT + (_WIDTH - _LEFT - 46) * share


def _grid(height: int) -> str:
    return "".join(
        f'<line class="grid" x1="{_x(share):.1f}" x2="{_x(share):.1f}" y1="0" y2="{height - 22}"/>'
        f'<text x="{_x(share):.1f}" y="{height - 6}" text-anchor="middle">{share:.0%}</text>'
        for share in (0.0, 0.25, 0.5, 0.75, 1.0)
    )


def _bars(name: str, scores: dict[str, dict[str, float]], top: int) -> str:
    parts = [f'<text x="{_LEFT - 10}" y="{top + 27}" text-anchor="end">{escape(_cut(name))}</text>']
    for place, (view, label) in enumerate(_VIEWS):
        score, y = scores[view], top + 3 + place * (_BAR + 1)
        parts.append(
            f'<rect class="bar b{place}" x="{_x(0):.1f}" y="{y}" width="{max(1.5, _x(score["value"]) - _x(0)):.1f}" '
            f'height="{_BAR}"><title>{escape(name)}, {label}: {score["value"]:.1%} ({score["low"]:.1%} to '
            f"{score['high']:.1%})</title></rect>"
        )
        middle = y + _BAR / 2
        parts.append(
            f'<line class="whisker" x1="{_x(score["low"]):.1f}" x2="{_x(score["high"]):.1f}" y1="{middle}" '
            f'y2="{middle}"/><text x="{_x(score["high"]) + 5:.1f}" y="{middle + 4}">{score["value"]:.0%}</text>'
        )
    return "".join(parts)


def _cut(name: str) -> str:
    return name if len(name) <= 16 else f"{name[:15]}…"


def _answers(results: Sequence[Result]) -> str:
    """Return the first held-out samples with the answers of each run."""
    if not results or not results[0]["examples"]:
        return ""
    cards = "".join(_card(results, place) for place in range(len(results[0]["examples"])))
    title = "Answers of each run to the same images"
    return f'<section><h2>{title}</h2><div class="cards wide digits">{cards}</div></section>'


def _card(results: Sequence[Result], place: int) -> str:
    sample = results[0]["examples"][place]
    alike = [(one["name"], one["examples"][place]) for one in results if _is_same(one["examples"], place, sample)]
    listed = "".join(
        f"<dt>{escape(name)}</dt><dd>{escape(answer['shown'] or '') or '(nothing)'}</dd>" for name, answer in alike
    )
    return (
        f'<div class="card"><div class="media">{"".join(_image(path) for _, path in sample["media"])}</div>'
        f'<p class="question">{escape(sample["question"].strip())}</p><dl><dt>expected</dt>'
        f"<dd>{escape(sample['expected'])}</dd>{listed}</dl></div>"
    )


def _is_same(examples: Sequence[dict[str, Any]], place: int, sample: dict[str, Any]) -> bool:
    return place < len(examples) and examples[place]["media"] == sample["media"]


def _image(path: str) -> str:
    if not Path(path).is_file():
        return f'<p class="missing">{escape(Path(path).name)} no longer exists</p>'
    with Image.open(path) as image:
        return image_tag(image, "image")
