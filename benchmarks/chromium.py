"""A headless Chromium, driven by its DevTools protocol: no driver program beside it, and nothing is downloaded."""

from __future__ import annotations

import base64
import contextlib
import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from websockets.sync.client import ClientConnection, connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_ADDRESS = re.compile(r"DevTools listening on (ws://\S+)")


def executable() -> str | None:
    """The browser of this machine, or None."""
    return next((found for name in NAMES if (found := shutil.which(name)) is not None), None)


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """A browser that ends with the ``with``; raises ``FileNotFoundError`` where there is none."""
    program = executable()
    if program is None:
        raise FileNotFoundError(f"None of {', '.join(NAMES)} is installed; on Debian: apt-get install chromium")
    # --no-sandbox: as root, which containers run tests as, Chromium's sandbox refuses to start; our own file is opened.
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
    quiet = ["--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        started = [program, *flags, *quiet, f"--user-data-dir={profile}", "--remote-debugging-port=0", "about:blank"]
        running = subprocess.Popen(started, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        try:
            with connect(_address(running), max_size=None) as connection:
                yield Browser(connection)
        finally:
            running.terminate()
            running.wait(timeout=30)
            if running.stderr is not None:
                running.stderr.close()


def _address(running: subprocess.Popen[str]) -> str:
    said = []
    for line in running.stderr or ():
        said.append(line)
        found = _ADDRESS.search(line)
        if found:
            return found.group(1)
    raise RuntimeError("Chromium did not start: " + "".join(said)[-2000:])


@dataclass(eq=False)
class Browser:
    """One connection; pages are sessions on it."""

    connection: ClientConnection
    _count: int = 0
    _events: list[dict[str, Any]] = field(default_factory=list)

    def call(self, method: str, session: str | None = None, **parameters: Any) -> dict[str, Any]:
        """The answer to a command; events that come first are kept for the pages."""
        self._count += 1
        message: dict[str, Any] = {"id": self._count, "method": method, "params": parameters}
        if session is not None:
            message["sessionId"] = session
        self.connection.send(json.dumps(message))
        while True:
            received = json.loads(self.connection.recv(timeout=120))
            if received.get("id") == self._count:
                if "error" in received:
                    raise RuntimeError(f"{method}: {received['error']['message']}")
                return received.get("result", {})  # type: ignore[no-any-return]
            self._events.append(received)

    def page(self, *, width: int = 1280, height: int = 900, dark: bool = False, scale: float = 1.0) -> Page:
        """A new page of this size and colour scheme; below 600 pixels it is a phone."""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(self, session)
        for domain in ("Page", "Runtime", "Log", "Network"):
            page.call(f"{domain}.enable")
        phone = width < 600
        page.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=scale, mobile=phone
        )
        page.call("Emulation.setTouchEmulationEnabled", enabled=phone)
        page.prefers(dark=dark)
        return page


@dataclass(eq=False)
class Page:
    """One page."""

    browser: Browser
    session: str

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A command to this page."""
        return self.browser.call(method, self.session, **parameters)

    def prefers(self, *, dark: bool) -> None:
        """What the system of the reader is set to."""
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def evaluate(self, expression: str) -> Any:
        """The value of an expression in the page, a promise's when it has come."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{expression}: {found['exceptionDetails'].get('exception', {}).get('description')}")
        return found["result"].get("value")

    def open(self, path: Path) -> None:
        """Go to a file; what it draws comes later."""
        self.call("Page.navigate", url=path.resolve().as_uri())

    def wait_for(self, expression: str, *, seconds: float = 60.0) -> None:
        """Until an expression is true; raises ``TimeoutError`` with it."""
        until = time.monotonic() + seconds
        while not self._holds(expression):
            if time.monotonic() > until:
                raise TimeoutError(f"not true within {seconds:g} s: {expression}; the page said {self.complaints()}")
            time.sleep(0.02)

    def _holds(self, expression: str) -> bool:
        try:
            return bool(self.evaluate(expression))
        except RuntimeError:  # between two documents there is nothing to ask
            return False

    def complaints(self) -> list[str]:
        """Uncaught exceptions, errors and warnings on the console, and everything that was asked of a network."""
        found = []
        for event in self.browser._events:
            if event.get("sessionId") != self.session:
                continue
            kind, told = event["method"], event["params"]
            if kind == "Runtime.exceptionThrown":
                details = told["exceptionDetails"]
                found.append(str(details.get("exception", {}).get("description", details["text"])))
            elif kind == "Runtime.consoleAPICalled" and told["type"] in ("error", "warning", "assert"):
                found.append(" ".join(str(part.get("value", part.get("description"))) for part in told["args"]))
            elif kind == "Log.entryAdded" and told["entry"]["level"] in ("error", "warning"):
                found.append(told["entry"]["text"])
            elif kind == "Network.requestWillBeSent":
                address = told["request"]["url"]
                if not address.startswith(("file:", "data:", "blob:")):
                    found.append(f"asked the network for {address}")
        return found

    def screenshot(self, path: Path, *, full: bool = False) -> None:
        """What is to be seen as PNG, with ``full`` the whole page."""
        more: dict[str, Any] = {}
        if full:
            size = self.call("Page.getLayoutMetrics")["cssContentSize"]
            more = {"captureBeyondViewport": True, "clip": {**size, "scale": 1}}
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot", format="png", **more)["data"]))

    def close(self) -> None:
        """Forget the page."""
        self.call("Page.close")

    def pdf(self, path: Path) -> None:
        """The page as it prints."""
        path.write_bytes(base64.b64decode(self.call("Page.printToPDF", preferCSSPageSize=True)["data"]))
