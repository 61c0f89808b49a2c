"""Headless Chromium, controlled through the DevTools protocol."""

import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import ClientConnection, connect

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "chrome")
TIMEOUT_SECONDS = 60.0


def find_browser() -> str | None:
    """Return the path of an installed browser, or None."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


class Tab:
    """Browser tab. `failures` collects uncaught exceptions and security violations of its page."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._number = 0
        self.failures: list[str] = []
        self.send("Runtime.enable")
        self.send("Page.enable")
        self.send("Log.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a protocol command and return its result."""
        self._number += 1
        self._connection.send(json.dumps({"id": self._number, "method": method, "params": params}))
        while True:
            message = json.loads(self._connection.recv(TIMEOUT_SECONDS))
            if message.get("method") == "Runtime.exceptionThrown":
                self.failures.append(message["params"]["exceptionDetails"]["text"])
            if message.get("method") == "Log.entryAdded" and message["params"]["entry"]["source"] == "security":
                self.failures.append(message["params"]["entry"]["text"])
            if message.get("id") == self._number:
                assert "error" not in message, message
                return message["result"]

    def evaluate(self, script: str) -> Any:
        """Return the value of a JavaScript expression, awaited if it is a promise."""
        result = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_until(self, script: str) -> Any:
        """Wait until a JavaScript expression is true and return its value."""
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not (value := self.evaluate(script)):
            assert time.monotonic() < deadline, f"timed out waiting for: {script}"
        return value

    def press_key(self, key: str, code: int, modifiers: int = 0) -> None:
        for kind in ("keyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, modifiers=modifiers)

    def set_width(self, pixels: int) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=pixels, height=900, deviceScaleFactor=1, mobile=pixels < 600)


@contextmanager
def open_tab(url: str) -> Generator[Tab]:
    """Start a browser, load a page, and yield its tab."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--remote-debugging-port=0"]
        program = find_browser()
        assert program is not None
        process = subprocess.Popen(
            [program, *options, f"--user-data-dir={folder}", "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            port = _read_port(Path(folder) / "DevToolsActivePort")
            pages = httpx.get(f"http://127.0.0.1:{port}/json", timeout=TIMEOUT_SECONDS).json()
            address = next(page["webSocketDebuggerUrl"] for page in pages if page["type"] == "page")
            with connect(address, max_size=None) as connection:
                tab = Tab(connection)
                tab.send("Page.navigate", url=url)
                tab.wait_until("document.readyState === 'complete'")
                yield tab
        finally:
            process.terminate()
            process.wait(TIMEOUT_SECONDS)


def _read_port(path: Path) -> str:
    """Wait for the file in which Chromium writes its port."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not path.exists() or not path.read_text().strip():
        assert time.monotonic() < deadline, "the browser did not start"
        time.sleep(0.05)
    return path.read_text().splitlines()[0]
