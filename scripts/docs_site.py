"""Hooks of mkdocs.yml that add pages from outside docs/ to the site and adjust links to them."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from markdown.extensions.toc import slugify_unicode
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = {
    "README.md": "index.md",
    "README.zh-CN.md": "index.zh-CN.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "benchmarks/README.md": "benchmarks.md",
    "configs/lab/README.md": "lab.md",
}
"""File name on the site of each page from outside docs/, by its path in the repository."""

_LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")


def on_config(config: Any) -> Any:
    """Give Chinese headings the same anchors as on GitHub."""
    config.mdx_configs["toc"]["slugify"] = slugify_unicode
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add the pages from outside docs/."""
    for path, name in OUTSIDE.items():
        files.append(File.generated(config, name, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links between files of the repository into links between pages of the site."""
    inside = {name: path for path, name in OUTSIDE.items()}
    folder = posixpath.dirname(inside.get(page.file.src_uri, f"docs/{page.file.src_uri}"))

    def link(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(folder, match[1]))
        return f"]({OUTSIDE.get(path, path.removeprefix('docs/'))}"

    return _LINK.sub(link, markdown)
