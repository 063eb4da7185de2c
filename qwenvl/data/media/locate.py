"""Find media: files under ``data_path``, bytes in the annotations, data URIs and, where allowed, http(s) URLs."""

from __future__ import annotations

import base64
import binascii
import functools
import os
import stat
import urllib.error
import urllib.parse
import urllib.request
from http.client import HTTPException

from qwenvl.data.media.near_names import below, beside
from qwenvl.data.types import Source
from qwenvl.utils.errors import SampleError

DOWNLOAD_SECONDS = 30.0  # longest time that a server may be silent
DOWNLOAD_BYTES = 512 << 20
LONGEST_PATH = 4096  # characters; no system opens longer paths, and resolving them takes long

_REMOTE = ("http://", "https://")


class MediaSources:
    """Finds media.

    Relative paths start from ``data_path``, and can leave it neither by ``..`` nor through a symbolic link. Absolute
    paths must lie inside it, unless it is empty or ``allow_absolute`` is set. With an empty ``data_path``, relative
    paths start from the working folder and nothing is checked.

    Args:
        data_path: Media folder of the dataset, or "".
        allow_remote: Whether http(s) URLs are fetched.
        allow_absolute: Whether absolute paths may lie anywhere.
    """

    def __init__(self, data_path: str, allow_remote: bool = False, allow_absolute: bool = False) -> None:
        self.data_path = data_path
        self.allow_remote = allow_remote
        self.allow_absolute = allow_absolute

    def locate(self, source: Source) -> Source:
        """Return the path of an existing, non-empty file, or the bytes that were given, of a data URI or download.

        Raises:
            SampleError: ``missing_file``, ``zero_byte``, ``unreadable_file``, ``wrong_type``, ``outside_data_path`` or
                ``remote_not_allowed``; the message names the source.
        """
        if isinstance(source, bytes):
            return source
        if source.startswith("data:"):
            return _decode_data_uri(source)
        if source.lower().startswith(_REMOTE):
            return self._download(source)
        try:
            path = self._path(source)
            _check_file(path)
        except SampleError as error:
            raise self._with_hint(error, _without_scheme(source)) from error.__cause__
        except ValueError as error:
            raise SampleError("missing_file", f"{describe(source)} cannot be a path: {error}.") from error
        return path

    def _with_hint(self, error: SampleError, source: str) -> SampleError:
        """Add the file that was probably meant to the error of a path without a file."""
        if error.category not in ("missing_file", "outside_data_path") or len(source) > LONGEST_PATH:
            return error
        if source.startswith(('["', "['")) and source.endswith("]"):
            return SampleError(error.category, f"{error.reason} It is a list written as text: make it a list of paths.")
        hint = below(source, self.data_path)
        if not hint and error.category == "missing_file":  # folders outside data_path are not searched
            hint = beside(os.path.join(self.data_path, source))
        return SampleError(error.category, error.reason + hint)

    def describe(self, source: Source) -> str:
        """Return a source as text for a message: files by their path, data URIs and other long texts cut."""
        if isinstance(source, str) and not source.startswith("data:") and not source.lower().startswith(_REMOTE):
            source = os.path.join(self.data_path, _without_scheme(source))
        return describe(source)

    def _path(self, source: str) -> str:
        if len(source) > LONGEST_PATH:
            raise SampleError("missing_file", f"{describe(source)} is too long to be a path.")
        source = _without_scheme(source)
        path = os.path.join(self.data_path, source)
        if not self.data_path or (self.allow_absolute and os.path.isabs(source)):
            return path
        if not _real_path(path).startswith(os.path.join(_real_folder(self.data_path), "")):
            cure = "Move the file, or change data_path in the dataset's registry entry."
            if os.path.isabs(source):
                cure = (
                    "Write paths relative to data_path; for files that are to lie elsewhere, set "
                    '"allow_absolute": True, or data_path "", in the dataset\'s registry entry.'
                )
            raise SampleError("outside_data_path", f"{path} lies outside data_path {self.data_path}. {cure}")
        return path

    def _download(self, url: str) -> bytes:
        if not self.allow_remote:
            raise SampleError(
                "remote_not_allowed",
                f"{describe(url)} is on the network. Download it beforehand, or pass --allow_remote_media True.",
            )
        try:
            with urllib.request.urlopen(url, timeout=DOWNLOAD_SECONDS) as response:
                content: bytes = response.read(DOWNLOAD_BYTES + 1)
        except (OSError, HTTPException, ValueError) as error:
            missing = isinstance(error, urllib.error.HTTPError) and error.code in (404, 410)
            category = "missing_file" if missing else "unreadable_file"
            raise SampleError(category, f"{describe(url)} cannot be fetched: {error}.") from error
        if len(content) > DOWNLOAD_BYTES:
            raise SampleError("unreadable_file", f"{describe(url)} is larger than {DOWNLOAD_BYTES >> 20} MiB.")
        if not content:
            raise SampleError("zero_byte", f"{describe(url)} is empty.")
        return content


def absolute_source(source: str, data_path: str) -> str:
    """Return a source that names the same file without ``data_path``; URIs and URLs as they are."""
    if source.startswith("data:") or source.lower().startswith(_REMOTE):
        return source
    return os.path.abspath(os.path.join(data_path, _without_scheme(source)))


def describe(source: Source) -> str:
    """Return a path or URI as text for a message, cut where it is long; of an embedded file, its size."""
    if isinstance(source, bytes):
        return f"embedded image of {len(source)} bytes"
    return source if len(source) <= 300 else f"{source[:60]}... ({len(source)} characters)"


def _real_path(path: str) -> str:
    """Return a file's path without symbolic links, as ``os.path.realpath`` does."""
    folder, name = os.path.split(path)
    if name in ("", os.curdir, os.pardir) or os.path.islink(path):
        return os.path.realpath(path)
    return os.path.join(_real_folder(folder), name)


@functools.lru_cache(maxsize=1 << 16)
def _real_folder(folder: str) -> str:
    """Resolve a folder once per process: it takes a system call for each parent, and many files share a folder."""
    return os.path.realpath(folder)


def _without_scheme(source: str) -> str:
    if not source.lower().startswith("file://"):
        return source
    return urllib.parse.unquote(source[len("file://") :].removeprefix("localhost"))


def _decode_data_uri(source: str) -> bytes:
    header, comma, content = source.partition(",")
    if not comma or not header.endswith(";base64"):
        raise SampleError("wrong_type", f"{describe(source)} is not a base64 data URI (data:image/png;base64,...).")
    try:
        data = base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError) as error:
        raise SampleError("unreadable_file", f"{describe(source)} is not valid base64: {error}.") from error
    if not data:
        raise SampleError("zero_byte", f"{describe(source)} is empty.")
    return data


def _check_file(path: str) -> None:
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise SampleError("missing_file", f"{describe(path)} does not exist.") from error
    except OSError as error:
        raise SampleError("unreadable_file", f"{describe(path)} cannot be read: {error.strerror}.") from error
    if not stat.S_ISREG(status.st_mode):
        what = "not an ordinary file."
        if stat.S_ISDIR(status.st_mode):
            what = 'a folder. Name a file; of a video as frames, all of them, in order: {"frames": [...], "fps": 2}.'
        raise SampleError("wrong_type", f"{describe(path)} is {what}")
    if status.st_size == 0:
        raise SampleError("zero_byte", f"{describe(path)} is empty (0 bytes).")
