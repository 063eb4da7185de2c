"""The evaluation as one self-contained HTML page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from qwenvl.data.conversation.media_items import image_item, video_item
from qwenvl.data.media.reader import MediaReader
from qwenvl.evaluate.image_ablation import ImageAblation
from qwenvl.evaluate.scoring import Scores
from qwenvl.inference.other_images import VIEWS, Key, View, key_of
from qwenvl.metrics.base import Scored
from qwenvl.metrics.bootstrap import Interval
from qwenvl.metrics.boxes import read_boxes
from qwenvl.metrics.predictions import EMBEDDED, Prediction
from qwenvl.metrics.text import final_answer
from qwenvl.report.html import build_page, shorten, table
from qwenvl.report.images import image_tag, video_frames, with_boxes
from qwenvl.utils.errors import SampleError

LONGEST_TEXT = 600
"""Most characters shown of a question or answer."""

LISTED = 50
"""Most listed samples that could not be asked."""

VIEW_NAMES: Mapping[View, str] = {"shown": "its own", "blank": "blank", "swapped": "another sample's"}

OtherAnswers = Mapping[View, Mapping[Key, Prediction]]


def build_evaluation_page(
    title: str, scores: Sequence[Scores], ablation: Sequence[ImageAblation], others: OtherAnswers, worst: int
) -> str:
    """Return the HTML page.

    Args:
        title: Title of the page.
        scores: Scores of the datasets.
        ablation: Results of the blind test, by dataset; empty without ``--blind``.
        others: Answers to blank and swapped images, by sample.
        worst: Number of samples shown of each dataset, from the lowest score up.
    """
    asked, not_asked = sum(len(one.lines) for one in scores), [line for one in scores for line in one.not_asked]
    lead = (
        f"{_samples(asked)} of {len({one.dataset for one in scores})} dataset(s). {len(not_asked):,} could not be "
        f"asked. The lowest scores of each dataset are shown, at most {worst}."
    )
    note = (
        "95% CI: percentiles of 1,000 bootstrap resamples of the samples. Unreadable answers do not have the format "
        "that the metric expects, and count as wrong."
    )
    return build_page(
        title,
        f"<p>{lead}</p>",
        f'<section class="panel"><h2>Scores</h2>{_score_table(scores)}<p class="note">{note}</p></section>',
        _ablation(ablation) if ablation else "",
        *(_group(one, others, worst) for one in scores),
        _not_asked(not_asked) if not_asked else "",
    )


def _samples(count: int) -> str:
    return f"{count:,} sample{'s' * (count != 1)}"


def _score_table(scores: Sequence[Scores]) -> str:
    names = ("Dataset", "Score", "95% CI", "Samples", "Metric", "Unreadable", "Cut", "Not asked")
    rows = [
        (
            one.dataset,
            *percent(one.interval()),
            f"{len(one.lines):,}",
            one.metric.title,
            f"{one.unreadable:,}",
            number(one.cut),
            f"{len(one.not_asked):,}",
        )
        for one in scores
    ]
    return table(names, rows)


def number(count: int | None) -> str:
    """Return a number of answers, or a dash if it is unknown."""
    return "-" if count is None else f"{count:,}"


def percent(interval: Interval | None) -> tuple[str, str]:
    """Return a score and its interval in per cent."""
    if interval is None:
        return "-", "-"
    return f"{interval.value:.1%}", f"{interval.low:.1%} to {interval.high:.1%}"


def _ablation(groups: Sequence[ImageAblation]) -> str:
    text = "".join(
        f'<p class="says"><strong>{escape(one.name)}.</strong> {escape(one.verdict)}</p>{_view_table(one)}'
        for one in groups
    )
    note = (
        "The same questions with other pixels of the same size, so that tokens and positions are the same: mid grey, "
        "or the media of another sample, resized. Differences are relative to the sample's own image, paired by sample."
    )
    return (
        f'<section class="panel looks"><h2>Does the model look?</h2>{text}<p class="note">{escape(note)}</p></section>'
    )


def _view_table(one: ImageAblation) -> str:
    if not one.count:
        return ""
    names = ("Image", one.metric.title, "Difference", "95% CI", "Loss", "Difference", "95% CI")
    rows = []
    for view in VIEWS:
        fall, rise = one.score_falls.get(view), one.loss_rises.get(view)
        rows.append(
            (
                VIEW_NAMES[view],
                f"{one.scores[view].value:.1%}",
                *_change(fall),
                f"{one.losses[view].value:.3f}",
                *(("", "") if rise is None else (f"{rise.value:+.3f}", f"{rise.low:.3f} to {rise.high:.3f}")),
            )
        )
    return table(names, rows) + f'<p class="note">{_samples(one.count)} compared, {one.left_out:,} left out.</p>'


def _change(fall: Interval | None) -> tuple[str, str]:
    """Return the change of a score in points and its interval; empty texts for the sample's own image."""
    if fall is None:
        return "", ""
    low, high = sorted((-100 * fall.low, -100 * fall.high))
    return f"{-100 * fall.value:+.1f}", f"{low:.1f} to {high:.1f}"


def _group(scores: Scores, others: OtherAnswers, worst: int) -> str:
    pairs = scores.worst(worst)
    if not pairs:
        text = '<p class="note">Every answer is right.</p>' if scores.lines else '<p class="note">None was asked.</p>'
        return f"<section><h2>{escape(scores.dataset)}</h2>{text}</section>"
    key = ""
    if any(line.canvas for line, _ in pairs):
        key = '<p class="note"><span class="key dashed"></span> expected, <span class="key"></span> the model\'s.</p>'
    cards = "".join(_card(line, scored, others) for line, scored in pairs)
    return f'<section><h2>{escape(scores.dataset)}</h2>{key}<div class="cards wide">{cards}</div></section>'


def _card(line: Prediction, scored: Scored, others: OtherAnswers) -> str:
    answers = [("expected", line.expected), ("answer", line.prediction or "")]
    answers += [
        (f"{view}", lines[key_of(line)].prediction or "")
        for view, lines in others.items()
        if key_of(line) in lines and lines[key_of(line)].prediction is not None
    ]
    listed = "".join(
        f"<dt>{name}</dt><dd>{escape(shorten(text, LONGEST_TEXT)) or '(nothing)'}</dd>" for name, text in answers
    )
    label = f"#{line.line}" if line.id is None else line.id
    note = ("" if scored.readable else ", unreadable") + (", cut" if line.finish_reason == "length" else "")
    return (
        f'<div class="card"><div class="media">{_media(line)}</div>'
        f'<p class="question">{escape(shorten(line.question, LONGEST_TEXT))}</p><dl>{listed}</dl>'
        f'<p class="verdict">{scored.value:.2f}{note} <span class="note">{escape(label)}</span></p></div>'
    )


def _media(line: Prediction) -> str:
    """Return the sample's media, or the reasons why they cannot be shown."""
    return "".join(_medium(line, kind, source) for kind, source in line.media)


def _medium(line: Prediction, kind: str, source: str | tuple[str, ...]) -> str:
    if any(one.startswith(EMBEDDED) for one in ((source,) if isinstance(source, str) else source)):
        return f'<p class="missing">{escape(kind)} inside the annotations</p>'
    reader = MediaReader("", allow_absolute=True)
    try:
        if kind == "video":
            item = video_item(list(source) if isinstance(source, tuple) else source)
            return "".join(image_tag(one, f"frame {number}") for number, one in enumerate(video_frames(reader, item)))
        image = reader.read_image(image_item(source))
    except SampleError as error:
        return f'<p class="missing">{escape(error.reason)}</p>'
    if line.canvas is not None:
        texts = final_answer(line.expected), final_answer(line.prediction or "")
        return with_boxes(image, line.canvas, *map(read_boxes, texts))
    return image_tag(image, "image")


def _not_asked(lines: Sequence[Prediction]) -> str:
    rows = [(line.dataset, f"{Path(line.file).name}:{line.line}", line.id or "", line.error or "") for line in lines]
    more = f'<p class="note">And {len(rows) - LISTED:,} more.</p>' if len(rows) > LISTED else ""
    listed = table(("Dataset", "Line", "Id", "Reason"), rows[:LISTED])
    return f'<section><h2>Not asked</h2><div class="panel reasons">{listed}</div>{more}</section>'
