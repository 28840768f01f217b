"""`narsil serve` as a user runs it: processes, on free ports, stopped with all that it started."""

import json
import os
import re
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from tests.support import PATIENCE_S, narsil, until

POLL_S = 0.03
"""Asking costs the processes under test time that they need to start."""


class Serve:
    """`with Serve(model, tmp_path, "--executor-executors", "2") as serve`: entered once it says that it is ready.

    Without a gRPC gateway, unless the options have one: most tests ask it nothing.
    """

    def __init__(self, model: Path | None, folder: Path, *options: str | Path) -> None:
        self.log = folder / "serve.log"
        ports = ["--http-port", "0", "--grpc-port", "0", "--metrics-port", "0", "--nats-port", "0"]
        models = ["--model", model] if model is not None else []
        self._arguments = ["serve", *models, "--data-dir", folder, *ports, "--grpc-processes", "0", *options]
        self.process: subprocess.Popen[bytes] | None = None
        self.metrics_port = 0
        self._seen: set[int] = set()

    def __enter__(self) -> Self:
        with self.log.open("wb") as log:
            self.process = narsil(*self._arguments, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        try:
            found = until(self._ready, "narsil serve is ready", every_s=POLL_S)
            self.metrics_port = int(found[1])
        except BaseException:
            print(self.log.read_text())
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        """Stops it if the test did not, and insists that no process is left."""
        if any(error):
            print(self.log.read_text()[-8_000:])
        assert self.process is not None
        if self.process.poll() is None:
            if self.metrics_port:
                self.actors()
            self.process.terminate()
            try:
                self.process.wait(PATIENCE_S)
            finally:
                self.process.kill()
                for pid in filter(alive, self._seen):
                    os.kill(pid, signal.SIGKILL)

    def _ready(self) -> re.Match[str] | None:
        assert self.process is not None
        text = self.log.read_text()
        assert self.process.poll() is None, f"narsil serve ended: {text}"
        return re.search(r"http://127\.0\.0\.1:(\d+)/metrics", text) if "Ctrl-C" in text else None

    def actors(self) -> list[dict[str, Any]]:
        """The rows of /health."""
        rows: list[dict[str, Any]] = self.health()["actors"]
        self._seen |= {row["pid"] for row in rows if row["pid"]}
        return rows

    def health(self) -> dict[str, Any]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/health", timeout=5) as response:
                state: dict[str, Any] = json.load(response)
        except urllib.error.HTTPError as error:
            state = json.load(error)
        return state

    def metrics(self) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=5) as response:
            text: str = response.read().decode()
        return text

    def pids(self, kind: str) -> list[int]:
        return [row["pid"] for row in self.actors() if row["kind"] == kind and row["pid"]]

    def until_up(self, kind: str, count: int = 1) -> None:
        """Returns when there are so many processes of a kind again, and all is healthy."""

        def up() -> bool:
            health = self.health()
            return bool(health["healthy"]) and count == len([1 for row in health["actors"] if row["kind"] == kind])

        until(up, f"{count} times {kind}, healthy", every_s=POLL_S)

    @property
    def http_port(self) -> int:
        return self._port("http")

    @property
    def grpc_port(self) -> int:
        return self._port("grpc")

    def _port(self, door: str) -> int:
        """Of the first gateway of a kind."""
        details = [row["detail"] for row in self.actors() if row["kind"] == "gateway"]
        return int(next(found[1] for detail in details if (found := re.match(rf"{door}://\S+:(\d+),", detail))))

    @property
    def nats_url(self) -> str:
        (url,) = [row["detail"] for row in self.actors() if row["kind"] == "broker"]
        return str(url)

    def ready(self) -> bool:
        """What the gateway's readiness endpoint says; False when nobody answers."""
        return ready(self.http_port)

    def interrupt(self) -> int:
        """Ctrl-C; the exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(PATIENCE_S)


def ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v2/health/ready", timeout=5) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextmanager
def actor(kind: str, folder: Path, *options: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    """`narsil KIND` beside a running system, its output in KIND.log; killed at the end unless the test stopped it."""
    with (folder / f"{kind}.log").open("wb") as log:
        process = narsil(kind, *options, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
