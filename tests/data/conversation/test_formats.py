"""Files in the formats of other trainers, through the tools: each row of the table in docs/data.md has its files here.

What is read must be the same tokens, labels, grids and frames as the same sample in the form of the README.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from qwenvl.cli.check_image.command import main as check_image
from qwenvl.cli.show_sample import main as show_sample
from tests.data.images import encoded, picture
from tests.data.media.video.test_decode import make_video

PAGE = Path(__file__).resolve().parents[3] / "docs" / "data.md"


def human(text: Any, **keys: Any) -> dict[str, Any]:
    return {"from": "human", "value": text, **keys}


def gpt(text: str, **keys: Any) -> dict[str, Any]:
    return {"from": "gpt", "value": text, **keys}


def user(content: Any, **keys: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **keys}


def assistant(content: Any, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **keys}


def plain(*texts: str, **fields: Any) -> dict[str, Any]:
    """A sample in the form of the README: a question, its answer, and so on."""
    turns = [gpt(text) if number % 2 else human(text) for number, text in enumerate(texts)]
    return {**fields, "conversations": turns}


@dataclass(frozen=True)
class Format:
    """What becomes of the samples of a format.

    Args:
        read: Samples, and the same ones in the form of the README.
        unread: Keys that are named.
        refused: Samples that cannot be used, and words of the reason.
        refused_files: Contents of .json files that cannot be opened, and words of the reason.
    """

    read: list[tuple[Any, dict[str, Any]]] = field(default_factory=list)
    unread: tuple[str, ...] = ()
    refused: list[tuple[Any, str]] = field(default_factory=list)
    refused_files: list[tuple[Any, str]] = field(default_factory=list)


PARTS = [{"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}, {"type": "text", "text": "What is it?"}]
TOOL = {"type": "function", "function": {"name": "zoom", "description": "Zooms.", "parameters": {}}}
EXPORT = {
    "id": 7,
    "data": {"image": "/data/upload/1/a.png"},
    "annotations": [{"id": 1, "result": [{"type": "rectanglelabels", "value": {"x": 5, "rectanglelabels": ["dot"]}}]}],
    "predictions": [],
}
COCO = {
    "info": {},
    "images": [{"id": 1, "file_name": "a.png", "width": 40, "height": 20}],
    "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4], "iscrowd": 0}],
    "categories": [{"id": 1, "name": "dot"}],
}

FORMATS = {
    "Qwen2-VL to Qwen3.5, official recipe": Format(
        [
            ({"image": ["a.png", "b.png"], "conversations": [human("<image>\n<image>\nSame?"), gpt("No.")]},
             plain("<image><image>Same?", "No.", image=["a.png", "b.png"])),
            ([plain("<video>\nWhat?", "A film.", video="a.mp4")], plain("<video>What?", "A film.", video="a.mp4")),
        ]
    ),
    "Qwen-VL": Format(
        [
            ({"id": "identity_0", "conversations": [
                {"from": "user", "value": "Picture 1: <img>a.png</img>\nPicture 2: <img>b.png</img>\nSame?"},
                {"from": "assistant", "value": "No."}]},
             plain("Picture 1: <image>Picture 2:<image> Same?", "No.", images=["a.png", "b.png"])),
        ]
    ),
    "LLaVA, LLaVA-OneVision": Format(
        [
            ({"id": "000000033471", "image": "a.png", "conversations": [human("What?\n<image>"), gpt("A dot.")]},
             plain("What?<image>", "A dot.", image="a.png")),
            ({"id": "1", "image": None, "conversations": [human("2 + 2?"), gpt("4")], "data_source": "math"},
             plain("2 + 2?", "4")),
        ],
        refused=[({"image": "a.png", "conversations": [human("What?"), gpt("A dot.")]}, "Put <image> where each")],
    ),
    "LLaVA-NeXT, LLaVA-Video": Format(
        [
            ({"id": "clip", "video": "a.mp4", "data_source": "0_30_s_academic",
              "conversations": [human("<image>\nWhat happens?"), gpt("It gets brighter.")]},
             plain("<video>\nWhat happens?", "It gets brighter.", video="a.mp4")),
        ]
    ),
    "InternVL": Format(
        [
            ({"id": 0, "image": "a.png", "width": 40, "height": 20,
              "conversations": [human("<image>\nWhat?"), gpt("Dot.")]},
             plain("<image>What?", "Dot.", image="a.png")),
            ({"id": 1, "image": ["a.png", "b.png"], "width_list": [40, 60], "height_list": [20, 20],
              "conversations": [human("Image-1: <image>\nImage-2: <image>\nSame?"), gpt("No.")]},
             plain("Image-1:<image>Image-2:<image>Same?", "No.", image=["a.png", "b.png"])),
            ({"id": 2, "video": "a.mp4", "conversations": [human("<video>\nWhat?"), gpt("A film.")]},
             plain("<video>What?", "A film.", video="a.mp4")),
        ],
        refused_files=[({"dots": {"root": "dots/", "annotation": "dots.jsonl", "repeat_time": 1}}, "list of datasets")],
    ),
    "LLaMA-Factory, sharegpt": Format(
        [
            ({"conversations": [human("<image>What?"), gpt("A dot."), human("Sure?"), gpt("Yes.")], "images": ["a.png"],
              "system": "Be brief.", "tools": ""},
             {"system": "Be brief.", **plain("<image>What?", "A dot.", "Sure?", "Yes.", image="a.png")}),
            ({"messages": [user("<video>What?"), assistant("A film.")], "videos": ["a.mp4"], "audios": []},
             plain("<video>What?", "A film.", video="a.mp4")),
            ({"conversations": [human("Who?"), gpt("Me."), human("Why?")],
              "chosen": gpt("So."), "rejected": gpt("No.")},
             plain("Who?", "Me.", "Why?")),
        ],
        unread=("'chosen'", "'rejected'"),
        refused=[
            ({"messages": [user("<audio>What?"), assistant("Noise.")], "audios": ["a.mp3"]}, "The models cannot hear"),
            ({"conversations": [human("Why?")], "chosen": gpt("So."), "rejected": gpt("No.")}, "no assistant turn"),
        ],
        refused_files=[({"dots": {"file_name": "dots.json", "formatting": "sharegpt"}}, "list of datasets")],
    ),
    "LLaMA-Factory, alpaca": Format(
        [
            ({"instruction": "<image>What is it?", "input": "One word.", "output": "Dot.", "images": ["a.png"],
              "system": "Be brief.", "history": [["Hello.", "Hi."]]},
             {"system": "Be brief.", **plain("Hello.", "Hi.", "<image>What is it?\nOne word.", "Dot.", image="a.png")}),
            ({"instruction": "<video>What?", "input": "", "output": "A film.", "videos": ["a.mp4"], "kto_tag": True},
             plain("<video>What?", "A film.", video="a.mp4")),
        ],
        refused=[
            ({"instruction": "Who?", "input": "", "chosen": "Me.", "rejected": "You."}, "a preference, which is not"),
            ({"instruction": "Who?", "input": "", "output": "You.", "kto_tag": False}, "'kto_tag' false, which in KTO"),
        ],
    ),
    "ms-swift": Format(
        [
            ({"messages": [user("<image>What?"), assistant("A cat."), user("Look again."), assistant("A dot.")],
              "images": ["a.png"]},
             plain("<image>What?", "A cat.", "Look again.", "A dot.", image="a.png")),
            ({"messages": [user("<image>What?"), assistant("A cat.", loss=False), user("No."), assistant("A dot.")],
              "images": ["a.png"]},
             {"image": "a.png", "conversations": [human("<image>What?"), gpt("A cat.", weight=0), human("No."),
                                                  gpt("A dot.")]}),
            ({"query": "<image>What?", "response": "A dot.", "history": [["Hello.", "Hi."]], "images": ["a.png"],
              "rejected_response": "A cat."},
             plain("Hello.", "Hi.", "<image>What?", "A dot.", image="a.png")),
            ({"system": "Be brief.", "conversation": [{"human": "<video>What?", "assistant": "A film."}],
              "videos": ["a.mp4"]},
             {"system": "Be brief.", **plain("<video>What?", "A film.", video="a.mp4")}),
        ],
        unread=("'rejected_response'",),
        refused=[
            ({"messages": [user("<audio>What?"), assistant("Noise.")], "audios": ["a.wav"]}, "The models cannot hear"),
            ({"messages": [user("Who?"), assistant("You.")], "label": False}, "'label' false, which in KTO"),
        ],
    ),
    "TRL": Format(
        [
            ({"messages": [user([{"type": "image"}, {"type": "text", "text": "What?"}]),
                           assistant([{"type": "text", "text": "A dot."}])], "images": ["a.png"]},
             plain("<image>What?", "A dot.", image="a.png")),
            ({"prompt": [user([{"type": "image"}, {"type": "text", "text": "What?"}]), assistant("A cat."),
                         user("No.")],
              "completion": [assistant("A dot.")], "image": "a.png"},
             {"image": "a.png", "conversations": [human("<image>What?"), gpt("A cat.", loss=False), human("No."),
                                                  gpt("A dot.")]}),
            ({"prompt": "Who?", "completion": "Me."}, plain("Who?", "Me.")),
        ],
        refused=[
            ({"prompt": [user("Who?")], "chosen": [assistant("Me.")], "rejected": [assistant("You.")]}, "a preference"),
            ({"prompt": [user("Who?")], "completion": [assistant("You.")], "label": False}, "'label' false"),
            ({"text": "Once upon a time."}, "'text' does not say what is question and what answer"),
        ],
    ),
    "OpenAI": Format(
        [
            ({"messages": [{"role": "system", "content": "Be brief."}, user(PARTS), assistant("A cat.", weight=0),
                           user("No."), assistant("A dot.", weight=1)], "tools": [TOOL], "parallel_tool_calls": False},
             {"system": "Be brief.", "tools": [TOOL], "image": "a.png",
              "conversations": [human("<image>What is it?"), gpt("A cat.", loss=False), human("No."), gpt("A dot.")]}),
        ],
        unread=("'parallel_tool_calls'",),
        refused=[
            ({"messages": [user([{"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}]),
                           assistant("Noise.")]}, "'input_audio'. The models cannot hear"),
        ],
    ),
    "Ollama": Format(
        [
            ({"messages": [user("Same?", images=["a.png", "b.png"]), assistant("No."),
                           user("And this?", images=["a.png"]), assistant("It is.")]},
             plain("<image><image>Same?", "No.", "<image>And this?", "It is.", images=["a.png", "b.png", "a.png"])),
        ]
    ),
    "MMMU": Format(
        [
            ({"id": "validation_1", "image_1": "b.png", "image_2": "a.png", "image_3": None,
              "conversations": [human("<image> or <image>?"), gpt("The first.")]},
             plain("<image>or<image>?", "The first.", images=["b.png", "a.png"])),
        ],
        refused=[({"image_1": "a.png", "conversations": [human("<image 1> What?"), gpt("A dot.")]}, "Put <image>")],
    ),
    "VideoChat2, Charades-STA, ActivityNet": Format(
        [
            ({"video": "a.mp4", "start": 0.4, "end": 1.2, "conversations": [human("<video>What?"), gpt("A film.")]},
             plain("<video>What?", "A film.", video={"video": "a.mp4", "video_start": 0.4, "video_end": 1.2})),
        ],
        refused=[
            ({"videos": ["a.mp4", "a.mp4"], "start": 0.4, "conversations": [human("<video><video>?"), gpt("Films.")]},
             "'start' beside 2 videos. Write it into the object"),
        ],
    ),
    "DocVQA, ChartQA, the Cauldron": Format(
        refused=[
            ({"question": "What?", "answers": ["A dot."], "image": "a.png"}, 'Write "conversations"'),
            ({"query": "What?", "label": ["A dot."], "image": "a.png"}, "'query' goes with 'response', which is"),
            ({"images": ["a.png"], "texts": [{"user": "What?", "assistant": "A dot.", "source": "x"}]}, "Of 'texts'"),
        ]
    ),
    "Label Studio": Format(refused=[(EXPORT, "It is an export of Label Studio, with labels and without a question")]),
    "COCO": Format(
        refused=[(COCO["annotations"][0], "an annotation of COCO")],
        refused_files=[(COCO, "looks like COCO"), ({"images": COCO["images"]}, "looks like COCO")],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("formats")
    for name, width in (("a.png", 80), ("b.png", 120)):
        (folder / name).write_bytes(encoded(picture(width, 60), "PNG"))
    make_video(folder / "a.mp4")
    return folder


@dataclass
class Tools:
    """The tools, on files of a test."""

    folder: Path
    media: Path
    model: Path
    capsys: pytest.CaptureFixture[str]

    def write(self, records: list[Any], name: str) -> list[str]:
        file = self.folder / name
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        flags = ["--annotation_path", file, "--data_path", self.media, "--model_name_or_path", self.model]
        return list(map(str, flags))

    def show(self, records: list[Any], name: str = "d.jsonl") -> tuple[list[dict[str, Any]], set[str]]:
        """What show_sample writes of records, and the keys that it says nothing reads."""
        lines = self.folder / "shown.jsonl"
        show_sample([*self.write(records, name), "--all", "--json", str(lines)])
        said = re.findall(r"nothing reads (.*)\.$", self.capsys.readouterr().err, re.MULTILINE)
        return [{**json.loads(line), "id": None} for line in lines.read_text().splitlines()], set(said)

    def check(self, records: list[Any], name: str = "d.jsonl") -> tuple[int, str]:
        """Exit code and output of check_image."""
        code = check_image([*self.write(records, name), "--output", str(self.folder), "--workers", "0"])
        return code, "".join(self.capsys.readouterr())


@pytest.fixture
def tools(
    tmp_path: Path, media: Path, tiny_checkpoint: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> Tools:
    return Tools(tmp_path, media, tiny_checkpoint("qwen3_vl"), capsys)


def test_the_table_has_these_rows() -> None:
    section = PAGE.read_text(encoding="utf-8").split("## Formats of other trainers")[1].split("\n## ")[0]
    rows = re.findall(r"^\| ([^|]+?) \|", section, re.MULTILINE)
    assert rows[1:] == list(FORMATS) and rows[0] == "format"


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form.read])
def test_what_is_read_is_the_sample_of_the_readme(name: str, tools: Tools) -> None:
    form = FORMATS[name]
    shown, unread = tools.show([record for record, _ in form.read])
    expected, none = tools.show([record for _, record in form.read])
    assert all("error" not in one for one in expected) and none == set()
    assert shown == expected
    assert unread == set(form.unread)
    code, output = tools.check([record for record, _ in form.read])
    keys = ", ".join(form.unread)
    assert code == 0 and (f"Dataset 'd': nothing reads {keys}." in output if keys else "nothing reads" not in output)


@pytest.mark.parametrize("name", [name for name, form in FORMATS.items() if form.refused or form.refused_files])
def test_what_is_refused_says_why(name: str, tools: Tools) -> None:
    for record, said in FORMATS[name].refused:
        (shown,), _ = tools.show([record])
        assert said in shown["error"]
        code, output = tools.check([record])
        assert code == 1 and said in output
    for content, said in FORMATS[name].refused_files:
        code, output = tools.check([content], "d.json")
        assert code == 2 and said in output
