"""Find the file that was probably meant by a path that does not exist."""

from __future__ import annotations

import functools
import itertools
import os
import re
import unicodedata
import urllib.parse
from collections.abc import Iterator, Mapping

MOST_LISTED = 100_000
"""Number of names of a folder that are compared; of a larger folder, the first that the system lists."""

_SUFFIXES = frozenset(
    ".jpg .jpeg .png .gif .webp .bmp .tif .tiff .avif .jp2 .mp4 .m4v .mov .mkv .webm .avi .ts .flv .wmv".split()
)
_MOST_PARTS = 20  # parts of a path that are tried as its start
_SEPARATORS = re.compile(r"[/\\]+|\?d=")  # "?d=" is how Label Studio writes a local file


def below(source: str, data_path: str) -> str:
    """Return a sentence on the file below ``data_path`` that a path probably means; "" where there is none.

    The path is tried from each of its folders on, with slashes for backslashes and with percent codes decoded.

    Args:
        source: The path as written, relative to ``data_path`` or absolute.
        data_path: Folder that relative paths start from.
    """
    for tail in _tails(source):
        if tail != source and os.path.exists(os.path.join(data_path, tail)):
            return f" There is {tail!r} in {data_path or 'the working folder'}."
    return ""


def beside(path: str) -> str:
    """Return a sentence on an existing name that is similar to the missing one in ``path``; "" where there is none.

    It may differ in case, Unicode form (NFC, NFD), white space at its ends, or suffix, and may be that of a folder.
    Folders are listed once per process, so that a million missing files cost a look-up each.
    """
    folder, missing = path, ""
    while not os.path.isdir(folder):
        folder, missing = os.path.dirname(folder) or ".", os.path.basename(folder)
    try:
        names = _listed(folder, os.stat(folder).st_mtime_ns)
    except OSError:
        return ""
    found = names.get(_plain(missing)) or names.get(_stem(missing))
    if found is None:
        return ""
    alike = " (other Unicode characters that look the same)" if _composed(found) == _composed(missing) else ""
    return f" There is {found!r}{alike} in {folder}."


def _tails(source: str) -> Iterator[str]:
    """Yield the paths below ``data_path`` that a path may mean, the longest first."""
    for written in dict.fromkeys((source, urllib.parse.unquote(source))):
        parts = [part for part in _SEPARATORS.split(written) if part not in ("", ".")]
        if ".." in parts:
            continue
        for first in range(min(len(parts), _MOST_PARTS)):
            yield "/".join(parts[first:])


@functools.lru_cache(maxsize=64)
def _listed(folder: str, changed: int) -> Mapping[str, str]:
    """Return the names in a folder by their normalized form, with and without the suffix of an image or video."""
    del changed  # so that a folder is listed again once it has changed
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in itertools.islice(entries, MOST_LISTED))
    stems = {_stem(name): name for name in names if os.path.splitext(name)[1].lower() in _SUFFIXES}
    return stems | {_plain(name): name for name in names}


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _plain(name: str) -> str:
    return _composed(name).strip().casefold()


def _stem(name: str) -> str:
    """Return a name without its suffix, marked so that it differs from any whole name."""
    return os.path.splitext(_plain(name))[0] + "/"
