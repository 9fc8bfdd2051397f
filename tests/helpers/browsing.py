"""Chromium without a window, spoken to by its debugging protocol over a pipe: no driver, no port, no package. A page is
opened, asked by JavaScript, and given keys; what it wrote to the console and whom it asked is kept."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(
    (found for name in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(name))), None
)
MISSING = "no chromium on this machine"
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--remote-debugging-pipe",
)
LIMIT = 30.0
KEYS = {"Tab": 9, "Enter": 13}
REACHED = "document.activeElement === document.body ? '' : document.activeElement.outerHTML.slice(0, 300)"
WITH = 'a[href],button,input,[tabindex="0"]'
CAN_BE = f"[...document.querySelectorAll('{WITH}')].filter(e => e.checkVisibility()).length"


class Browser:
    """One page of a running browser. `console`: what it wrote as warnings and errors; `asked`: whom it asked."""

    def __init__(self, into: int, out: int) -> None:
        self._into, self._out = into, out
        self._number = 0
        self._rest = b""
        self._session: str | None = None
        self.console: list[str] = []
        self.asked: list[str] = []
        target = self._call("Target.createTarget", {"url": "about:blank"})["targetId"]
        self._session = self._call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "Performance"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: object) -> dict[str, Any]:
        """What a method of the protocol answers."""
        return self._call(method, parameters)

    def open(self, address: str) -> None:
        """Opens an address, and waits until the page and all that belongs to it has been loaded."""
        self.call("Page.navigate", url=address)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'", address)

    def say(self, expression: str) -> Any:
        """The value of an expression of JavaScript in the page."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def until(self, expression: str, what: str = "") -> Any:
        """Waits until an expression is true."""
        end = time.monotonic() + LIMIT
        while time.monotonic() < end:
            if value := self.say(expression):
                return value
            time.sleep(0.05)
        raise AssertionError(f"not within {LIMIT:.0f} s: {what or expression}")

    def press(self, key: str) -> None:
        """Presses a key."""
        known = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        text = {"text": "\r"} if key == "Enter" else {}
        self.call("Input.dispatchKeyEvent", type="keyDown", **known, **text)
        self.call("Input.dispatchKeyEvent", type="keyUp", **known)

    def looks(self, *, width: int, dark: bool = False, high: int = 900) -> None:
        """Gives the page a width and a theme."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=high, deviceScaleFactor=1, mobile=False)
        theme = "dark" if dark else "light"
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])

    def picture(self, file: Path) -> None:
        """Writes a picture of the whole page."""
        found = self.call("Page.captureScreenshot", captureBeyondViewport=True, format="png")
        file.write_bytes(base64.b64decode(found["data"]))

    def _call(self, method: str, parameters: Mapping[str, object]) -> dict[str, Any]:
        self._number += 1
        body: dict[str, object] = {"id": self._number, "method": method, "params": dict(parameters)}
        if self._session is not None:
            body["sessionId"] = self._session
        os.write(self._into, json.dumps(body).encode() + b"\0")
        end = time.monotonic() + LIMIT
        while True:
            message = self._next(end)
            if message.get("id") == self._number:
                assert "error" not in message, (method, message["error"])
                result: dict[str, Any] = message["result"]
                return result
            self._hear(message)

    def _next(self, end: float) -> dict[str, Any]:
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._out], [], [], max(0.0, end - time.monotonic()))
            assert ready, "chromium does not answer"
            data = os.read(self._out, 1 << 20)
            assert data, "chromium has ended"
            self._rest += data
        line, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message

    def _hear(self, message: Mapping[str, Any]) -> None:
        told = message.get("params", {})
        match message.get("method"):
            case "Network.requestWillBeSent":
                self.asked.append(told["request"]["url"])
            case "Log.entryAdded" if told["entry"]["level"] in ("warning", "error"):
                self.console.append(f"{told['entry']['text']} {told['entry'].get('url', '')}")
            case "Runtime.exceptionThrown":
                self.console.append(str(told["exceptionDetails"].get("exception", told["exceptionDetails"])))
            case "Runtime.consoleAPICalled" if told["type"] in ("warning", "error"):
                self.console.append(str(told["args"]))


@contextmanager
def browser() -> Iterator[Browser]:
    """A browser with one empty page."""
    assert CHROMIUM is not None, MISSING
    reads, writes = os.pipe(), os.pipe()
    theirs = [fcntl.fcntl(fd, fcntl.F_DUPFD, 10) for fd in (reads[0], writes[1])]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        # chromium reads from descriptor 3 and writes to 4
        begin = ["bash", "-c", f'exec "$@" 3<&{theirs[0]} 4>&{theirs[1]}', "bash", CHROMIUM]
        process = subprocess.Popen(
            [*begin, *FLAGS, f"--user-data-dir={profile}"],
            pass_fds=theirs,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for fd in (reads[0], writes[1], *theirs):
            os.close(fd)
        try:
            yield Browser(reads[1], writes[0])
        finally:
            process.kill()
            process.wait()
            os.close(reads[1])
            os.close(writes[0])


def walked(page: Browser) -> None:
    """Asserts that the key Tab reaches all that can be reached, each once, and that it is seen where it is."""
    page.say("document.activeElement.blur()")
    seen: list[str] = []
    for _ in range(page.say(CAN_BE)):
        page.press("Tab")
        seen.append(page.say(REACHED))
        assert page.say("getComputedStyle(document.activeElement).outlineStyle") != "none", seen[-1]
    assert "Skip to the content" in seen[0]
    assert "" not in seen
    page.press("Tab")
    assert page.say(REACHED) in ("", seen[0]), "there was more"
