"""The files of the site: pages, and data as scripts, since ``file://`` pages cannot read other files."""

from __future__ import annotations

import json
import shutil
import string
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from qwenvl.cli.view_data.samples import KINDS
from qwenvl.report.html import style
from qwenvl.utils.errors import UserError

SAMPLES_A_FILE = 25
TEXTS_A_FILE = 1000

_OWN = ("data", "media")
_MARK = Path("data") / "index.js"


def clear(folder: Path) -> None:
    """Make the folder of a site, without the files of an earlier one.

    Raises:
        UserError: It cannot be written, or holds something else.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--output {folder} is a file. Choose a folder.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / _MARK).is_file():
        raise UserError(f"--output {folder} holds other files than those of this tool. Choose a new or empty folder.")
    for name in _OWN:
        if (folder / name).is_dir():
            shutil.rmtree(folder / name)
    (folder / "data").mkdir(parents=True)


class SampleFiles:
    """Writes records of training rows into small files, each a call of a function of the page.

    Args:
        folder: Folder of the site.

    Attributes:
        samples: Number of samples added; a sample may have several training rows.
    """

    def __init__(self, folder: Path) -> None:
        self.samples = 0
        self._folder = folder / "data"
        self._open: list[dict[str, Any]] = []
        self._texts: list[str] = []
        self._index: list[list[Any]] = []
        self._datasets: dict[str, int] = {}
        self._files = {"samples": 0, "texts": 0}

    def add(self, record: dict[str, Any]) -> None:
        """Add a training row; the page searches its ``text``."""
        self.samples += record["row"] == 1
        dataset = self._datasets.setdefault(record["dataset"], len(self._datasets))
        problems = [category for category, _ in record["problems"]]
        self._index.append([dataset, KINDS.index(record["kind"]), problems])
        self._texts.append(record["text"].lower())
        self._open.append({name: value for name, value in record.items() if name != "text"})
        if len(self._open) == SAMPLES_A_FILE:
            self._flush("samples", self._open)
        if len(self._texts) == TEXTS_A_FILE:
            self._flush("texts", self._texts)

    def close(self, title: str) -> int:
        """Write the rest and the index; return the number of training rows."""
        for name, rest in (("samples", self._open), ("texts", self._texts)):
            if rest:
                self._flush(name, rest)
        index = {
            "title": title,
            "datasets": list(self._datasets),
            "kinds": KINDS,
            "unit": "sample" if len(self._index) == self.samples else "training row",
            "samples": self._index,
            "samples_a_file": SAMPLES_A_FILE,
            "texts_a_file": TEXTS_A_FILE,
            "text_files": self._files["texts"],
        }
        (self._folder / "index.js").write_text(f"viewer.index={script(index)};\n", encoding="utf-8")
        return len(self._index)

    def _flush(self, name: str, items: list[Any]) -> None:
        number = self._files[name]
        text = f"viewer.{name}({number},{script(items)});\n"
        (self._folder / f"{name}_{number}.js").write_text(text, encoding="utf-8")
        self._files[name] += 1
        items.clear()


def script(value: Any) -> str:
    """Return a value as JavaScript in ASCII, without characters that could end an HTML script element."""
    text = json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def write_pages(folder: Path, title: str, lead: str, sections: Iterable[str]) -> None:
    """Write the pages of samples and of datasets, and their scripts.

    Args:
        folder: Folder of the site.
        title: Title of the pages, plain text.
        lead: Description of the shown samples, plain text.
        sections: HTML of the page of datasets.
    """
    here = Path(__file__).parent
    values = {
        "title": escape(title),
        "lead": escape(lead),
        "style": style() + (here / "viewer.css").read_text(encoding="utf-8"),
        "sections": "\n".join(sections),
    }
    for name in ("index.html", "datasets.html"):
        template = string.Template((here / name).read_text(encoding="utf-8"))
        (folder / name).write_text(template.substitute(values), encoding="utf-8")
    for name in ("viewer.js", "cards.js"):
        shutil.copyfile(here / name, folder / name)
