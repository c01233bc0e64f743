"""Headless Chromium as a reader: opens a page in a window of some size and tells what it did.

Speaks the DevTools protocol over two pipes, so that it needs no package and no port.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from select import select
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = next((path for name in NAMES if (path := shutil.which(name))), "")
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-extensions", "--disable-sync",
    "--remote-debugging-pipe",
)  # fmt: skip
PATIENCE = 60  # seconds for an answer


class Page:
    """A tab: what it logged, what it asked for, and what expressions are worth in it."""

    def __init__(self, read: int, write: int) -> None:
        self._read, self._write, self._rest, self._id, self._session = read, write, b"", 0, None
        self.events: list[dict[str, Any]] = []
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")
        self.ask("Page.setLifecycleEventsEnabled", enabled=True)

    def ask(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a command; events that come in between are kept."""
        self._id += 1
        message = {"id": self._id, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            found = self._next()
            if found.get("id") == self._id:
                assert "error" not in found, (method, found["error"])
                return found["result"]
            self.events.append(found)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select([self._read], [], [], PATIENCE)[0], "the browser does not answer"
            self._rest += (part := os.read(self._read, 1 << 20))
            assert part, "the browser has gone"
        message, self._rest = self._rest.split(b"\0", 1)
        return json.loads(message)

    def open(self, url: str, width: int, height: int = 900, dark: bool = False, phone: bool = False) -> None:
        """Load a page and wait until it is there."""
        size = {"width": width, "height": height, "deviceScaleFactor": 2 if phone else 1, "mobile": phone}
        self.ask("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])
        start, loader = len(self.events), self.ask("Page.navigate", url=url)["loaderId"]
        while not any(_loaded(event, loader) for event in self.events[start:]):
            self.events.append(self._next())

    def value(self, expression: str) -> Any:
        """What a JavaScript expression is worth, as JSON."""
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def complaints(self) -> list[str]:
        """What the console, uncaught errors and the browser's own log said."""
        kinds = {"Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"}
        return [json.dumps(event["params"]) for event in self.events if event.get("method") in kinds]

    def requests(self) -> list[str]:
        """Addresses that were asked for, those within the page (`data:`) left out."""
        asked = [event["params"]["request"]["url"] for event in self.events
                 if event.get("method") == "Network.requestWillBeSent"]  # fmt: skip
        return [url for url in asked if not url.startswith(("data:", "blob:"))]

    def picture(self, path: Path, x: float = 0, y: float = 0, width: float = 0, height: float = 0) -> None:
        """A PNG of the window, or of a part of the page."""
        clip = {"clip": {"x": x, "y": y, "width": width, "height": height, "scale": 1}} if width else {}
        found = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=bool(width), **clip)
        path.write_bytes(base64.b64decode(found["data"]))


def _loaded(event: dict[str, Any], loader: str) -> bool:
    told = event.get("params", {})
    return event.get("method") == "Page.lifecycleEvent" and (told["name"], told["loaderId"]) == ("load", loader)


@contextmanager
def browser(profile: Path) -> Iterator[Page]:
    """A fresh browser with a tab; it ends with the block."""
    to_browser, from_browser = os.pipe(), os.pipe()
    theirs = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (to_browser[0], from_browser[1])]

    def wire() -> None:
        """The browser reads commands from descriptor 3 and answers on 4."""
        for place, end in enumerate(theirs, 3):
            os.dup2(end, place)

    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", "about:blank"]
    nowhere = subprocess.DEVNULL
    process = subprocess.Popen(
        command, preexec_fn=wire, pass_fds=(3, 4), stdin=nowhere, stdout=nowhere, stderr=nowhere, start_new_session=True
    )
    for end in (*theirs, to_browser[0], from_browser[1]):
        os.close(end)
    try:
        yield Page(from_browser[0], to_browser[1])
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # with all of its helpers
        process.wait()
        os.close(to_browser[1])
        os.close(from_browser[0])
