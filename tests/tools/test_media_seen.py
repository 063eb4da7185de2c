"""Media that people bring: what the tool that shows samples and the tool that checks them say of the same file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from tools import check_image, show_sample

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
        for one in shown:
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
    assert "16 bits a value, but none above" in shown["12_in_16.png"]["error"]
    assert "mode F" in shown["float.tif"]["error"] and "mode I" in shown["32.tif"]["error"]
