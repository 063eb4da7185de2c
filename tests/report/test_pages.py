"""Every page that is written, in a real browser: contrast in light and dark, no complaints, and the keyboard."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.demo.losses import Losses
from examples.demo.page import build_demo_page
from examples.demo.results import Result, score
from qwenvl.cli.evaluate import command as evaluate
from qwenvl.cli.show_attention.page import Looked, Shown, attention_page
from qwenvl.cli.view_data import command as view_data
from qwenvl.report.run_page import build_run_page
from tests.browser import needs_chromium
from tests.cli.evaluate.test_command import write_predictions
from tests.cli.view_data.test_command import ALL, write_sets
from tests.devtools import Browser
from tests.report.test_run_page import full_run

CONTRAST = (Path(__file__).parent / "contrast.js").read_text()
PAGES = (
    "site/index.html",
    "site/datasets.html",
    "evaluation/evaluation.html",
    "demo.html",
    "run.html",
    "attention.html",
)

pytestmark = needs_chromium


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[..., Path]) -> Path:
    """Return a folder with the pages of all tools, and of a run with something in each section."""
    folder = tmp_path_factory.mktemp("pages")
    fixed = ["--model_name_or_path", str(tiny_checkpoint("qwen3_vl")), "--output", str(folder / "site")]
    fixed += ["--dataset_registry", str(write_sets(folder)), "--num_workers", "0"]
    assert view_data.main([*fixed, *ALL, "--data_packing", "True"]) == 0
    evaluate.main(["--predictions", write_predictions(folder), "--output", str(folder / "evaluation")])
    picture = (str(folder / "a.png"),)
    results = [Result("digits", picture, "Which?", "1", answer, answer == "1") for answer in "12"]
    losses = Losses(train=((1, 6.0), (50, 0.5)), held_out=((50, 0.7),), seconds=90)
    (folder / "demo.html").write_text(build_demo_page(results, score(results), losses))
    (folder / "run.html").write_text(build_run_page(full_run()))
    mask = np.eye(40, 60, dtype=bool)
    looked = Looked("a red car", Image.new("RGB", (60, 40)), np.full((2, 3, 4, 6), 0.01), mask, ~mask)
    shown = [Shown("dataset 'scenes', scenes.jsonl:1", "What is here?", "A red car. " * 20, [looked] * 3)]
    (folder / "attention.html").write_text(attention_page("Attention of a model", shown, [4, 9]))
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("page", PAGES)
def test_everything_can_be_read_and_fits(page: str, dark: bool, width: int, pages: Path, browser: Browser) -> None:
    browser.complaints.clear()
    browser.open(pages / page, dark=dark, width=width)
    if folder := os.environ.get("QWENVL_SCREENSHOTS"):  # to look at them
        browser.picture(Path(folder) / f"{Path(page).stem}-{'dark' if dark else 'light'}-{width}.png")
    looked = browser.run(CONTRAST)
    assert looked["seen"] > 10 and not looked["found"], "\n".join(looked["found"])
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")  # nothing to scroll sideways
    assert not browser.complaints


FOCUSED = """(() => {
  const at = document.activeElement, style = getComputedStyle(at);
  const box = at.getBoundingClientRect();
  const edge = style.outlineStyle !== "none" && parseFloat(style.outlineWidth) >= 2;
  const seen = edge && box.bottom > 0 && box.top < innerHeight;
  return [at.name || at.textContent.trim().slice(0, 20) || at.title || at.tagName, seen];
})()"""


def walk(browser: Browser, most: int) -> list[str]:
    """Press Tab through a page; return what had the focus, every time visibly."""
    names: list[str] = []
    for _ in range(most):
        browser.press("Tab")
        name, seen = browser.run(FOCUSED)
        if browser.run("document.activeElement === document.body"):
            break
        assert seen, f"{name} has the focus, and nothing shows it"
        names.append(name)
    return names


@pytest.mark.parametrize("page", PAGES)
def test_tab_reaches_every_control_once_in_the_order_of_the_page(page: str, pages: Path, browser: Browser) -> None:
    browser.open(pages / page)
    wanted = browser.run(
        """[...document.querySelectorAll("a[href], button, input, select, textarea, summary")]
        .filter((one) => !one.disabled && one.checkVisibility())
        .map((one) => one.name || one.textContent.trim().slice(0, 20) || one.title || one.tagName)"""
    )
    reached = walk(browser, len(wanted) + 20)
    controls = [name for name in reached if name in wanted]
    assert controls == wanted


def test_the_viewer_is_used_by_keys_alone(pages: Path, browser: Browser) -> None:
    browser.open(pages / "site" / "index.html")
    count = "document.getElementById('count').textContent"
    assert browser.run(count) == "28 samples, page 1 of 3"
    browser.press("Tab", "Tab", "ArrowDown", "ArrowDown")  # past the link, to the second dataset
    browser.settle()
    assert browser.run(count) == "20 samples, page 1 of 2"
    browser.press("Tab", "Tab", "Tab", *"question")
    browser.settle()
    assert browser.run("document.activeElement.name") == "q" and browser.run(count) == "20 samples, page 1 of 2"
    browser.press("Tab", "Enter")  # the first page has no previous one: the next control is Next
    browser.settle()
    assert browser.run(count) == "20 samples, page 2 of 2"
    assert browser.run("document.activeElement.dataset.number") is not None  # reading goes on where the page begins
    browser.press("Shift+Tab", "Space")  # back to Previous
    browser.settle()
    assert browser.run(count) == "20 samples, page 1 of 2"
