"""The lines of other programs: llama.cpp's, whose limits are whole tokens."""

from __future__ import annotations

import pytest

from qwenvl.serving.commands import Served
from qwenvl.serving.programs import Model, program_lines, program_notes


@pytest.mark.parametrize(
    ("limits", "flags", "noted"),
    [
        ((65536, 16777216), "--image-min-tokens 64 --image-max-tokens 16384", False),
        ((12544, 451584), "--image-min-tokens 13 --image-max-tokens 441", True),
        ((65536, 451585), "--image-min-tokens 64 --image-max-tokens 441", True),
    ],
)
def test_limits_of_llama_cpp_stay_within_those_of_training(limits: tuple[int, int], flags: str, noted: bool) -> None:
    size = {"shortest_edge": limits[0], "longest_edge": limits[1]}
    given = {"image_processor": {"size": size}, "video_processor": {"size": size, "fps": 2, "max_frames": 8}}
    served = Served("model", given, carried=True, clips=False, max_length=4096, counts={"image": 1, "video": 0})
    model = Model("qwen3_vl", factor=32)
    line = program_lines(served, model)["llama.cpp"]
    assert line == f"llama-server -m MODEL.gguf --mmproj MMPROJ.gguf -c 4096 {flags}"
    said = "llama.cpp counts limits in whole tokens of 32 x 32 pixels"
    assert any(note.startswith(said) for note in program_notes(served, model)) is noted


@pytest.mark.parametrize(
    ("requests", "argument", "noted"),
    [
        ({'{"enable_thinking": false}': 3}, ",enable_thinking=False ", False),
        ({'{"enable_thinking": true}': 3}, ",enable_thinking=True ", False),
        ({'{"enable_thinking": false}': 3, '{"enable_thinking": true}': 1}, "", True),
        ({"{}": 3}, "", True),
    ],
)
def test_lmms_eval_asks_with_the_thoughts_of_training(requests: dict[str, int], argument: str, noted: bool) -> None:
    """Its class of Qwen3.5 asks for thoughts by default, and makes an answer without them an empty one."""
    size = {"shortest_edge": 65536, "longest_edge": 16777216}
    given = {"image_processor": {"size": size}, "video_processor": {"size": size, "fps": 2, "max_frames": 8}}
    counts = {"image": 1, "video": 0}
    served = Served("model", given, carried=True, clips=False, max_length=4096, counts=counts, requests=requests)
    line = program_lines(served, Model("qwen3_5", factor=32))["lmms-eval"]
    assert argument in line and line.endswith(" --gen_kwargs temperature=0 --tasks TASKS")
    assert ("enable_thinking" in line) is not noted
    own = program_lines(served, Model("qwen3_5", factor=32))["transformers"]
    assert own.endswith(f"{argument.strip().replace(',', ', ')})") and ("enable_thinking" in own) is not noted
    said = "lmms-eval asks all questions of this family with enable_thinking=True"
    assert any(note.startswith(said) for note in program_notes(served, Model("qwen3_5", factor=32))) is noted
    assert "temperature" not in program_lines(served, Model("qwen3_vl", factor=32))["lmms-eval"]
