"""The demo's result as one self-contained HTML page with its images, styles and chart."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from PIL import Image

from examples.demo.losses import Losses
from examples.demo.results import Result, TaskScore
from qwenvl.data.media.reader import MediaReader
from qwenvl.data.types import VideoItem
from qwenvl.metrics.boxes import read_boxes
from qwenvl.report.answers import short_answer
from qwenvl.report.chart import draw
from qwenvl.report.html import build_page, table
from qwenvl.report.images import image_tag, video_frames, with_boxes

TITLE = "A tiny Qwen3-VL learns to see"
SCORES_NOTE = "Chance: share of right answers if each were the answer to another sample of the same task."
VIDEO_SUFFIXES = (".mp4",)

ABOUT = {
    "digits": "Real handwritten digits that the model has never seen.",
    "comparisons": "Two images in one question.",
    "grounding": "The answer is a box in JSON, 0 to 1000 across the image; an IoU of one half or more is right.",
    "motion": "Short video clips; four of their frames are shown. The square crosses most of the image, so its start "
    "alone gives away its direction.",
}


def build_demo_page(results: Sequence[Result], scores: Sequence[TaskScore], losses: Losses, *, shown: int = 12) -> str:
    """Return the demo's HTML page.

    Args:
        results: Answers to all samples.
        scores: Scores of the tasks.
        losses: Losses of the training run.
        shown: Number of first samples shown of each task; at most half as many wrong answers of the others follow.
    """
    figures = (
        f'<section class="panel"><h2>Right answers</h2>{_score_table(scores)}'
        f'<p class="note">{SCORES_NOTE}</p></section>'
        f'<section class="panel"><h2>Loss</h2>{_curve(losses)}</section>'
    )
    tasks = (_task(one, [result for result in results if result.task == one.task], shown) for one in scores)
    return build_page(TITLE, f"<p>{_lead(scores, losses)}</p>", f'<div class="top">{figures}</div>', *tasks)


def _curve(losses: Losses) -> str:
    if not losses.chart.lines:
        return '<p class="note">The folder holds no record of its training, so there is no loss to show.</p>'
    return f'<p class="note">nats per trained token</p>{draw(losses.chart)}'


def _lead(scores: Sequence[TaskScore], losses: Losses) -> str:
    last = losses.train[-1][0] if losses.train else None
    trained = f" for {last:g} steps" if last is not None else ""
    trained += f" ({losses.seconds / 60:.1f} minutes)" if losses.seconds is not None else ""
    total = sum(score.total for score in scores)
    return (
        "This model started from random weights: no language, no sight. It was trained with this repository's trainer "
        f"on images and short clips{trained}, and then asked {total} questions about ones it had never seen. Its "
        "folder was opened with the stock classes of transformers, AutoModelForImageTextToText and AutoProcessor."
    )


def _score_table(scores: Sequence[TaskScore]) -> str:
    rows = [
        (score.task, f"{score.right} of {score.total}", f"{score.accuracy:.1%}", f"{score.chance:.0%}")
        for score in scores
    ]
    return table(("Task", "Right", "Accuracy", "Chance"), rows)


def _task(score: TaskScore, results: Sequence[Result], shown: int) -> str:
    wrong = [result for result in results[shown:] if not result.right]
    wide = " wide" if any(map(_needs_room, results)) else ""
    about = ABOUT.get(score.task, "")
    if score.task == "grounding":
        about += ' <span class="key dashed"></span> expected, <span class="key"></span> the model\'s box.'
    text = f"<h2>{escape(score.task.capitalize())}</h2><p>{about}</p>{_cards(results[:shown], score.task + wide)}"
    if wrong:
        most = max(1, shown // 2)
        text += (
            f'<p class="note rest">Wrong answers among the other {len(results) - shown} samples: '
            f"{len(wrong)}{f', {most} of them here' if len(wrong) > most else ''}.</p>"
            f"{_cards(wrong[:most], score.task + wide)}"
        )
    return f"<section>{text}</section>"


def _needs_room(result: Result) -> bool:
    return len(result.media) > 1 or _is_video(result.media[0]) or bool(read_boxes(result.expected))


def _cards(results: Sequence[Result], classes: str) -> str:
    return f'<div class="cards {escape(classes)}">{"".join(map(_card, results))}</div>'


def _card(result: Result) -> str:
    verdict = "&#10003; right" if result.right else "&#10007; wrong"
    return (
        f'<div class="card {"right" if result.right else "wrong"}"><div class="media">{_images(result)}</div>'
        f'<p class="question">{escape(result.question.strip())}</p>'
        f"<dl><dt>expected</dt><dd>{escape(short_answer(result.expected))}</dd>"
        f"<dt>answer</dt><dd>{escape(short_answer(result.answer)) or '(nothing)'}</dd></dl>"
        f'<p class="verdict">{verdict}</p></div>'
    )


def _images(result: Result) -> str:
    if _is_video(result.media[0]):
        frames = video_frames(MediaReader("", allow_absolute=True), VideoItem(result.media[0]))
        return "".join(image_tag(frame, f"frame {number}") for number, frame in enumerate(frames))
    images = [Image.open(path).convert("RGB") for path in result.media]
    if (boxes := read_boxes(result.expected)) and len(images) == 1:
        return with_boxes(images[0], (1000, 1000), boxes, read_boxes(result.answer))
    return "".join(image_tag(image, f"image {number}") for number, image in enumerate(images, start=1))


def _is_video(path: str) -> bool:
    return path.endswith(VIDEO_SUFFIXES)
