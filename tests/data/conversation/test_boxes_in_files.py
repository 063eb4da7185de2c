"""Boxes from annotation and picture files to rendered text: format, orientation, size, over-length."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from transformers import AutoConfig, AutoProcessor

from qwenvl.config import DataArguments
from qwenvl.data.conversation.boxes.convert import bbox_format, to_pixels
from qwenvl.data.encoding.encoder import SampleEncoder
from qwenvl.data.encoding.processor import build_encoder
from qwenvl.data.media.reader import MediaReader
from qwenvl.data.sources.table import open_annotations
from qwenvl.data.types import DatasetSpec, ImageItem
from qwenvl.families import get_family
from qwenvl.utils.errors import SampleError
from tests.data.conversation.boxes.test_convert import BOX, sample_of


def build(checkpoint: Path, family: str, **flags: Any) -> SampleEncoder:
    limits = DataArguments(dataset_use="d", max_pixels=300 * 300, **flags)
    config = AutoConfig.from_pretrained(checkpoint)
    return build_encoder(AutoProcessor.from_pretrained(checkpoint), config, get_family(family), limits, 4096)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_box_stays_on_its_object_through_orientation_and_resizing(
    family: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """A red box on a picture that a camera stored lying on its side, shown upright: found again where the text says."""
    shown = Image.new("RGB", (900, 1300), "white")
    box = [150, 800, 420, 1180]
    ImageDraw.Draw(shown).rectangle((150, 800, 419, 1179), fill="red")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to show
    stored = shown.transpose(Image.Transpose.ROTATE_90)
    assert stored.size == (1300, 900)
    stored.save(tmp_path / "a.jpg", exif=exif, quality=95)

    sample = sample_of("<image>Where?", json.dumps({"bbox_2d": box}), image="a.jpg")
    sample = replace(sample, data_path=str(tmp_path))
    encoder = build(tiny_checkpoint(family), family)
    plan = encoder.plans(sample)[0]
    written = json.loads(plan.conversation.messages[-1].text)["bbox_2d"]
    assert json.dumps({"bbox_2d": written}) in plan.rendering.text  # what is tokenized
    (media,) = plan.media
    height, width = media.resized
    assert (height, width) != (1300, 900)
    extent = (width, height) if family == "qwen2_5_vl" else (1000, 1000)
    assert written == [round(value * extent[axis % 2] / (900, 1300)[axis % 2]) for axis, value in enumerate(box)]

    resized = MediaReader(str(tmp_path)).read_image(ImageItem("a.jpg")).resize((width, height))
    red = np.array(resized)[:, :, 1] < 128
    left, top, right, bottom = to_pixels(written, media.resized, get_family(family), media.resized)
    rows, columns = np.flatnonzero(red.any(axis=1)), np.flatnonzero(red.any(axis=0))
    found = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    unit = math.ceil(max(width, height) / 1000)
    assert np.abs(np.array(found) - (left, top, right, bottom)).max() <= unit + 1


def test_the_format_of_a_dataset_and_of_a_sample(tmp_path: Path) -> None:
    records = [{"bbox_format": written} for written in (None, "relative_1000")] + [{}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for written, expected in ((None, [None, "relative_1000", None]), ("pixel", ["pixel", "relative_1000", "pixel"])):
        options = {"bbox_format": written}
        table = open_annotations(DatasetSpec("d", (str(tmp_path / "a.jsonl"),), "", options=options))
        assert [bbox_format(sample) for (sample,) in table] == expected


def test_turns_left_out_are_not_converted_twice(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    Image.new("RGB", (640, 480)).save(tmp_path / "a.png")
    box = json.dumps({"bbox_2d": BOX})
    sample = sample_of("<image>Where?", box, "long " * 300, "No.", image="a.png")
    encoder = build(tiny_checkpoint("qwen3_vl"), "qwen3_vl", overlength="truncate_turns")
    whole = encoder.plans(replace(sample, data_path=str(tmp_path)))[0]
    encoder = replace(encoder, max_length=len(whole.tokens) - 1)
    plan = encoder.plans(replace(sample, data_path=str(tmp_path)))[0]
    assert [message.text for message in plan.conversation.messages] == ["Where?", '{"bbox_2d": [100, 100, 500, 500]}']


def test_a_bad_box_names_its_sample(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    sample = replace(sample_of("<image>?", json.dumps({"bbox_2d": BOX}), image="a.png"), data_path=str(tmp_path))
    with pytest.raises(SampleError, match=r"dataset 'set', set.jsonl:1: .*outside the image a.png"):
        build(tiny_checkpoint("qwen3_vl"), "qwen3_vl").plans(sample)[0]
