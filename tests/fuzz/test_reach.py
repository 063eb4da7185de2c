"""What samples can reach: files under ``data_path``, and nothing else on this machine or the network."""

from __future__ import annotations

import contextlib
import ctypes
import http.server
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from qwenvl.data.media.reader import MediaReader
from qwenvl.data.media.video.backend import VideoBackend
from qwenvl.data.media.video.decode import PyAvBackend, TorchcodecBackend
from qwenvl.data.types import ImageItem, VideoItem
from qwenvl.utils.errors import SampleError
from tests.data.images import encoded, picture
from tests.fuzz.fuzz import EFFORTS, fuzz
from tests.fuzz.test_media import VIDEOS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="files are watched by inotify")

_OPEN = 0x20  # IN_OPEN


class Watch:
    """Tells which files of a folder were opened, by whatever library: the system itself says so."""

    def __init__(self, folder: Path) -> None:
        self._system = ctypes.CDLL(None, use_errno=True)
        self._handle = self._system.inotify_init1(os.O_NONBLOCK)
        assert self._system.inotify_add_watch(self._handle, os.fsencode(folder), _OPEN) >= 0

    def opened(self) -> bytes:
        """Return what happened since the last call; empty if nothing did."""
        try:
            return os.read(self._handle, 1 << 16)
        except BlockingIOError:
            return b""

    def close(self) -> None:
        os.close(self._handle)


class World:
    """A dataset's folder with good media and links that lead out; secrets outside, watched, on disk and on a server."""

    def __init__(self, folder: Path) -> None:
        self.media, self.outside = folder / "media", folder / "outside"
        (self.media / "inner").mkdir(parents=True)
        self.outside.mkdir()
        for name, content in {"a.png": encoded(picture(), "PNG"), "a.mp4": VIDEOS["mp4"], "a.ts": VIDEOS["ts"]}.items():
            (self.media / name).write_bytes(content)
            (self.outside / name).write_bytes(content)
            (self.media / f"link-{name}").symlink_to(self.outside / name)
        (self.media / "folder").symlink_to(self.outside)
        (self.media / "up").symlink_to("..")
        self.requests: list[str] = []
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.watch = Watch(self.outside)
        self.reader = MediaReader(str(self.media), video_timeout=20)

    def _handler(self) -> type[http.server.BaseHTTPRequestHandler]:
        requests, folder = self.requests, self.outside

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                requests.append(self.path)
                self.send_response(200)
                self.end_headers()
                self.wfile.write((folder / "a.ts").read_bytes())

            def log_message(self, *arguments: Any) -> None:
                pass

        return Handler

    def open(self, source: str | bytes) -> str | None:
        """Open as picture and as video; return the category of the last problem, or None if both can be used."""
        category = None
        for call in (
            lambda: self.reader.image_size(ImageItem(source)),
            lambda: self.reader.read_pixels(ImageItem(source)),
            lambda: self.reader.video_header(VideoItem(source)),
            lambda: self.reader.read_frames(VideoItem(source), np.array([0])),
        ):
            try:
                call()
            except SampleError as error:
                category = error.category
        return category

    def untouched(self) -> bool:
        return not self.watch.opened() and not self.requests

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self.watch.close()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    world = World(tmp_path)
    yield world
    world.close()


def test_the_watch_sees_what_is_opened(world: World) -> None:
    assert world.untouched()
    MediaReader(str(world.outside)).image_size(ImageItem("a.png"))
    assert not world.untouched() and world.untouched()
    world.open("a.png"), world.open("a.mp4")
    assert world.untouched()


def test_paths_that_lead_out(world: World) -> None:
    for name in ("a.png", "a.mp4"):
        path = f"{world.outside}/{name}"
        quoted = path.replace("/", "%2f").replace("o", "%6f")
        for source in (
            f"../outside/{name}", path, f"file://{path}", f"FILE://{path}", f"file://localhost{path}", f"file:{path}",
            f"file://server/share/../../..{path}", f"file://{quoted}", f"file://..%2foutside%2f{name}", f"link-{name}",
            f"folder/{name}", f"up/outside/{name}", f"inner/../../outside/{name}", f"%2e%2e/outside/{name}",
            f"..\\outside\\{name}", f"....//outside/{name}", f"/proc/self/root{path}", f"/proc/self/cwd{path}",
            f"a.png\0/../../outside/{name}", f"a.png%00/../../outside/{name}", f"concat:{path}", f"concat:a.ts|{path}",
            f"subfile,,start,0,end,0,,:{path}", f"crypto:{path}", f"pipe:{path}", f"async:file:{path}", f"//{path}",
            f"{world.url}/{name}", f"HTTP://127.0.0.1/{name}", f"ftp://127.0.0.1/{name}", f"//127.0.0.1/{name}",
            f"rtmp://127.0.0.1/{name}", f"{world.media}/../outside/{name}", "/dev/stdin", "/dev/fd/0", "~root/a.png",
            "/etc/passwd", "file:///etc/passwd", "/proc/self/environ", "/dev/zero", "",
        ):  # fmt: skip
            assert world.open(source) is not None, source
            assert world.untouched(), source


SEGMENTS = [
    *("..", ".", "", "inner", "folder", "up", "outside", "media", "a.png", "a.mp4", "link-a.png", "link-a.mp4"),
    *("%2e%2e", "%2e", "..%2f", "%00", "\0", "~", "*", "?", "%d", "...", "file:", "file://", "localhost", "http:"),
]


@EFFORTS
def test_paths_of_any_parts(world: World, effort: int) -> None:
    def check(source: str) -> None:
        world.open(source)
        assert world.untouched(), source

    parts = st.lists(st.sampled_from(SEGMENTS), min_size=1, max_size=8)
    starts = st.sampled_from(["", "/", "file://", "file:///", f"file://{world.media}/", f"{world.media}/"])
    joints = st.sampled_from(["/", "/", "\\"])
    sources = st.builds(lambda start, parts, joint: start + joint.join(parts), starts, parts, joints)
    fuzz(check, sources, 300, effort)


@pytest.fixture(params=[TorchcodecBackend, PyAvBackend])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> VideoBackend:
    try:
        backend: VideoBackend = request.param()
    except ImportError as error:
        pytest.skip(str(error))
    monkeypatch.setattr("qwenvl.data.media.reader.choose_backend", lambda: backend)
    return backend


def hls(address: str) -> bytes:
    lines = ["#EXTM3U", "#EXT-X-TARGETDURATION:1", "#EXT-X-VERSION:3", "#EXTINF:1.0,", address, "#EXT-X-ENDLIST", ""]
    return "\n".join(lines).encode()


def dash(address: str) -> bytes:
    return (
        '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" '
        'profiles="urn:mpeg:dash:profile:isoff-on-demand:2011" mediaPresentationDuration="PT1S"><Period>'
        '<AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1" width="64" height="48">'
        f"<BaseURL>{address}</BaseURL><SegmentBase/></Representation></AdaptationSet></Period></MPD>"
    ).encode()


def session(address: str) -> bytes:
    del address
    return b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n"


def playlists(world: World) -> Iterator[bytes]:
    """Yield playlists of every kind, as they are and behind the first bytes of a video."""
    there = world.outside / "a.ts"
    for address in (str(there), f"file://{there}", "../outside/a.ts", "link-a.ts", f"{world.url}/a.ts", "a.ts"):
        concat = f"ffconcat version 1.0\nfile {address}\n".encode()
        for content in (hls(address), dash(address), concat, session(address)):
            yield content
            yield b"\xef\xbb\xbf" + content
            for start in (
                b"GIF89a\n",
                b"FLV\x01\n",
                b"OggS\0\n",
                b"\0\0\x01\n",
                b"\0\0\0\x10ftyp\n",
                b"\x1a\x45\xdf\xa3\n",
            ):
                yield start + content
            packets = (b"\nG" + content + bytes(1000))[1:1024]
            yield b"".join(b"G" + packets[place + 1 : place + 188] for place in range(0, 1024, 188))
        yield VIDEOS["mp4"][:8] + hls(address) + VIDEOS["mp4"]


def test_playlists_lead_nowhere(world: World, backend: VideoBackend) -> None:
    del backend
    for content in playlists(world):
        for name in ("list.mp4", "list.m3u8"):
            (world.media / name).write_bytes(content)
            for source in (name, content):
                assert world.open(source) is not None, content
                assert world.untouched(), content


def test_names_that_stand_for_other_files(world: World, backend: VideoBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    """FFmpeg takes ``a%d.png`` for the pictures a0.png, a1.png, ..., whatever the file of that name holds."""
    del backend
    for number in range(3):
        (world.media / f"a{number}.png").symlink_to(world.outside / "a.png")
    names = ("a%d.png", "a%01d.png")
    for name in (*names, "a%*.png", "a*.png", "concat:link-a.ts", "a.ts|link-a.ts"):
        (world.media / name).write_bytes(VIDEOS["mp4"])
        assert world.open(name) == "wrong_type", "it is no picture"
        assert world.untouched(), name
    for module in ("decode", "pyav"):  # to give the name itself to FFmpeg
        monkeypatch.setattr(f"qwenvl.data.media.video.{module}.opened_video", contextlib.nullcontext)
    for name in names:
        world.open(name)
        assert not world.untouched(), f"{name} leads nowhere, and shows nothing"
