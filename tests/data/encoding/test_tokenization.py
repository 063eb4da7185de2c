"""Texts with pictures and videos to ids, labels, positions and lengths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwenvl.data.conversation.chat_template import Rendering
from qwenvl.data.encoding.tokenization import IGNORE_INDEX, Tokenizer, Tokens, VisionTokens
from qwenvl.data.media.resize import MediaPlan, VideoPlan, plan_image
from qwenvl.data.types import ImageItem, VideoItem
from qwenvl.families import Family
from qwenvl.utils.errors import SampleError
from tests.tasks.heads.test_labels import Pipeline

START, END = "<|vision_start|>", "<|vision_end|>"
CLIP = VideoPlan(VideoItem("x"), 8, 2.0, np.array([0, 2, 4, 6]), (64, 96), (2, 4, 6), (0.5, 2.54))
"""Four of eight frames at 2 a second: a frame a second, and a patch of two frames holds 2 s; 2 x 2 x 3 tokens."""


@pytest.fixture(scope="module", params=["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def pipeline(request: pytest.FixtureRequest, tiny_checkpoint: Callable[..., Path]) -> Pipeline:
    return Pipeline(tiny_checkpoint(request.param), request.param)


@pytest.fixture(scope="module")
def clips(tiny_checkpoint: Callable[..., Path]) -> Pipeline:
    """Of the family whose positions count seconds."""
    return Pipeline(tiny_checkpoint("qwen2_5_vl"), "qwen2_5_vl")


def rendering_of(*pieces: str) -> Rendering:
    """Return a rendering whose last piece is trained."""
    text = "".join(pieces)
    return Rendering(text, ((len(text) - len(pieces[-1]), len(text)),))


def read_back(pipeline: Pipeline, tokens: Tokens) -> str:
    return str(pipeline.processor.tokenizer.decode(tokens.input_ids))


def tokenizer_of(pipeline: Pipeline, **changes: Any) -> Tokenizer:
    """Return the tokenizer of a checkpoint of another family or vision."""
    vision = changes.pop("vision", VisionTokens.from_processor(pipeline.processor))
    return Tokenizer(pipeline.processor.tokenizer, vision, replace(pipeline.limits, **changes))


def test_a_video_is_as_many_placeholders_as_it_has_tokens(pipeline: Pipeline) -> None:
    """One after the other, or frame by frame behind its time, as the family has it."""
    video = pipeline.processor.video_token
    tokens = pipeline.tokenizer(rendering_of("A", START + video + END, "B", "Yes."), [CLIP])
    frames = f"<0.5 seconds>{START}{video * 6}{END}<2.5 seconds>{START}{video * 6}{END}"
    whole = {"frames": frames, "clip": START + video * 12 + END}[pipeline.limits.family.video_layout]
    assert read_back(pipeline, tokens) == f"A{whole}BYes."
    assert int(tokens.vision_mask.sum()) == 12
    assert (tokens.input_ids[tokens.vision_mask] == pipeline.processor.video_token_id).all()
    assert pipeline.processor.tokenizer.decode(tokens.labels[tokens.labels != IGNORE_INDEX]) == "Yes."


def test_media_of_several_kinds_keep_their_order(pipeline: Pipeline) -> None:
    image, video = pipeline.processor.image_token, pipeline.processor.video_token
    picture = plan_image(ImageItem("x"), (64, 128), replace(pipeline.limits, image_min_pixels=1))
    count = picture.grid[1] * picture.grid[2] // 4
    clip = START + video + END
    later = replace(CLIP, timestamps=(7.0, 9.0))
    text = rendering_of(START + image + END, clip, "and", clip, "Yes.")
    encoding = pipeline.tokenizer.encode(text, [picture, CLIP, later])
    tokens = pipeline.tokenizer.expand(encoding)
    assert (encoding.length, encoding.trained) == (len(tokens), int((tokens.labels != IGNORE_INDEX).sum()))
    kinds = tokens.input_ids[tokens.vision_mask].tolist()
    assert kinds == [pipeline.processor.image_token_id] * count + [pipeline.processor.video_token_id] * 24
    written = read_back(pipeline, tokens)
    if pipeline.limits.family.video_layout == "frames":
        places = [written.index(f"<{seconds} seconds>") for seconds in ("0.5", "2.5", "7.0", "9.0")]
        assert places == sorted(places)
        assert places[1] < written.index("and") < places[2]
    assert written.endswith("Yes.")


@pytest.mark.parametrize(
    ("media", "temporal"),
    [("video", {"clip": [1] * 6 + [2] * 6, "frames": None}), ("image", {"clip": [1] * 4, "frames": [1] * 4})],
)
def test_positions_of_the_merged_grid(pipeline: Pipeline, media: str, temporal: dict[str, list[int] | None]) -> None:
    """Without seconds, one position a temporal patch; a picture is a single one."""
    plan: MediaPlan = CLIP
    if media == "image":
        plan = plan_image(
            ImageItem("x"), (2 * pipeline.limits.factor,) * 2, replace(pipeline.limits, image_min_pixels=1)
        )
    placeholder = pipeline.processor.video_token if media == "video" else pipeline.processor.image_token
    tokens = pipeline.tokenizer(rendering_of(START + placeholder + END, "Yes."), [plan])
    if (expected := temporal[pipeline.limits.family.video_layout]) is not None:
        first = int(tokens.position_ids[1, tokens.vision_mask][0])
        assert (tokens.position_ids[1, tokens.vision_mask] - first + 1).tolist() == expected
        columns = 3 if media == "video" else 2
        assert (tokens.position_ids[3, tokens.vision_mask] - first).tolist() == [*range(columns)] * (
            len(expected) // columns
        )


def test_seconds_of_a_patch_set_its_positions_where_time_counts(clips: Pipeline) -> None:
    """A patch holds 2 s: at 3 positions a second, the second one stands 6 further on."""
    vision = VisionTokens.from_processor(clips.processor, tokens_per_second=3.0)
    assert vision.tokens_per_second == 3.0
    text = rendering_of(clips.processor.video_token, "Yes.")
    assert VisionTokens.from_processor(clips.processor).tokens_per_second is None
    assert tokenizer_of(clips, vision=vision)(text, [CLIP]).position_ids[1].tolist()[:12] == [0] * 6 + [6] * 6
    slow = replace(CLIP, fps=1.0)  # a frame every two seconds
    assert tokenizer_of(clips, vision=vision)(text, [slow]).position_ids[1].tolist()[:12] == [0] * 6 + [12] * 6


@pytest.mark.parametrize(("tokens_per_frame", "count"), [(None, 12), (5, 10)])
def test_models_of_plain_positions_count_all_tokens_in_a_row(
    clips: Pipeline, tokens_per_frame: int | None, count: int
) -> None:
    tokenizer = tokenizer_of(
        clips, family=Family("plain", video_layout="clip", plain_positions=True), tokens_per_frame=tokens_per_frame
    )
    tokens = tokenizer(rendering_of("A", clips.processor.video_token, "Yes."), [CLIP])
    assert int(tokens.vision_mask.sum()) == count
    assert tokens.position_ids[[0, 3]].tolist() == [[*range(len(tokens))]] * 2


@pytest.mark.parametrize("kind", ["image", "video"])
def test_placeholders_and_media_that_do_not_match_are_an_error(pipeline: Pipeline, kind: str) -> None:
    """Such a text comes from a template that writes media where none are, or leaves some out."""
    vision = VisionTokens.from_processor(pipeline.processor)
    picture = plan_image(ImageItem("x"), (64, 64), pipeline.limits)
    placeholder = f"{vision.start}{vision.image if kind == 'image' else vision.video}{vision.end}"
    question = f"{vision.image}{placeholder} and?"
    rendering = Rendering(f"{question}Yes.", ((len(question), len(question) + len("Yes.")),))
    for plans, said in (
        ([picture], "rendered 2 placeholders for 1 images or frames"),
        ([picture] * 3, "rendered 2 placeholders for 3 images or frames"),
    ):
        with pytest.raises(SampleError, match=said) as caught:
            pipeline.tokenizer(rendering, plans)
        assert caught.value.category == "template"


def test_a_text_without_an_answer_is_an_error_unless_it_is_a_question(pipeline: Pipeline) -> None:
    rendering = Rendering("Who?", ())
    with pytest.raises(SampleError, match="it has no answer") as caught:
        pipeline.tokenizer.encode(rendering, [])
    assert caught.value.category == "no_answer"
    encoding = pipeline.tokenizer.encode(rendering, [], answered=False)
    assert encoding.trained == 0
    assert read_back(pipeline, pipeline.tokenizer.expand(encoding)) == "Who?"


def test_offsets_say_which_characters_a_token_holds(clips: Pipeline) -> None:
    text = "A red car, 語 and é."
    ids, offsets = clips.tokenizer.offsets(text)
    assert ids == clips.processor.tokenizer(text)["input_ids"]
    assert len(offsets) == len(ids)
    assert offsets[0][0] == 0 and offsets[-1][1] == len(text)
    ends = [stop for _, stop in offsets]
    assert ends == sorted(ends)
    assert set(range(len(text))) == {place for start, stop in offsets for place in range(start, stop)}


def test_the_identity_tells_tokenizers_and_placeholders_apart(clips: Pipeline) -> None:
    vision = VisionTokens.from_processor(clips.processor)
    same, other = tokenizer_of(clips), tokenizer_of(clips, vision=replace(vision, tokens_per_second=2.0))
    assert clips.tokenizer.identity() == same.identity() != other.identity()
