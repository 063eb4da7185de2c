"""A sample's whole way, real media files in, against the stock model's own positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from qwenvl.config import DataArguments
from qwenvl.data.encoding.encoded import Plan
from qwenvl.data.encoding.encoder import OverlengthError, SampleEncoder
from qwenvl.data.encoding.processor import build_encoder
from qwenvl.data.media.resize import VideoPlan
from qwenvl.data.sample_stats import measure_row
from qwenvl.data.types import Conversation, Sample
from qwenvl.families import FAMILIES, get_family
from qwenvl.utils.errors import Origin, SampleError
from tests.data.encoding.test_mrope import published_positions
from tests.patches import patches_of


def write_video(path: Path, frames: int, fps: int) -> None:
    with av.open(str(path), mode="w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps))
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for number in range(frames):
            picture = np.full((64, 96, 3), 8 * number % 256, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())


def build(checkpoint: Path) -> SampleEncoder:
    config, processor = AutoConfig.from_pretrained(checkpoint), AutoProcessor.from_pretrained(checkpoint)
    family = get_family(config.model_type)
    return build_encoder(processor, config, family, DataArguments(dataset_use="d"), 4096)


@pytest.fixture(scope="module")
def encoder(tiny_checkpoint: Callable[..., Path]) -> SampleEncoder:
    return build(tiny_checkpoint("qwen3_vl"))


def talk(*texts: str, **fields: Any) -> Sample:
    turns = [{"from": ("human", "gpt")[place % 2], "value": text} for place, text in enumerate(texts)]
    return Sample(Origin("d", "f.json", 3), {"conversations": turns, **fields}, "")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_two_videos_and_a_picture_stand_where_the_stock_model_puts_them(
    family: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Videos of different length and frame rate: each has its own seconds a patch (2, and 1) where time is counted."""
    write_video(tmp_path / "slow.mp4", frames=8, fps=1)
    write_video(tmp_path / "fast.mp4", frames=40, fps=10)
    Image.new("RGB", (70, 90)).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<video>then<image>and<video>?"}, {"from": "gpt", "value": "Yes."}]
    record = {"video": ["slow.mp4", "fast.mp4"], "image": "a.png", "conversations": turns}
    checkpoint = tiny_checkpoint(family)
    config = AutoConfig.from_pretrained(checkpoint)
    limits = DataArguments(dataset_use="d", video_max_pixels=8 * 64 * 96, video_min_pixels=8 * 32 * 32)
    encoder = build_encoder(AutoProcessor.from_pretrained(checkpoint), config, get_family(family), limits, 4096)
    sample = Sample(Origin("d", "f", 1), record, str(tmp_path))
    plan = encoder.plans(sample)[0]
    videos = [media for media in plan.media if isinstance(media, VideoPlan)]
    assert [len(video.indices) for video in videos] == [8, 8]
    seconds = [2 / video.sampled_fps for video in videos]
    assert seconds == [2.0, 1.0]

    kinds = (plan.tokens.input_ids == config.image_token_id).int() + 2 * (
        plan.tokens.input_ids == config.video_token_id
    ).int()
    assert torch.equal(kinds > 0, plan.tokens.vision_mask)
    timed = {"second_per_grid_ts": torch.tensor(seconds)} if get_family(family).timed_positions else {}
    expected, _ = AutoModelForImageTextToText.from_config(config).model.get_rope_index(
        plan.tokens.input_ids[None],
        mm_token_type_ids=kinds[None],
        image_grid_thw=torch.tensor([media.grid for media in plan.media if not isinstance(media, VideoPlan)]),
        video_grid_thw=torch.tensor([video.grid for video in videos]),
        **timed,
    )
    if get_family(family).video_layout == "clip":  # text after a clip; see test_mrope.py
        speeds = [2 * one if timed else 1.0 for one in seconds]
        images = [media.grid for media in plan.media if not isinstance(media, VideoPlan)]
        expected = published_positions(kinds.tolist(), images, [video.grid for video in videos], speeds)[:, None]
    assert torch.equal(plan.tokens.position_ids[1:], expected[:, 0])

    encoded = encoder.encode([plan], sample)[0]
    assert [len(medium.frames) for medium in encoded.media] == [8, 1, 8]
    assert [medium.grid for medium in encoded.media] == [media.grid for media in plan.media]
    assert len(patches_of(encoded, checkpoint)) == 4 * int(plan.tokens.vision_mask.sum())


def test_a_sample_may_take_every_position_of_the_model_and_no_more(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Positions are numbered from 0. A picture takes fewer of them than it has tokens."""
    Image.new("RGB", (320, 320)).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "Yes."}]
    sample = Sample(Origin("d", "f", 1), {"image": "a.png", "conversations": turns}, str(tmp_path))
    encoder = build(tiny_checkpoint("qwen3_vl"))
    tokens = encoder.plans(sample)[0].tokens
    taken = int(tokens.position_ids[1:].max()) + 1
    assert taken == len(tokens) - 10 * 10 + 10
    assert len(replace(encoder, max_positions=taken).plans(sample)[0].tokens) == len(tokens)
    with pytest.raises(SampleError, match=f"takes {taken} positions, but the model is made for {taken - 1} ") as caught:
        replace(encoder, max_positions=taken - 1).plans(sample)[0]
    assert caught.value.category == "beyond_context"
    assert str(caught.value.origin) in str(caught.value)


def test_a_sample_may_have_as_many_tokens_as_the_limit_and_no_more(encoder: SampleEncoder) -> None:
    sample = talk("Who?", "Me.")
    plan = encoder.plans(sample)[0]
    length = len(plan.tokens)
    assert plan.events == ()
    assert len(replace(encoder, max_length=length).plans(sample)[0].tokens) == length
    for overlength, fatal in (("drop", False), ("error", True)):
        short = replace(encoder, max_length=length - 1, overlength=overlength)
        with pytest.raises(
            OverlengthError, match=f"has {length} tokens, more than --model_max_length {length - 1}"
        ) as caught:
            short.plans(sample)[0]
        assert (caught.value.fatal, caught.value.origin, caught.value.category) == (fatal, sample.origin, "overlength")
        trained = int((plan.tokens.labels != -100).sum())
        assert (short.measure(sample)) == measure_row(length, trained, ())._replace(answers=1)


def test_members_of_a_packed_row_share_its_limit(encoder: SampleEncoder) -> None:
    row = replace(encoder, max_length=100)
    row.require_length(40, talk("Q", "A"), used=60)
    row.require_length(100, talk("Q", "A"), used=0)
    with pytest.raises(OverlengthError, match="the packed row is longer than --model_max_length 100 with this sample"):
        row.require_length(41, talk("Q", "A"), used=60)


def test_turns_left_out_are_counted(encoder: SampleEncoder) -> None:
    texts = ("1?", "One.", "2?", "Two.", "3?", "Three.")
    whole, two = len(encoder.plans(talk(*texts))[0].tokens), len(encoder.plans(talk(*texts[:4]))[0].tokens)
    for limit, kept in ((whole, 6), (whole - 1, 4), (two, 4), (two - 1, 2)):
        cutter = replace(encoder, max_length=limit, overlength="truncate_turns")
        plan = cutter.plans(talk(*texts))[0]
        assert [message.text for message in plan.conversation.messages] == list(texts[:kept])
        said = [f"d (f.json:3): {whole} tokens; the last {6 - kept} turns left out"] if kept < 6 else []
        assert [event.message.split(": ", 1)[1] for event in plan.events] == [one.split(": ", 1)[1] for one in said]
        assert [event.kind for event in plan.events] == ["truncated"] * len(said)
        assert (cutter.measure(talk(*texts))).tokens == len(plan.tokens)
    with pytest.raises(OverlengthError):
        replace(encoder, max_length=5, overlength="truncate_turns").plans(talk(*texts))[0]


def test_thoughts_that_the_template_does_not_open_are_reported(encoder: SampleEncoder) -> None:
    sample = talk("Q", "<think>\nSo.\n</think>\n\nA")
    (event,) = encoder.plans(sample)[0].events
    assert (event.kind, event.dataset, event.message) == ("thinking_mismatch", "d", str(sample.origin))


class Notes:
    """Reads the field ``note`` of samples."""

    fields = ("note",)

    def __init__(self, prompts: bool = False, version: int = 0) -> None:
        self.prompts = prompts
        self.version = version

    def check(self, sample: Sample, conversation: Conversation) -> None:
        if sample.record["note"] is None or not conversation.messages:
            raise SampleError("bad_record", "it has no note")

    def read(self, sample: Sample, plan: Plan) -> Any:
        if sample.record["note"] == "unread":
            raise SampleError("bad_record", "the note cannot be read")
        return sample.record["note"], len(plan.tokens)

    def identity(self) -> list[Any]:
        return [self.version]


def test_what_a_task_wants_to_know_of_a_sample(encoder: SampleEncoder) -> None:
    sample = talk("Who?", "Me.", note=7)
    assert encoder.encode([encoder.plans(sample)[0]], sample)[0].target is None
    noting = replace(encoder, targets=Notes())
    plan = noting.plans(sample)[0]
    assert noting.encode([plan], sample)[0].target == (7, len(plan.tokens))
    for note, said in ((None, "it has no note"), ("unread", "the note cannot be read")):
        wrong = talk("Who?", "Me.", note=note)
        with pytest.raises(SampleError, match=said) as caught:
            noting.encode([noting.plans(wrong)[0]], wrong)[0]
        assert caught.value.origin == wrong.origin


def test_questions_are_rendered_up_to_the_answer(encoder: SampleEncoder) -> None:
    sample = talk("Who?", "<think>\nSo.\n</think>\n\nMe.", note=7)
    asking = replace(encoder, targets=Notes(prompts=True))
    assert (encoder.prompts, replace(encoder, targets=Notes()).prompts, asking.prompts) == (False, False, True)
    plan = asking.plans(sample)[0]
    assert plan.rendering.text.endswith("Who?<|im_end|>\n<|im_start|>assistant\n")
    assert (plan.tokens.labels == -100).all()
    assert plan.events == ()  # of the answer, which is left out
    assert asking.plans(talk("Who?", note=7))[0].rendering == plan.rendering
    with pytest.raises(SampleError, match="answer"):
        encoder.plans(talk("Who?", note=7))[0]
    assert (asking.measure(sample)) == measure_row(len(plan.tokens), 0, ())


def test_the_fingerprint_changes_with_all_that_lengths_depend_on(encoder: SampleEncoder) -> None:
    cutter = replace(encoder, overlength="truncate_turns")
    others = [
        encoder,
        replace(encoder, settings=replace(encoder.settings, video_fps=3.0)),
        replace(encoder, reserved_tokens=[*encoder.reserved_tokens, "<x>"]),
        replace(encoder, allow_remote=True),
        replace(encoder, targets=Notes()),
        replace(encoder, targets=Notes(version=1)),
        cutter,
        replace(cutter, max_length=99),
    ]
    assert len({one.fingerprint() for one in others}) == len(others)
    same = replace(encoder, max_length=99, overlength="error", reserved_tokens=[*encoder.reserved_tokens][::-1])
    assert encoder.fingerprint() == same.fingerprint() == replace(encoder, video_timeout=1.0).fingerprint()
