"""The site of samples and datasets."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageDraw

from qwenvl.cli.view_data.command import main
from tests.browser import dom, needs_chromium
from tests.cli.pages import Figures
from tests.data.media.video.test_decode import make_video

HOSTILE = '</script><img src=x onerror="document.title=1"><b>bold</b> \u2028 ${x} é 😀'
BOX = '[{"bbox_2d": [160, 120, 320, 360], "label": "apple"}]'
LONG = "word " * 400


def turns(question: str, answer: str) -> dict[str, Any]:
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def write_sets(folder: Path) -> Path:
    """Two datasets with every kind of sample and problem; return their registry."""
    image = Image.new("RGB", (640, 480), "ivory")
    ImageDraw.Draw(image).ellipse((160, 120, 320, 360), fill="crimson")
    image.save(folder / "a.png")
    make_video(folder / "a.mp4")
    (folder / "cut.jpg").write_bytes(b"\xff\xd8\xff")
    one = [
        {"id": "hostile", **turns(f"Say {HOSTILE}", HOSTILE)},
        {"id": "box", "image": "a.png", "bbox_format": "pixel", **turns("<image>Where is the apple?", BOX)},
        {"id": "clip", "video": "a.mp4", **turns("<video>What happens?", "It gets brighter.")},
        {"id": "two", "image": ["a.png", "a.png"], **turns("<image><image>Which?", "Both.")},
        {"id": "gone", "image": "none.png", **turns("<image>What?", "Nothing.")},
        {"id": "cut", "image": "cut.jpg", **turns("<image>What?", "Nothing.")},
        {"id": "long", **turns("Say much.", LONG)},
    ]
    lines = [json.dumps(record) for record in one]
    lines.insert(3, '{"id": 4, ')
    (folder / "mixed.jsonl").write_text("\n".join(lines))
    (folder / "plain.json").write_text(
        json.dumps([{"id": f"plain{n}", **turns(f"Question {n}?", f"Answer {n}.")} for n in range(40)])
    )
    files = (("mixed", "mixed.jsonl"), ("plain", "plain.json"))
    entries = {name: {"annotation_path": str(folder / file), "data_path": str(folder)} for name, file in files}
    (folder / "registry.py").write_text(f"data_dict = {entries!r}")
    return folder / "registry.py"


@pytest.fixture
def view(tmp_path: Path, tiny_checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Function of flags that writes the site into tmp_path/site and returns the exit code."""
    monkeypatch.setenv("QWENVL_CACHE", str(tmp_path / "cache"))
    registry = write_sets(tmp_path)

    def run(*flags: str, family: str = "qwen3_vl") -> int:
        fixed = ["--model_name_or_path", str(tiny_checkpoint(family)), "--output", str(tmp_path / "site")]
        return main([*fixed, "--dataset_registry", str(registry), "--num_workers", "0", *flags])

    return run


ALL = ("--dataset_use", "mixed,plain%50", "--model_max_length", "400", "--max_pixels", "160*160", "--min_pixels", "1")


def written(site: Path, name: str) -> list[Any]:
    """Return what the data files of one kind hold."""
    found: list[Any] = []
    for number in range(len(list((site / "data").glob(f"{name}_*.js")))):
        text = (site / "data" / f"{name}_{number}.js").read_text(encoding="ascii")
        head = f"viewer.{name}({number},"
        assert text.startswith(head) and text.endswith(");\n")
        found += json.loads(text[len(head) : -3])
    return found


def by_id(site: Path) -> dict[str, Any]:
    return {record["id"]: record for record in written(site, "samples")}


def test_samples_are_as_the_model_gets_them(view: Callable[..., int], tmp_path: Path) -> None:
    assert view(*ALL) == 0
    samples = by_id(tmp_path / "site")
    box = samples["box"]
    (medium,) = box["media"]
    (shown,) = medium["frames"]
    width, height = medium["size"]
    assert Image.open(tmp_path / "site" / shown["full"]).size == (width, height)
    assert medium["before"] == [640, 480] and width * height <= 160 * 160
    left, top, right, bottom, as_written = medium["boxes"][0]
    assert as_written == "250, 250, 500, 750"  # the family's own, of pixels in the file
    assert [left / width, top / height, right / width, bottom / height] == pytest.approx(
        [0.25, 0.25, 0.5, 0.75], abs=0.01
    )
    vision = [content for kind, content in box["runs"] if kind == 2]
    assert [one[2] for one in vision] == [box["vision"]] == [width * height // 32**2]
    trained = "".join(text for kind, content in box["runs"] if kind == 1 for text, _, _ in content)
    assert trained.startswith('[{"bbox_2d": [250, 250, 500, 750]') and trained.endswith("<|im_end|>\n")
    pieces = [piece for kind, content in box["runs"] if kind != 2 for piece in content]
    assert sum(len(piece[1].split()) for piece in pieces) + box["vision"] == box["tokens"]
    clip = samples["clip"]["media"][0]
    assert [frame["time"] for frame in clip["frames"]] == [0.0, 0.62, 1.12, 1.75, 2.25, 2.88]
    assert (samples["clip"]["kind"], samples["two"]["kind"], samples["hostile"]["kind"]) == ("video", "images", "text")


def test_boxes_are_drawn_in_pixels_for_the_family_that_writes_pixels(view: Callable[..., int], tmp_path: Path) -> None:
    assert view(*ALL, family="qwen2_5_vl") == 0
    (medium,) = by_id(tmp_path / "site")["box"]["media"]
    width, height = medium["size"]
    assert medium["boxes"][0][:4] == [
        round(0.25 * width),
        round(0.25 * height),
        round(0.5 * width),
        round(0.75 * height),
    ]


def test_problems_come_with_their_reasons(view: Callable[..., int], tmp_path: Path) -> None:
    assert view(*ALL) == 0
    problems = {name: dict(record["problems"]) for name, record in by_id(tmp_path / "site").items()}
    assert "none.png does not exist" in problems["gone"]["missing_file"]
    assert "cut.jpg" in "".join(problems["cut"].values())
    assert "more than --model_max_length 400" in problems["long"]["overlength"]
    assert "bad_json" in problems[None]
    assert problems["box"] == {}
    assert by_id(tmp_path / "site")["long"]["tokens"] > 400  # shown whole all the same
    page = (tmp_path / "site" / "datasets.html").read_text()
    assert "none.png does not exist" in page and "overlength" in page
    assert view(*ALL, "--overlength", "truncate_turns", "--dataset_use", "mixed") == 0
    truncating = turns("Hi?", "Ho.")["conversations"] + turns("More?", LONG)["conversations"]
    (tmp_path / "plain.json").write_text(json.dumps([{"id": "cut off", "conversations": truncating}]))
    assert view("--overlength", "truncate_turns", "--dataset_use", "plain", "--model_max_length", "400") == 0
    assert "the last 2 turns left out" in dict(by_id(tmp_path / "site")["cut off"]["problems"])["truncated_turns"]


def test_the_page_of_datasets_counts_all_rows_and_shows_packs(view: Callable[..., int], tmp_path: Path) -> None:
    assert view(*ALL, "--limit", "3", "--data_packing", "True") == 0
    source = (tmp_path / "site" / "datasets.html").read_text()
    page = Figures(source)
    rows = re.findall(r"<tr><td>(mixed|plain)</td>(.*?)</tr>", source)
    assert [re.findall("<td>(.*?)</td>", cells)[:4] for _, cells in rows[:2]] == [
        ["100%", "8", "8", "4"],
        ["50%", "40", "20", "20"],
    ]
    for title in (
        "Trained tokens",
        "Images per sample",
        "Resolution after resizing",
        "Turns",
        "Length of videos",
        "Packs",
    ):
        assert title in page.text
    drawn = re.search(r"(\d+) packs of up to 400 tokens", page.text)
    assert drawn and len(re.findall(r'class="room"', source)) == int(drawn[1])
    assert len(re.findall(r'class="c\d member"', source)) == 24  # every usable row is in one
    assert page.tags.count("script") == 0
    shown = written(tmp_path / "site", "samples")
    assert len(shown) < 15 and {record["dataset"] for record in shown} == {"mixed", "plain"}


def test_several_processes_write_what_one_does(view: Callable[..., int], tmp_path: Path) -> None:
    sites = []
    for workers in ("1", "3"):
        assert view(*ALL, "--num_workers", workers) == 0
        site = tmp_path / "site"
        sites.append({path.relative_to(site): path.read_bytes() for path in site.rglob("*") if path.is_file()})
    assert sites[0] == sites[1] and any("media" in path.parts for path in sites[0])


def test_nothing_is_loaded_from_elsewhere_and_text_stays_text(view: Callable[..., int], tmp_path: Path) -> None:
    (tmp_path / "more.py").write_text(
        (tmp_path / "registry.py").read_text() + "\ndata_dict['<i>x</i>'] = data_dict['mixed']"
    )
    use = ("--dataset_registry", str(tmp_path / "more.py"), "--dataset_use", "<i>x</i>", "--data_packing", "True")
    assert view(*ALL, *use) == 0
    site = tmp_path / "site"
    for path in [*site.glob("*.*"), *site.glob("data/*")]:
        text = path.read_text()
        assert "<i>x" not in text and "<img src=x" not in text
        assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", text)
    said = "".join(text for _, content in by_id(site)["hostile"]["runs"] for text, _, _ in content)
    assert said.count(HOSTILE) == 2  # pieces together are the text to the letter


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--dataset_use", "mixd"), "Did you mean 'mixed'"),
        (("--dataset_use", "mixed", "--data_packing", "True"), "--data_packing needs --model_max_length"),
        (("--dataset_use", "mixed", "--limit", "0"), "--limit must be 1 or more"),
        ((), "Name the data"),
        (("--dataset_use", "mixed", "--output", "."), "holds other files"),
    ],
)
def test_mistakes_are_one_message(
    view: Callable[..., int],
    flags: tuple[str, ...],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert view(*flags) == 1
    said = capsys.readouterr().err
    assert message in said and said.count("error: ") == 1 and "Traceback" not in said
    assert (tmp_path / "mixed.jsonl").exists()


def write_thoughts(folder: Path, checkpoint: Path) -> int:
    """Write the site of a conversation with thoughts, whose answers have weights; return the exit code."""
    conversation = [
        turn
        for number, weight in ((1, 0.5), (2, None))
        for turn in (
            {"from": "human", "value": f"Question {number}?"},
            {"from": "gpt", "value": f"<think>thought {number}</think>answer {number}", "weight": weight},
        )
    ]
    (folder / "rows.json").write_text(json.dumps([{"id": "several", "conversations": conversation}]))
    data = ["--annotation_path", str(folder / "rows.json"), "--data_path", str(folder), "--num_workers", "0"]
    return main([*data, "--model_name_or_path", str(checkpoint), "--output", str(folder / "site")])


def test_each_training_row_has_its_own_targets(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    assert write_thoughts(tmp_path, tiny_checkpoint("qwen3_5")) == 0
    assert "1 sample (2 training rows) from 1 dataset row, as" in (tmp_path / "site" / "index.html").read_text()
    first, second = written(tmp_path / "site", "samples")
    assert [one["place"].partition(", ")[2] for one in (first, second)] == [f"training row {n} of 2" for n in (1, 2)]
    assert (first["weights"], second["weights"]) == (["message 1: weight 0.5"], [])
    for number, one in enumerate((first, second), start=1):
        coloured = [
            "".join(text for kind, content in one["runs"] if kind == wanted for text, _, _ in content)
            for wanted in (0, 1)
        ]
        prompt, target = coloured
        assert target.startswith(f"thought {number}\n</think>") and f"answer {number}<|im_end|>" in target
        assert f"Question {number}?" in prompt and f"thought {number}" not in prompt


@needs_chromium
def test_a_browser_colours_targets_and_names_weights(tiny_checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    assert write_thoughts(tmp_path, tiny_checkpoint("qwen3_5")) == 0
    page = dom(tmp_path / "site" / "index.html", "", tmp_path / "profile")
    assert page.tags.count("article") == 2 and "2 training rows, page 1 of 1" in page.text
    assert "message 1: weight 0.5." in page.text and "training row 2 of 2" in page.text


@needs_chromium
def test_a_browser_shows_samples_and_filters_them(view: Callable[..., int], tmp_path: Path) -> None:
    assert view(*ALL) == 0
    index, profile = tmp_path / "site" / "index.html", tmp_path / "profile"
    page = dom(index, "", profile)
    assert page.tags.count("article") == 10
    assert f"Say {HOSTILE}" in page.text and "b" not in page.tags and "mixed, plain" in page.text
    assert page.tags.count("rect") == 2  # the box and its white edge
    assert "<|image_pad|> × " in page.text and "2.88 s" in page.text
    assert "missing_file" in page.text
    assert "1 sample, page 1 of 1" in dom(index, "#dataset=mixed&kind=video", profile).text
    found = dom(index, "#q=ANSWER+39.&dataset=plain", profile)
    wanted = sum("answer 39." in text for text in written(tmp_path / "site", "texts"))
    assert found.tags.count("article") == wanted
    assert "page 2 of" in dom(index, "#dataset=plain&page=2", profile).text
    assert dom(tmp_path / "site" / "datasets.html", "", profile).tags.count("figure") > 6


PRESS = """
const after = (times) => new Promise((done) => setTimeout(done, times * 100));
const press = async (...keys) => {
  for (const key of keys) {
    document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
    await after(2);
  }
};
(async () => {
  const said = [], at = () => document.activeElement.dataset.number ?? document.activeElement.name;
  await after(3);
  await press("j", "j", "k"); said.push(at());
  await press("ArrowRight"); said.push(at());
  await press("n"); said.push(at());
  await press("k"); said.push(at());
  await press("b"); said.push(document.body.className);
  await press("/"); said.push(at());
  document.activeElement.value = "question 3";
  document.activeElement.dispatchEvent(new Event("input", { bubbles: true }));
  await press("j"); said.push(at(), location.hash);
  document.body.append(`pressed: ${said.join(" ")}.`);
})();
"""


@needs_chromium
def test_keys_move_between_samples_and_pages(view: Callable[..., int], tmp_path: Path) -> None:
    assert view(*ALL) == 0
    site = tmp_path / "site"
    (site / "press.js").write_text(PRESS)
    page = (site / "index.html").read_text()
    (site / "pressed.html").write_text(page.replace("</body>", '<script src="press.js"></script></body>'))
    text = dom(site / "pressed.html", "", tmp_path / "profile").text
    # forwards, on the next page its first sample, backwards over the border of pages, and letters in a field are words
    assert "pressed: 0 1 10 9 no-boxes q q #q=question+3." in text, text[-200:]
