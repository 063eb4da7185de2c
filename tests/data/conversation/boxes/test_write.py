"""ms-swift's grounding format, filled in: against what each family writes, after orientation and resizing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qwenvl.data.conversation.boxes.write import write_boxes
from qwenvl.data.conversation.messages import build_conversation
from qwenvl.data.encoding.encoder import SampleEncoder
from qwenvl.data.types import Conversation, Sample
from qwenvl.families import FAMILIES, get_family
from qwenvl.utils.errors import Origin, SampleError
from tests.data.conversation.boxes.test_convert import BOX, RELATIVE, RESIZED, nested, picture, reason
from tests.data.conversation.test_boxes_in_files import build

TOKENS = get_family("qwen2_vl")
QUESTION = {"role": "user", "content": "<image>Find the <ref-object>."}


def sample_of(*turns: Any, objects: Any, images: int = 1, **fields: Any) -> Sample:
    record = {"messages": list(turns), "images": [f"{n}.jpg" for n in range(images)], "objects": objects, **fields}
    return Sample(Origin("set", "set.jsonl", 1), record)


def fill(sample: Sample, family: Any = RELATIVE, media: Any = (), problems: Any = None) -> Conversation:
    """Fill tags of a sample about images of 640 x 480 pixels, resized to 644 x 476."""
    return write_boxes(build_conversation(sample, ()), media or (picture(),), sample, family, problems)


def answer(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def test_which_families_write_tokens() -> None:
    assert [name for name, family in FAMILIES.items() if family.box_text == "tokens"] == ["qwen2_vl"]


@pytest.mark.parametrize(
    ("family", "name", "box", "point", "quad"),
    [
        (RELATIVE, "red cup", "[100, 100, 500, 500]", "[100, 100]", "[100, 100, 500, 100, 500, 500, 100, 500]"),
        (RESIZED, "red cup", "[64, 48, 322, 238]", "[64, 48]", "[64, 48, 322, 48, 322, 238, 64, 238]"),
        (
            TOKENS,
            "<|object_ref_start|>red cup<|object_ref_end|>",
            "<|box_start|>(100,100),(500,500)<|box_end|>",
            "<|box_start|>(100,100)<|box_end|>",
            "<|quad_start|>(100,100),(500,100),(500,500),(100,500)<|quad_end|>",
        ),
    ],
)
def test_forms_of_the_families(family: Any, name: str, box: str, point: str, quad: str) -> None:
    objects = {"ref": ["red cup"], "bbox": [BOX, [64, 48], [64, 48, 320, 48, 320, 240, 64, 240]]}
    turns = fill(sample_of(QUESTION, answer("<bbox>: click(start_box='<bbox>'), <bbox>."), objects=objects), family)
    assert [turn.text for turn in turns.messages] == [
        f"Find the {name}.",
        f"{box}: click(start_box='{point}'), {quad}.",
    ]


def test_tags_are_filled_in_order_in_all_turns() -> None:
    """Texts and boxes each by themselves; a thought before its answer, and calls after it."""
    call = {"name": "zoom", "arguments": {"at": "<bbox>", "what": ["<ref-object>"]}}
    turns = [
        {"role": "system", "content": "Say <ref-object>."},
        {"role": "user", "content": "<image>At <bbox>?"},
        {**answer("<ref-object> is <bbox>"), "reasoning_content": "<ref-object>, <bbox>", "tool_calls": [call]},
        {"role": "tool", "content": "<ref-object>"},
        answer("<bbox>"),
    ]
    boxes = [[0, 0, 64 * (1 + number), 48] for number in range(5)]
    found = fill(sample_of(*turns, objects={"ref": list("ABCDE"), "bbox": boxes})).messages
    assert [turn.text for turn in found] == [
        *("Say A.", "At [0, 0, 100, 100]?", "C is [0, 0, 300, 100]", "E", "[0, 0, 500, 100]")
    ]
    assert found[2].extra["reasoning_content"] == "B, [0, 0, 200, 100]"
    assert found[2].extra["tool_calls"][0]["arguments"] == {"at": "[0, 0, 400, 100]", "what": ["D"]}


def test_a_text_that_looks_like_a_tag_stays() -> None:
    objects = {"ref": ["<bbox>"], "bbox": [BOX]}
    assert fill(sample_of(QUESTION, answer("<bbox>"), objects=objects)).messages[0].text == "Find the <bbox>."


def test_shares_of_the_image() -> None:
    objects = {"ref": ["cup"], "bbox": [[0.1, 0.2, 0.5, 1.0005]], "bbox_type": "norm1"}
    sample = sample_of(QUESTION, answer("<bbox>"), objects=objects)
    assert fill(sample).messages[1].text == "[100, 200, 500, 1000]"
    assert fill(sample, RESIZED).messages[1].text == "[64, 95, 322, 475]"


def test_each_box_lies_in_its_image() -> None:
    media = (picture(), picture((960, 1280), name="b.jpg"))
    user = {"role": "user", "content": "<image><image>Where?"}
    sample = sample_of(user, answer("<bbox><bbox>"), objects={"bbox": [BOX, BOX], "image_id": [1, 0]}, images=2)
    assert fill(sample, media=media).messages[1].text == "[50, 50, 250, 250][100, 100, 500, 500]"
    sample.record["objects"]["image_id"] = None  # the first one, as in ms-swift
    assert fill(sample, media=media).messages[1].text == "[100, 100, 500, 500]" * 2


@pytest.mark.parametrize(
    ("objects", "said"),
    [
        ({"bbox": [[64, 48, 641, 240]]}, "[64, 48, 641, 240] of 'objects' lies outside the image a.jpg"),
        ({"bbox": [[320, 48, 64, 240]]}, "x1 < x2"),
        ({"bbox": [BOX], "image_id": [1]}, "its image is number 1, of 1"),
        ({"bbox": [BOX], "bbox_type": "norm1"}, "outside 0 to 1, as 'norm1' has it"),
        ({"bbox": [[0.1, 0.1, 0.2, 1.01]], "bbox_type": "norm1"}, "outside 0 to 1"),
        ({"bbox": [[float("nan"), 48]]}, "outside"),
    ],
)
def test_boxes_that_cannot_be_converted(objects: dict[str, Any], said: str) -> None:
    sample = sample_of({"role": "user", "content": "<image>?"}, answer("<bbox>"), objects=objects)
    assert said in reason(lambda: fill(sample))
    found: list[SampleError] = []
    fill(sample, problems=found)
    assert [error.category for error in found] == ["bad_boxes"] and said in found[0].reason


def test_beside_boxes_in_the_text() -> None:
    """The text's own are converted as its ``bbox_format`` says, those of objects once; they count as converted."""
    written = json.dumps({"bbox_2d": BOX})
    sample = sample_of(
        QUESTION, answer(f"{written} <bbox>"), objects={"ref": ["a"], "bbox": [BOX]}, bbox_format="pixel"
    )
    assert fill(sample).messages[1].text == '{"bbox_2d": [100, 100, 500, 500]} [100, 100, 500, 500]'
    sample = sample_of(QUESTION, answer("12 34 <bbox>"), objects={"ref": ["a"], "bbox": [BOX]}, bbox_format="pixel")
    assert not fill(sample).unconverted
    sample = sample_of(QUESTION, answer("12 34"), objects={"ref": ["a"]}, bbox_format="pixel")
    assert fill(sample).unconverted


def test_calls_that_are_nested_too_deeply() -> None:
    turn = {**answer("<bbox>"), "tool_calls": [{"name": "a", "arguments": {"a": nested(100_000)}}]}
    sample = sample_of({"role": "user", "content": "<image>?"}, turn, objects={"bbox": [BOX]})
    assert "nested too deeply" in reason(lambda: build_conversation(sample, ()), "bad_record")


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"])
def test_a_file_through_orientation_and_resizing(
    family: str, tiny_checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """Pixels count in the image as it is shown, 900 x 1300, which is stored on its side."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (1300, 900)).save(tmp_path / "0.jpg", exif=exif)
    turns = ({"role": "user", "content": "<image>Find the <ref-object>"}, answer("<bbox>"))
    sample = replace(
        sample_of(*turns, objects={"ref": ["cup"], "bbox": [[90, 130, 450, 1300]]}), data_path=str(tmp_path)
    )
    encoder: SampleEncoder = build(tiny_checkpoint(family), family)
    plan = encoder.plans(sample)[0]
    height, width = plan.media[0].resized
    assert (height, width) != (1300, 900)
    resized = f"[{round(width / 10)}, {round(height / 10)}, {round(width / 2)}, {height - 1}]"
    text = {"qwen2_vl": "<|box_start|>(100,100),(500,1000)<|box_end|>", "qwen2_5_vl": resized}
    assert f"{text.get(family, '[100, 100, 500, 1000]')}<|im_end|>" in plan.rendering.text
    assert "<bbox>" not in plan.rendering.text and "<ref-object>" not in plan.rendering.text
