"""A headless Chromium, driven over the DevTools protocol: open, click, type, look, take a picture.

Source: https://chromedevtools.github.io/devtools-protocol/
"""

from __future__ import annotations

import base64
import contextlib
import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import websocket

DEADLINE = 120.0
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1400,900",
    "--remote-debugging-port=0",
    "--remote-allow-origins=*",
)


class Page:
    """One tab. Selectors are CSS; every wait ends at a condition or fails at the deadline."""

    def __init__(self, devtools: websocket.WebSocket) -> None:
        self._devtools = devtools
        self._number = 0
        self._tab: str | None = None
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._tab = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        session = {"sessionId": self._tab} if self._tab else {}
        command = {"id": self._number, "method": method, "params": parameters, **session}
        self._devtools.send(json.dumps(command))
        while True:
            message = json.loads(self._devtools.recv())
            if message.get("id") == self._number:
                assert "error" not in message, f"{method}: {message['error']}"
                return message["result"]

    def open(self, url: str) -> None:
        self._call("Page.navigate", url=url)

    def value(self, expression: str) -> Any:
        answer = self._call("Runtime.evaluate", expression=expression, returnByValue=True)
        return answer["result"].get("value")

    def wait_for(self, condition: str) -> Any:
        """Return the value of a JavaScript expression once it is true."""
        deadline = time.monotonic() + DEADLINE
        while not (value := self.value(condition)):
            assert time.monotonic() < deadline, (
                f"never true: {condition}\n{self.value('document.body.innerText')}"
            )
            time.sleep(0.05)
        return value

    def click(self, selector: str) -> None:
        """Click in the middle of an element, as a mouse does."""
        find = f"document.querySelector({json.dumps(selector)})"
        self.wait_for(f"!!{find}")
        box = self.value(f"{find}.getBoundingClientRect().toJSON()")
        x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
        for kind in ("mousePressed", "mouseReleased"):
            self._call("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def type(self, text: str) -> None:
        self._call("Input.insertText", text=text)

    def press_shift_enter(self) -> None:
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "modifiers": 8, "text": "\r"}
        for kind in ("keyDown", "keyUp"):
            self._call("Input.dispatchKeyEvent", type=kind, **key)

    def screenshot(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(base64.b64decode(self._call("Page.captureScreenshot")["data"]))


@contextlib.contextmanager
def chromium() -> Iterator[Page]:
    """A fresh Chromium with a profile of its own."""
    with tempfile.TemporaryDirectory(prefix="mlenv-chromium-", ignore_cleanup_errors=True) as profile:
        command = ["chromium", *FLAGS, f"--user-data-dir={profile}"]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            try:
                devtools = websocket.create_connection(_address(process), timeout=DEADLINE)
                yield Page(devtools)
                devtools.close()
            finally:
                process.terminate()
                process.communicate()


def _address(process: subprocess.Popen[str]) -> str:
    for line in process.stderr:
        if line.startswith("DevTools listening on "):
            return line.split()[-1]
    raise AssertionError(f"chromium ended with {process.wait()} and no DevTools")
