"""Paths of records written anew: of every place where a record may have media, and of nothing else."""

from __future__ import annotations

from typing import Any

import pytest

from qwenvl.data.packing.official_json import with_sources
from tests.data.records import ANSWER, build

TURN = {"role": "user", "content": "<image>"}


@pytest.mark.parametrize(
    "record",
    [
        {"image": "a", "messages": [TURN, ANSWER]},
        {"images": [{"image": "a", "max_pixels": 9}, "b"], "messages": [{**TURN, "content": "<image><image>"}, ANSWER]},
        {"image_path": "a", "messages": [TURN, ANSWER]},
        {"image_2": "a", "image_1": "b", "messages": [{**TURN, "content": "<image><image>"}, ANSWER]},
        {"video_path": "a", "start": 1, "messages": [TURN, ANSWER]},
        {"video": [["a", {"path": "b"}]], "messages": [{**TURN, "content": "<video>"}, ANSWER]},
        {"messages": [{**TURN, "images": ["a"]}, ANSWER]},
        {"messages": [{"role": "user", "content": "a", "image": "a"}, ANSWER]},
        {"messages": [{"role": "user", "content": "Picture 1: <img> a b </img> <image>"}, ANSWER], "images": ["c"]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "a"}}]}, ANSWER]},
        {"query": "<img>a</img>", "response": "<img>b</img>", "history": [["<img>c</img>", "d"]]},
        {"prompt": [{**TURN, "images": ["a"]}], "completion": "b"},
    ],
)
def test_sources_of_every_form_are_changed(record: dict[str, Any]) -> None:
    def change(source: str) -> str:
        return f"/full/{source}"

    def changed(source: Any) -> Any:
        return tuple(map(change, source)) if isinstance(source, tuple) else change(source)

    before, after = build(record), build(with_sources(record, change))
    assert [item.source for item in after.media()] == [changed(item.source) for item in before.media()]
    assert [message.text for message in after.messages] == [message.text for message in before.messages]
