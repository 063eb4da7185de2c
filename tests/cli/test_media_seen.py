"""Media that people bring: what the tool that shows samples and the tool that checks them say of the same file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw
from transformers import AutoTokenizer

from qwenvl.cli import show_sample
from qwenvl.cli.check_image import command as check_image
from tests.data.clips import UNEVEN, encode
from tests.data.media.video.test_decode import make_video, turn

Seen = Callable[..., tuple[dict[str, Any], list[str]]]


@pytest.fixture
def seen(tmp_path: Path, tiny_checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> Seen:
    """Function of the media of samples, all one kind: what is shown of each, by name; asserts that both tools agree.

    Shown are the statistics and times of a sample, or the reason why there are none.
    """

    def look(*media: Any, kind: str = "image", family: str = "qwen3_vl") -> dict[str, Any]:
        turns = [{"from": "human", "value": f"<{kind}>What?"}, {"from": "gpt", "value": "It."}]
        records = [{"id": str(number), kind: item, "conversations": turns} for number, item in enumerate(media)]
        (tmp_path / "set.jsonl").write_text("\n".join(map(json.dumps, records)))
        flags = ["--annotation_path", str(tmp_path / "set.jsonl"), "--data_path", str(tmp_path)]
        flags += ["--model_name_or_path", str(tiny_checkpoint(family))]
        show_sample.main([*flags, "--all", "--json", str(tmp_path / "shown.jsonl")])
        check_image.main([*flags, "--decode", "--output", str(tmp_path), "--workers", "0"])
        capsys.readouterr()
        shown = [json.loads(line) for line in (tmp_path / "shown.jsonl").read_text().splitlines()]
        problems = (tmp_path / "set_problems.jsonl").read_text().splitlines()
        found = {one["id"]: one["reason"] for one in map(json.loads, problems) if one["category"] != "duplicate"}
        tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint(family))
        for one in shown:
            one["text"] = tokenizer.decode(one.get("input_ids", []))
            assert ("error" in one) == (one["id"] in found)
            assert found.get(one["id"], "") in one.get("error", "")
        return {str(item): one for item, one in zip(media, shown, strict=True)}

    return look


def drawing() -> Image.Image:
    image = Image.new("RGB", (96, 64), (200, 230, 255))
    ImageDraw.Draw(image).rectangle([10, 20, 60, 50], fill=(220, 30, 30))
    return image


def test_a_gray_image_of_16_bits_is_seen_as_its_8_bit_copy(tmp_path: Path, seen: Seen) -> None:
    gray = np.asarray(drawing().convert("L"))
    Image.fromarray(gray).save(tmp_path / "8.png")
    for name in ("16.png", "16.tif", "16.jp2"):
        Image.fromarray(gray.astype(np.uint16) * 257).save(tmp_path / name)
    Image.fromarray(gray.astype(np.uint16) * 16).save(tmp_path / "12_in_16.png")
    Image.fromarray(gray.astype(np.float32) / 255).save(tmp_path / "float.tif")
    Image.fromarray(gray.astype(np.int32) * 257).save(tmp_path / "32.tif")
    shown = seen("8.png", "16.png", "16.tif", "16.jp2", "12_in_16.png", "float.tif", "32.tif")
    expected = shown["8.png"]["pixel_values"]
    assert expected["std"] > 0.1
    for name in ("16.png", "16.tif", "16.jp2"):
        assert shown[name]["pixel_values"] == expected, name
    assert "16 bits per value, but none above" in shown["12_in_16.png"]["error"]
    assert "mode F" in shown["float.tif"]["error"] and "mode I" in shown["32.tif"]["error"]


def test_videos_that_decoders_differ_in_are_seen_alike(tmp_path: Path, seen: Seen) -> None:
    """AV1, a transport stream, GIF and animated WebP: the same 20 frames, 10 a second."""
    encode(tmp_path / "h264.mp4", "libx264")
    for name, codec in (("av1.mp4", "libsvtav1"), ("a.ts", "libx264"), ("a.wmv", "wmv2")):
        encode(tmp_path / name, codec)
    frames = [Image.new("RGB", (64, 48), (10 * number,) * 3) for number in range(20)]
    for name in ("a.gif", "a.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], duration=100, lossless=True)
    shown = seen("h264.mp4", "av1.mp4", "a.ts", "a.wmv", "a.gif", "a.webp", kind="video")
    expected = shown["h264.mp4"]
    assert expected["pixel_values_videos"]["std"] > 0.1
    for name, one in shown.items():
        assert one["input_ids"] == expected["input_ids"], name
        for value in ("mean", "std"):
            assert one["pixel_values_videos"][value] == pytest.approx(expected["pixel_values_videos"][value], abs=0.02)


def test_uneven_frames_have_their_real_times(tmp_path: Path, seen: Seen) -> None:
    encode(tmp_path / "a.mp4", "libx264", UNEVEN)
    part = {"video": "a.mp4", "video_start": 12, "video_end": 18}
    gap = {"video": "a.mp4", "video_start": 2, "video_end": 5}
    whole, cut, none = seen("a.mp4", [part], [gap], kind="video").values()
    assert re.findall(r"<(\d+\.\d) seconds>", whole["text"]) == ["0.1", "0.8", "1.5", "11.9"]
    assert re.findall(r"<(\d+\.\d) seconds>", cut["text"]) == ["15.9"]
    assert "video_start=2.0 and video_end=5.0 leave no frames" in none["error"]


def test_turned_videos_are_seen_upright(tmp_path: Path, seen: Seen) -> None:
    make_video(tmp_path / "a.mp4")
    turn(tmp_path / "a.mp4", (0, 1, -1, 0))
    flat, upright = seen("a.mp4", "turned.mp4", kind="video").values()
    assert flat["video_grid_thw"] != upright["video_grid_thw"]
    assert sorted(flat["video_grid_thw"][0][1:]) == sorted(upright["video_grid_thw"][0][1:])


def test_videos_that_cannot_be_used_say_why(tmp_path: Path, seen: Seen) -> None:
    make_video(tmp_path / "one.mp4", 1)
    for frames in (2, 3, 5):
        make_video(tmp_path / f"{frames}.mp4", frames)
    content = (tmp_path / "5.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) // 2])
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "zeros.mp4").write_bytes(bytes(5000))
    (tmp_path / "frames").mkdir()
    names = ("2.mp4", "3.mp4", "5.mp4", "one.mp4", "cut.mp4", "empty.mp4", "zeros.mp4", "frames")
    shown = seen(*names, kind="video")
    reasons = {name: one.get("error", "") for name, one in shown.items()}
    assert [name for name in names if not reasons[name]] == ["2.mp4", "3.mp4", "5.mp4"]
    assert "Give a still image as `image`" in reasons["one.mp4"]
    assert "may be cut off" in reasons["cut.mp4"]
    assert "is empty (0 bytes)" in reasons["empty.mp4"]
    assert "a file of zeros" in reasons["zeros.mp4"]
    assert 'is a folder. Name a file; of a video as frames, all of them, in order: {"frames"' in reasons["frames"]


def test_the_rate_of_a_list_of_frames_may_be_a_text(tmp_path: Path, seen: Seen) -> None:
    for number in range(4):
        Image.new("RGB", (64, 48), (60 * number, 0, 0)).save(tmp_path / f"{number}.png")
    names = [f"{number}.png" for number in range(4)]
    number, text, word = seen(
        *({"frames": names, "sample_fps": rate} for rate in (1, "1", "fast")), kind="video"
    ).values()
    assert re.findall(r"<(\d+\.\d) seconds>", text["text"]) == ["0.5", "2.5"]
    assert text["input_ids"] == number["input_ids"]
    assert "'sample_fps' must be a number above 0, not 'fast'" in word["error"]
