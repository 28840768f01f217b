"""Chromium, driven over a pipe by its DevTools protocol: no driver program and no package is needed."""

import base64
import itertools
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any, Self

from tests.support import until

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def found() -> str | None:
    """The path of a browser."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page of a browser with a profile of its own. `with Browser(path) as browser: browser.open(url)`."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._ids = itertools.count(1)
        self.complaints: list[str] = []
        """What the browser's console would show: errors of scripts, and what the page's policy did not let through."""
        self.fetched: list[str] = []
        """Addresses of all requests."""

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="narsil-browser-", ignore_cleanup_errors=True)
        to_us, self._write = os.pipe()
        self._read, from_us = os.pipe()
        self._process = subprocess.Popen(
            # The protocol is on descriptors 3 and 4.
            ["sh", "-c", f'exec "$@" 3<&{to_us} 4>&{from_us}', "sh", self._path, "--headless=new", "--no-sandbox",
             "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run", "--remote-debugging-pipe",
             f"--user-data-dir={self._folder.name}", "about:blank"],
            pass_fds=(to_us, from_us), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_us)
        os.close(from_us)
        self._incoming = os.fdopen(self._read, "rb")
        self._session = ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.wait()
        self._incoming.close()
        os.close(self._write)
        self._folder.cleanup()

    def call(self, method: str, **params: Any) -> Any:
        """The result of a command of the DevTools protocol."""
        id = next(self._ids)
        command = {"id": id, "method": method, "params": params}
        if self._session:
            command["sessionId"] = self._session
        os.write(self._write, json.dumps(command).encode() + b"\0")
        while (said := self._next()).get("id") != id:
            self._hear(said)
        assert "error" not in said, said
        return said["result"]

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def look(self, script: str) -> Any:
        """What a JavaScript expression is, promises awaited."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def wait(self, script: str, what: str) -> Any:
        """The first true value of an expression."""
        return until(lambda: self.look(script), what)

    def dress(self, width: int, height: int, scheme: str, phone: bool = False) -> None:
        """The window's size, and whether people prefer dark or light."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def photograph(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def _next(self) -> Any:
        data = bytearray()
        while (byte := self._incoming.read(1)) != b"\0":
            assert byte, "the browser has ended"
            data += byte
        return json.loads(data)

    def _hear(self, said: Any) -> None:
        params = said.get("params", {})
        match said.get("method"):
            case "Runtime.exceptionThrown":
                self.complaints.append(str(params["exceptionDetails"]))
            case "Log.entryAdded" if params["entry"]["level"] == "error":
                self.complaints.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
            case "Network.requestWillBeSent":
                self.fetched.append(params["request"]["url"])
