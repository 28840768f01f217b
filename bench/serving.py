"""Servers under test as processes: our own pipeline behind a broker that counts bytes, and whatever else is started.

`narsil serve` gets the broker's address, as a user with a broker of his own would run it: it is our broker, with our
configuration, and its monitoring port on 127.0.0.1 in addition.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from narsil_stream.bench.questions import Misbehaved
from narsil_stream.core import broker
from narsil_stream.core.config import NatsConfig
from narsil_stream.core.ports import free_port

READY_S = 60.0
STOP_S = 15.0
HOST = "127.0.0.1"


class NotStarted(Misbehaved):
    """A server that did not come up; says what it said last."""


class Bypassed(Misbehaved):
    """Requests were answered without having crossed the broker."""


class Broker(NamedTuple):
    url: str
    monitor: int
    pid: int

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def in_bytes(self) -> int:
        """Payload bytes that the broker has received so far, from whomever."""
        return self._counted("in_bytes")

    def in_messages(self) -> int:
        """Messages that the broker has received so far, from whomever."""
        return self._counted("in_msgs")

    def _counted(self, what: str) -> int:
        with urllib.request.urlopen(f"http://{HOST}:{self.monitor}/varz", timeout=READY_S) as response:
            return int(json.load(response)[what])

    def since(self, name: str, before: int, sent: int) -> None:
        """Raise Bypassed unless at least the `sent` bytes came in since there were `before`."""
        grown = self.in_bytes() - before
        if grown < sent:
            raise Bypassed(
                name,
                f"the broker received {grown:,} bytes while requests of {sent:,} bytes were answered: they took "
                "another way, so the figure is not one of the pipeline",
            )


class Pipeline(NamedTuple):
    """`narsil serve`, ready."""

    broker: Broker
    http: int
    grpc: int
    pids: dict[str, list[int]]
    """By kind of actor, at the start."""
    metrics: int

    def actors(self) -> list[dict[str, Any]]:
        """What `narsil serve` says now of each process."""
        return health(self.metrics)

    def port(self, transport: str) -> int:
        return {"http": self.http, "grpc": self.grpc, "nats": self.broker.port}[transport]

    @property
    def processes(self) -> dict[str, list[int]]:
        """By what lives in them, e.g. "executor + batcher"."""
        kinds: dict[int, list[str]] = {}
        for kind, pids in self.pids.items():
            for pid in pids:
                kinds.setdefault(pid, []).append(kind)
        found: dict[str, list[int]] = {}
        for pid, of in kinds.items():
            found.setdefault(" + ".join(dict.fromkeys(of)), []).append(pid)
        return found

    @property
    def placement(self) -> str:
        return ", ".join(f"{len(pids)} {what}" for what, pids in self.processes.items())


@contextlib.contextmanager
def own_broker(folder: Path) -> Iterator[Broker]:
    """nats-server as `narsil serve` configures it."""
    config = NatsConfig(host=HOST, port=free_port(HOST, 0, "nats.port"))
    monitor = free_port(HOST, 0, "monitor")
    command = [*broker.command(str(folder), config), "--http_port", str(monitor)]
    with process(command, folder / "broker.log", environ=broker.environment()) as running:
        one = Broker(f"nats://{HOST}:{config.port}", monitor, running.pid)
        patiently("the broker", one.in_bytes, running, folder / "broker.log", READY_S)
        yield one


@contextlib.contextmanager
def pipeline(folder: Path, model: Path, *options: str) -> Iterator[Pipeline]:
    """Broker, gateways, batcher and executor for the model: mode batch, one process for each, unless options differ."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "serve.log"
    with own_broker(folder) as broker_:
        # Several processes can share only a port that is named.
        named = {f"--{door}-port": str(free_port(HOST, 0, f"{door}.port")) for door in ("http", "grpc", "metrics")}
        ports = [word for option in named.items() for word in option]
        command = [sys.executable, "-m", "narsil_stream", "serve", "--model", str(model), "--data-dir", str(folder)]
        command += ["--nats-url", broker_.url, "--log-level", "warning", *ports, *options]
        with process(command, log) as running:
            (metrics,) = patiently(
                "narsil serve", lambda: _found(log, r"http://\S+:(\d+)/metrics"), running, log, READY_S
            )
            yield _described(broker_, int(metrics))


def health(port: int) -> list[dict[str, Any]]:
    """The processes of a `narsil serve` and how they are, by its metrics port."""
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=READY_S) as response:
            return list(json.load(response)["actors"])
    except urllib.error.HTTPError as error:  # 503: one of them is down
        return list(json.load(error)["actors"])


def _described(broker_: Broker, metrics: int) -> Pipeline:
    doors = {"http": 0, "grpc": 0}
    pids: dict[str, list[int]] = {"broker": [broker_.pid]}
    for row in health(metrics):
        kind = row["kind"]
        if door := re.match(r"(http|grpc)://[^,]*:(\d+)", row["detail"]):
            doors[door[1]] = int(door[2])
            kind = f"{door[1]} gateway"
        if row["pid"]:
            pids.setdefault(kind, []).append(row["pid"])
    return Pipeline(broker_, doors["http"], doors["grpc"], pids, metrics)


def cpu_s(pid: int) -> float:
    """Processor time that a process has used, with its threads, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def echo(kind: str, answer: bytes, folder: Path, url: str = "") -> Iterator[tuple[int, int]]:
    """Port and process of a server that gives this answer to everything. `url`: of the broker, for kind nats."""
    log = folder / f"echo-{kind}.log"
    command = [sys.executable, "-m", "narsil_stream.bench.echo", kind, *([url] if url else [])]
    with process(command, log, answer) as running:
        (port,) = patiently("the echo", lambda: _found(log, r"echo on (\d+)"), running, log, READY_S)
        yield int(port), running.pid


@contextlib.contextmanager
def process(
    command: Sequence[str], log: Path, stdin: bytes = b"", environ: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own, its output in `log`; with it ends all that it started there."""
    with log.open("wb") as out:
        running = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=out, stderr=out, env=environ, start_new_session=True
        )
    assert running.stdin is not None
    try:
        with contextlib.suppress(BrokenPipeError):
            running.stdin.write(stdin)
            running.stdin.close()
        yield running
    finally:
        running.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.wait(STOP_S)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, signal.SIGKILL)
        running.wait()


def patiently(name: str, ask: Any, running: subprocess.Popen[bytes], log: Path, seconds: float) -> Any:
    """The first answer of `ask`, which gives None or raises OSError until then. Raises NotStarted."""
    end = time.monotonic() + seconds
    problem = "no answer"
    while time.monotonic() < end and running.poll() is None:
        try:
            if (found := ask()) is not None:
                return found
        except OSError as error:
            problem = str(error)
        time.sleep(0.05)
    state = f"ended with status {running.returncode}" if running.poll() is not None else f"not ready in {seconds:.0f} s"
    raise NotStarted(name, f"{state} ({problem}). It said: {_tail(log)}")


def _tail(log: Path) -> str:
    return log.read_text(errors="replace").strip()[-1500:] or "nothing"


def _found(log: Path, pattern: str) -> tuple[str, ...] | None:
    match = re.search(pattern, log.read_text(errors="replace"))
    return match.groups() if match else None
