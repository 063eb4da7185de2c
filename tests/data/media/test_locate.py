"""Where media may come from: paths that stay inside their folder, data URIs, and http(s) when allowed."""

from __future__ import annotations

import base64
import http.server
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qwenvl.data.media.reader import MediaReader
from qwenvl.data.media.video.backend import VideoHeader
from qwenvl.data.types import ImageItem, VideoItem
from qwenvl.utils.errors import SampleError
from tests.data.images import both, encoded, picture, reason_of


def test_sources(tmp_path: Path, reader: MediaReader, monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(picture(), "PNG")
    (tmp_path / "media" / "in side").mkdir()
    path = tmp_path / "media" / "in side" / "a#1%.png"
    path.write_bytes(data)
    uri = "data:image/png;base64," + base64.b64encode(data).decode()
    for source in ("in side/a#1%.png", "in side/../in side/a#1%.png", str(path), f"file://{path}", path.as_uri(), uri):
        assert reader.image_size(ImageItem(source)) == (20, 40)
        assert reader.read_image(ImageItem(source)).size == (40, 20)
    monkeypatch.chdir(tmp_path / "media")
    assert MediaReader("").image_size(ImageItem("in side/a#1%.png")) == (20, 40)


def test_bytes_of_an_embedded_picture(reader: MediaReader) -> None:
    data = encoded(picture(), "JPEG", quality=95)
    assert reader.image_size(ImageItem(data)) == (20, 40)
    assert reader.read_image(ImageItem(data)).size == (40, 20)
    frames = VideoItem((data, data, encoded(picture(), "PNG")), fps=1.0)
    assert reader.video_header(frames) == VideoHeader(3, 1.0, 20, 40)
    assert reader.read_frames(frames, np.array([2, 0])).shape == (2, 3, 20, 40)
    wrong = VideoItem((data, encoded(picture(30, 20), "PNG")))
    assert f"embedded image of {len(data)} bytes is 40 x 20" in reason_of(
        lambda: reader.video_header(wrong), "bad_record"
    )
    for call in both(reader, b"junk" * 999):
        assert "embedded image of 3996 bytes: it is not an image" in reason_of(call, "wrong_type")
    assert "embedded image of 99 bytes" in reason_of(lambda: reader.read_image(ImageItem(data[:99])), "truncated")


@pytest.mark.parametrize("what", ["..", "absolute", "file://", "link", "linked folder", "sibling"])
def test_media_stay_inside_data_path(tmp_path: Path, reader: MediaReader, what: str) -> None:
    (tmp_path / "media2").mkdir()
    outside = tmp_path / "media2" / "a.png"
    outside.write_bytes(encoded(picture(), "PNG"))
    (tmp_path / "media" / "link.png").symlink_to(outside)
    (tmp_path / "media" / "folder").symlink_to(tmp_path / "media2")
    source = {
        "..": "../media2/a.png",
        "absolute": str(outside),
        "file://": f"file://{outside}",
        "link": "link.png",
        "linked folder": "folder/a.png",
        "sibling": f"{tmp_path}/media/../media2/a.png",
    }[what]
    for call in both(reader, source):
        assert "data_path" in reason_of(call, "outside_data_path")
    relative = what in ("..", "link", "linked folder")
    allowed = MediaReader(str(tmp_path / "media"), allow_absolute=True)
    for call in both(allowed, source):
        if relative:
            reason_of(call, "outside_data_path")
        else:
            call()
    for call in both(MediaReader(""), os.path.join(tmp_path, "media", source) if relative else source):
        call()


def test_a_data_path_that_is_a_link_is_fine(tmp_path: Path, reader: MediaReader) -> None:
    (tmp_path / "media" / "a.png").write_bytes(encoded(picture(), "PNG"))
    (tmp_path / "link").symlink_to(tmp_path / "media")
    for source in ("a.png", str(tmp_path / "link" / "a.png"), str(tmp_path / "media" / "a.png")):
        assert MediaReader(str(tmp_path / "link")).image_size(ImageItem(source)) == (20, 40)


def test_missing_and_unusual_files(tmp_path: Path, reader: MediaReader) -> None:
    for source in ("gone.jpg", "gone/a.jpg", "file:///gone.jpg", "a" * 5000, "a\0b", "\udc80\ud800"):
        with pytest.raises(SampleError) as caught:
            reader.image_size(ImageItem(source))
        assert caught.value.category in ("missing_file", "outside_data_path", "unreadable_file"), source
    assert str(tmp_path / "media" / "gone.jpg") in reason_of(both(reader, "gone.jpg")[0], "missing_file")
    os.mkfifo(tmp_path / "media" / "pipe")
    (tmp_path / "media" / "folder").mkdir()
    assert "not an ordinary file" in reason_of(both(reader, "pipe")[0], "wrong_type")
    assert "a folder" in reason_of(both(reader, "folder")[0], "wrong_type")


@pytest.mark.parametrize(
    ("source", "category"),
    [
        ("data:image/png;base64,", "zero_byte"),
        ("data:image/png;base64,@@@@", "unreadable_file"),
        ("data:image/png,abc", "wrong_type"),
        ("data:", "wrong_type"),
        ("data:image/png;base64,AAAA" + "A" * 4000, "wrong_type"),
    ],
)
def test_bad_data_uris(source: str, category: str) -> None:
    for call in both(MediaReader(""), source):
        assert len(reason_of(call, category)) < 400


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/a.png" else 404)
        self.end_headers()
        self.wfile.write(encoded(picture(), "PNG") if self.path == "/a.png" else b"")

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_remote_media_only_when_allowed(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for call in both(MediaReader("/data"), f"{server}/a.png"):
        assert "--allow_remote_media" in reason_of(call, "remote_not_allowed")
    allowed = MediaReader("/data", allow_remote=True)
    assert allowed.image_size(ImageItem(f"{server}/a.png")) == (20, 40)
    assert allowed.read_image(ImageItem(f"{server}/a.png")).size == (40, 20)
    reason_of(both(allowed, f"{server}/gone.png")[0], "missing_file")
    reason_of(both(allowed, "http://127.0.0.1:1/a.png")[0], "unreadable_file")
    reason_of(both(allowed, "http://[bad/a.png")[0], "unreadable_file")
    monkeypatch.setattr("qwenvl.data.media.locate.DOWNLOAD_BYTES", 10)
    assert "larger than" in reason_of(both(allowed, f"{server}/a.png")[0], "unreadable_file")
