"""A real Chromium, driven through its DevTools pipe: pages in light and dark, keys, and what is seen."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from tests.browser import CHROMIUM

FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe", "--no-first-run")


class Browser:
    """One page of a headless Chromium, as a context.

    https://chromedevtools.github.io/devtools-protocol: JSON messages that end in a zero byte, on file descriptors 3
    (to the browser) and 4 (from it).

    Args:
        profile: folder that Chromium keeps its own files in.
    """

    def __init__(self, profile: Path) -> None:
        self._profile = profile
        self._number = 0
        self._rest = b""
        self._session = ""
        self.complaints: list[str] = []

    def __enter__(self) -> Browser:
        assert CHROMIUM is not None
        to_browser, self._to = os.pipe()
        self._from, from_browser = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in os.pipe())
        command = [CHROMIUM, *FLAGS, f"--user-data-dir={self._profile}", "about:blank"]
        # The shell gives the pipes the numbers that Chromium expects, whichever they have here.
        redirected = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
        self._process = subprocess.Popen(
            ["bash", "-c", redirected, "bash", *command],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(one["targetId"] for one in targets if one["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._to)
        os.close(self._from)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result; what the page complains of meanwhile is kept."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return dict(answer["result"])

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            part = os.read(self._from, 1 << 16)
            assert part, "Chromium has ended"
            self._rest += part
        text, _, self._rest = self._rest.partition(b"\0")
        event: dict[str, Any] = json.loads(text)
        if event.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
            self.complaints.append(text.decode())
        return event

    def open(self, page: Path, *, dark: bool = False, width: int = 1200) -> None:
        """Show a page, to its last script."""
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        phone = {"deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, **phone)
        self.call("Page.navigate", url="about:blank")
        self.call("Page.navigate", url=page.as_uri())
        self.run("new Promise(done => document.readyState === 'complete' ? done() : addEventListener('load', done))")
        self.settle()

    def settle(self) -> None:
        """Wait until what is under way, such as data files of the page, has been taken and drawn."""
        self.run("new Promise(done => setTimeout(() => requestAnimationFrame(() => setTimeout(done, 50)), 200))")

    def run(self, expression: str) -> Any:
        """Return what a JavaScript expression, or its promise, comes to."""
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press(self, *keys: str) -> None:
        """Press keys as a person does: Tab, Enter, Space, Escape, arrows, or a letter; Shift+Tab goes back."""
        for key in keys:
            name = key.removeprefix("Shift+")
            text = {"Enter": "\r", "Space": " "}.get(name, name if len(name) == 1 else "")
            code = _CODES.get(name, ord(name.upper()) if len(name) == 1 else 0)
            shift = {"modifiers": 8} if key.startswith("Shift+") else {}
            given = {"key": " " if name == "Space" else name, "windowsVirtualKeyCode": code, **shift}
            down = {"type": "keyDown", "text": text} if text else {"type": "rawKeyDown"}
            self.call("Input.dispatchKeyEvent", **given, **down)
            self.call("Input.dispatchKeyEvent", type="keyUp", **given)

    def picture(self, file: Path) -> None:
        """Write what the page looks like, as PNG."""
        shown = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shown["data"]))


_CODES = {"Tab": 9, "Enter": 13, "Space": 32, "Escape": 27, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39}
_CODES |= {"ArrowDown": 40, "End": 35, "Home": 36}
