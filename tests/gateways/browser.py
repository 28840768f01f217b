"""Chromium, driven over a pipe by its DevTools protocol: no driver program and no package is needed."""

import base64
import contextlib
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, Self

from tests.support import until

FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--remote-debugging-pipe",
)  # fmt: skip
"""Chromium has no sandbox for root, as whom containers run; what it shows here is our own."""
ON_3_AND_4 = """
import fcntl, os, sys
theirs, answers = (fcntl.fcntl(int(fd), fcntl.F_DUPFD, 10) for fd in sys.argv[1:3])
os.dup2(theirs, 3)
os.dup2(answers, 4)
os.execv(sys.argv[3], sys.argv[3:])
"""
"""Chromium's protocol is on these two descriptors."""
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def found() -> str | None:
    """The path of a browser."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page of a browser with a profile of its own. `with Browser(path) as browser: browser.open(url)`."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._ids = itertools.count(1)
        self._target = self._session = ""
        self.complaints: list[str] = []
        """What the browser's console would show: errors of scripts, and what the page's policy did not let through."""
        self.fetched: list[str] = []
        """Addresses of all requests."""

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="narsil-browser-", ignore_cleanup_errors=True)
        theirs, self._write = os.pipe()
        ours, answers = os.pipe()
        command = [self._path, *FLAGS, f"--user-data-dir={self._folder.name}", "about:blank"]
        with (Path(self._folder.name) / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", ON_3_AND_4, str(theirs), str(answers), *command],
                pass_fds=(theirs, answers), stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        os.close(theirs)
        os.close(answers)
        self._incoming = os.fdopen(ours, "rb")
        self.fresh()
        return self

    def fresh(self) -> None:
        """A new page, of which nothing has been heard yet, in place of the one there was."""
        old, self._session = self._target, ""
        self._target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=self._target, flatten=True)["sessionId"]
        if old:
            self.call("Target.closeTarget", targetId=old)
        self._session = session
        self.complaints, self.fetched = [], []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)  # it has children of its own
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

    def wait(self, script: str, what: str) -> None:
        """Until an expression is true, in JavaScript's sense."""
        until(lambda: self.look(f"Boolean({script})"), what)

    def dress(self, width: int, height: int, scheme: str, phone: bool = False) -> None:
        """The window's size, and whether people prefer dark or light."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=phone)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def photograph(self, path: Path) -> None:
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))

    def _next(self) -> Any:
        data = bytearray()
        while (byte := self._incoming.read(1)) != b"\0":
            assert byte, f"the browser has ended: {(Path(self._folder.name) / 'log').read_text()}"
            data += byte
        return json.loads(data)

    def _hear(self, said: Any) -> None:
        if said.get("sessionId") != self._session:
            return  # of the page before
        params = said.get("params", {})
        match said.get("method"):
            case "Runtime.exceptionThrown":
                self.complaints.append(str(params["exceptionDetails"]))
            case "Log.entryAdded" if params["entry"]["level"] == "error":
                self.complaints.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
            case "Network.requestWillBeSent":
                self.fetched.append(params["request"]["url"])
