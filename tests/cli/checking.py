"""A folder of good and broken media, records about them, and the tool that checks them, for its tests."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from PIL import Image

from tests.data.media.video.test_decode import make_video

Check = Callable[..., tuple[int, str, str]]


def sample(
    identifier: str, question: str = "<image>\nWhat?", answer: str | None = None, **fields: Any
) -> dict[str, Any]:
    """Return a record with an answer of its own, fields that are null, and words that are not ASCII."""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer or f"Grün: {identifier}."}]
    return {"id": identifier, "source": None, "conversations": turns, "score": 1.50, **fields}


def write_media(folder: Path) -> None:
    """Write what the names of the files say."""
    folder.mkdir()
    noise = Image.effect_noise((400, 300), 60).convert("RGB")
    noise.save(folder / "a.jpg")
    noise.save(folder / "b.jpg", exif=_orientation(6))
    content = (folder / "a.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(content[: len(content) // 2])
    (folder / "cut_header.jpg").write_bytes(content[:100])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "page.jpg").write_text("<!doctype html><html><body>404</body></html>")
    noise.save(folder / "png.jpg", "PNG")
    Image.new("RGB", (3000, 10)).save(folder / "wide.png")
    Image.new("1", (20_000, 20_000)).save(folder / "bomb.png")
    (folder / "folder.jpg").mkdir()
    make_video(folder / "clip.mp4")
    make_video(folder / "one.mp4", frames=1)
    (folder / "cut.mp4").write_bytes((folder / "clip.mp4").read_bytes()[:200])
    (folder.parent / "outside.jpg").write_bytes(content)


def _orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


GOOD = [
    sample("jpeg", image="a.jpg"),
    sample("turned", image=["b.jpg"], video=None),
    sample("a PNG by the name of a JPEG", image="png.jpg"),
    sample("clip", "<video>Where?", video="clip.mp4"),
    sample("words", "Hello?"),
    sample("frames", "<video>?", video=[["a.jpg", "png.jpg"]]),
    # 400 x 300 pixels as stored, 300 x 400 as shown
    sample("box", answer='{"bbox_2d": [10, 20, 300, 400]}', image="b.jpg", bbox_format="pixel"),
]

BAD: list[tuple[list[str], dict[str, Any]]] = [
    (["missing_file"], sample("none", image="none.jpg")),
    (["zero_byte"], sample("empty", image="empty.jpg")),
    (["wrong_type"], sample("page", image="page.jpg")),
    (["wrong_type"], sample("folder", image="folder.jpg")),
    (["truncated"], sample("header", image="cut_header.jpg")),
    (["unreadable_file"], sample("film", "<video>", video="cut.mp4")),
    (["one_frame"], sample("one", "<video>", video="one.mp4")),
    (["extreme_ratio"], sample("wide", image="wide.png")),
    (["decompression_bomb"], sample("bomb", image="bomb.png")),
    (["outside_data_path"], sample("outside", image="../outside.jpg")),
    (["remote_not_allowed"], sample("remote", image="https://example.com/a.jpg")),
    (["too_many_tags"], sample("many", "<image><image>", image="a.jpg")),
    (["too_few_tags"], sample("few", image=["a.jpg", "b.jpg"])),
    (["no_answer"], {"id": "silent", "conversations": [{"from": "human", "value": "Hello?"}]}),
    (["reserved_token"], sample("pad", answer="<|image_pad|>", image="a.jpg")),
    (["bad_role"], {"id": "role", "conversations": [{"from": "cat", "value": "Miaow"}]}),
    (["bad_record"], {"id": "fields", "text": "Hello"}),
    (
        ["bad_boxes"],
        sample("box outside", answer='{"bbox_2d": [10, 20, 301, 400]}', image="b.jpg", bbox_format="pixel"),
    ),
    (["bad_record"], sample("format", image="a.jpg", bbox_format="voc")),
    # all problems, not the first alone
    (
        ["bad_role", "missing_file", "reserved_token", "zero_byte"],
        {
            "id": "everything",
            "conversations": [{"from": "cat", "value": "<image>"}, {"from": "human", "value": "<|vision_end|>"}],
            "images": ["none.jpg", "empty.jpg"],
        },
    ),
    (
        ["missing_file", "no_answer", "reserved_token", "too_many_tags", "wrong_type"],
        {
            "id": "more",
            "conversations": [{"from": "human", "value": "<image><image><image><|vision_end|>"}],
            "images": ["none.jpg", "page.jpg"],
        },
    ),
    (
        ["bad_boxes", "bad_boxes"],
        sample("boxes", '<image>"point_2d": [1, 999]', '"bbox_2d": [1]', image="a.jpg", bbox_format="pixel"),
    ),
]
"""Categories and a record that has them."""

REFUSED_HERE_ALONE: list[tuple[list[str], dict[str, Any]]] = [
    (["tag_in_answer"], sample("tag", answer="As <image> shows.", image="a.jpg")),
    (["duplicate"], {**sample("jpeg", image="a.jpg"), "id": "again", "source": "elsewhere"}),
]
"""What training takes."""

ALL: list[tuple[list[str], dict[str, Any]]] = [*(([], record) for record in GOOD), *BAD, *REFUSED_HERE_ALONE]


def write_lines(path: Path, records: Iterable[Any]) -> Path:
    """Write JSON lines, words as they are."""
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def read_lines(path: Path) -> list[Any]:
    """Parse JSON lines."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def problems(tmp_path: Path, name: str = "set") -> dict[str, list[str]]:
    """Categories of the problems of each sample, by id, sorted."""
    found: dict[str, list[str]] = {}
    for record in read_lines(tmp_path / "out" / f"{name}_problems.jsonl"):
        assert list(record) == ["dataset", "file", "line", "id", "member", "category", "reason"]
        assert record["reason"]
        found.setdefault(record["id"], []).append(record["category"])
    return {identifier: sorted(categories) for identifier, categories in found.items()}
