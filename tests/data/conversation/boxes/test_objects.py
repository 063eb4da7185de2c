"""ms-swift's ``objects``: what is read of a record, and tags that are more or fewer."""

from __future__ import annotations

from typing import Any

import pytest

from qwenvl.data.conversation.boxes.objects import Objects, read_objects
from qwenvl.data.conversation.messages import build_conversation
from qwenvl.data.types import Sample
from qwenvl.utils.errors import Origin, SampleError

BOX = [100, 75, 200, 150]


def sample_of(answer: Any, question: Any = "<image>Find it.", **fields: Any) -> Sample:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Sample(Origin("set", "set.jsonl", 1), {"messages": turns, "images": ["a.jpg"], **fields})


def reason(sample: Sample, reserved: tuple[str, ...] = (), category: str = "bad_record") -> str:
    with pytest.raises(SampleError) as caught:
        build_conversation(sample, reserved)
    assert caught.value.category == category
    return caught.value.reason


def test_what_is_read() -> None:
    given = {"ref": ["cat", "dog"], "bbox": [BOX, [1.5, 2]], "bbox_type": "norm1", "image_id": [1, 0]}
    assert read_objects({"objects": given}) == Objects(("cat", "dog"), ((100, 75, 200, 150), (1.5, 2)), "norm1", (1, 0))
    # null counts as absent, as tables have it; the first image is the default, as in ms-swift
    given = {"ref": None, "bbox": [BOX, BOX], "bbox_type": None, "image_id": None, "area": None}
    assert read_objects({"objects": given}) == Objects((), (tuple(BOX), tuple(BOX)), "real", (0, 0))


@pytest.mark.parametrize("given", [None, [], {}, [{"bbox": BOX, "label": "cat"}], "[]", {"bbox": [BOX], "area": [4]}])
def test_objects_of_another_form_are_no_objects(given: Any) -> None:
    """COCO in a Hugging Face dataset, detection lists: keys that nothing reads; a tag is then an error."""
    assert read_objects({"objects": given}) is None
    assert build_conversation(sample_of("A cat.", objects=given), ()).messages[1].text == "A cat."
    said = reason(sample_of("It is at <bbox>.", objects=given))
    assert "<bbox>" in said and ("not of that form" in said) is (given is not None)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"bbox": BOX}, "2, 4 or 8 numbers, x and y by turns, not 100"),
        ({"bbox": [[1, 2, 3]]}, "2, 4 or 8 numbers"),
        ({"bbox": [[1, "2"]]}, "2, 4 or 8 numbers"),
        ({"bbox": [[1, True]]}, "2, 4 or 8 numbers"),
        ({"bbox": "[]"}, "'bbox' must be a list, not str"),
        ({"ref": "cat"}, "'ref' must be a list, not str"),
        ({"ref": [1]}, "'ref' must be a list of texts"),
        ({"bbox": [BOX], "bbox_type": "norm1000"}, '\'bbox_type\' must be "real" (pixels) or "norm1" (0 to 1)'),
        ({"bbox": [BOX], "image_id": [0, 0]}, "for each of the 1 boxes, not [0, 0]"),
        ({"bbox": [BOX], "image_id": [-1]}, "from 0"),
        ({"bbox": [BOX], "image_id": [0.0]}, "one whole number"),
    ],
)
def test_objects_that_cannot_be_used(given: dict[str, Any], said: str) -> None:
    found = reason(sample_of("<bbox>", objects=given))
    assert said in found and found.startswith("'objects': ")


@pytest.mark.parametrize(
    ("answer", "objects", "said"),
    [
        ("<bbox>", {"bbox": [BOX, BOX]}, "1 <bbox> tags in the turns, 2 in 'bbox'"),
        ("<bbox><bbox>", {"bbox": [BOX]}, "2 <bbox> tags in the turns, 1 in 'bbox'"),
        ("<bbox>", {"bbox": [BOX], "ref": ["cat"]}, "0 <ref-object> tags in the turns, 1 in 'ref'"),
        ("<ref-object> <bbox>", {"bbox": [BOX]}, "1 <ref-object> tags in the turns, 0 in 'ref'"),
    ],
)
def test_tags_and_objects_have_to_be_as_many(answer: str, objects: Any, said: str) -> None:
    assert said in reason(sample_of(answer, objects=objects))


@pytest.mark.parametrize("key", ["question", "answer", "system"])
def test_tags_without_objects(key: str) -> None:
    values = {"question": "<image>Where?", "answer": "There.", key: "The <ref-object>"}
    values["question"] = values["question"].replace("The", "<image>The")
    said = reason(sample_of(**values))
    assert "a turn has <ref-object>" in said and "write the turn as parts" in said


def test_tags_that_are_words() -> None:
    """Typed text parts, and elements that are closed."""
    part = [{"type": "text", "text": "In KML, <bbox> opens it."}]
    assert build_conversation(sample_of(part), ()).messages[1].text == part[0]["text"]
    element = "<bbox>1 2 3 4</bbox>"
    assert build_conversation(sample_of(element), ()).messages[1].text == element


def test_reserved_tokens_of_a_text() -> None:
    objects = {"ref": ["a <|image_pad|>"]}
    said = reason(sample_of("<ref-object>", objects=objects), ("<|image_pad|>",), "reserved_token")
    assert said.startswith("'ref' of 'objects' holds <|image_pad|>")
