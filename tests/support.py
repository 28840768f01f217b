"""What tests of more than one folder need: a real broker, a small system on it, and the command as a process."""

import asyncio
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import uvloop
from click.testing import CliRunner, Result
from msgspec.structs import replace
from numpy.typing import NDArray

from narsil_stream.actors.batcher import Batcher
from narsil_stream.actors.executor import Executor
from narsil_stream.actors.repository import Repository
from narsil_stream.cli import cli
from narsil_stream.core import ports
from narsil_stream.core.actor import Actor
from narsil_stream.core.bus import Bus
from narsil_stream.core.client import Client
from narsil_stream.core.config import Config, NatsConfig
from narsil_stream.core.runtime import Runtime
from narsil_stream.gateways.grpc import GrpcGateway
from narsil_stream.gateways.http import HttpGateway
from narsil_stream.kernels import reference
from narsil_stream.kernels.artifact import read_spec
from narsil_stream.kernels.backend import Loader, RaggedBatch

T = TypeVar("T")
PATIENCE_S = 20.0
"""For what normally takes milliseconds, on a machine that is busy."""


def until(condition: Callable[[], Any], what: str, timeout_s: float = PATIENCE_S, every_s: float = 0.005) -> Any:
    """The first true value of `condition`, asked every few milliseconds. Fails with `what` after `timeout_s`."""
    end = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < end, f"{what}: not within {timeout_s} s"
        time.sleep(every_s)
    return found


class NatsServer:
    """A real nats-server on a free port, for one test. `with NatsServer() as broker: broker.url`.

    `options` go to its command line, e.g. "--user", "u", "--pass", "p". `kill` and `start` it again on the same port to
    see what its loss does; `pause` and `resume` freeze it.
    """

    def __init__(self, *options: str) -> None:
        self._options = options
        self._folder = tempfile.TemporaryDirectory(prefix="narsil-nats-")
        self._process: subprocess.Popen[bytes] | None = None
        self._port = ports.free_port("127.0.0.1", 0, "nats.port")

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self._port}"

    def start(self) -> None:
        """Returns when it accepts connections."""
        binary = Path(sys.executable).parent / "nats-server"
        listen = ["-a", "127.0.0.1", "-p", str(self._port), "--ports_file_dir", self._folder.name, "-l", self._log]
        self._process = subprocess.Popen([str(binary), *listen, *self._options], stderr=subprocess.DEVNULL)
        until(self._listening, "nats-server listens")

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def pause(self) -> None:
        self._running.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._running.send_signal(signal.SIGCONT)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
        self._folder.cleanup()

    @property
    def _running(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "nats-server is not running"
        return self._process

    @property
    def log(self) -> str:
        """What it has said so far."""
        return Path(self._log).read_text()

    @property
    def _log(self) -> str:
        return str(Path(self._folder.name) / "log")

    def _listening(self) -> list[str] | None:
        """It writes this file once it listens; its name holds the process's id."""
        assert self._running.poll() is None, f"nats-server ended: {Path(self._log).read_text()}"
        written = Path(self._folder.name) / f"nats-server_{self._running.pid}.ports"
        try:
            return list(json.loads(written.read_text())["nats"])
        except (FileNotFoundError, json.JSONDecodeError):
            return None


class System:
    """Executors and batchers that serve models on a broker, in one thread. `with System(broker.url, folder) as system`.

    Entered once a client sees every model. Executors, batchers, HTTP and gRPC gateways (on ports of their own) have
    connections of their own, as in processes of their own, so that all messages cross the broker; in mode inline they
    share one. `config` sets everything but the addresses. `loader` is what loads a model's backend. `seeds` are files
    of nkeys by kind of actor, and "client" for who waits until all is served, in place of the login in `config`.
    """

    KINDS: ClassVar = {"executor": Executor, "batcher": Batcher, "gateway": HttpGateway, "grpc": GrpcGateway}

    def __init__(
        self,
        url: str,
        *models: Path,
        config: Config | None = None,
        executors: int = 1,
        batchers: int = 1,
        gateways: int = 0,
        grpc_gateways: int = 0,
        loader: Loader = reference.load,
        seeds: Mapping[str, Path] | None = None,
    ) -> None:
        self.url = url
        config = config or Config()
        doors = {"http": replace(config.http, port=0), "grpc": replace(config.grpc, port=0)}
        self.config = replace(config, nats=replace(config.nats, url=url), **doors)
        self.runtimes: dict[str, list[Runtime]] = {kind: [] for kind in self.KINDS}
        """By kind of actor; in mode inline all hold the same one."""
        self._models = models
        self._seeds = seeds or {}
        self._loader = loader
        self._counts = {"executor": executors, "batcher": batchers, "gateway": gateways, "grpc": grpc_gateways}
        self._loop = uvloop.new_event_loop()
        self._stop = asyncio.Event()
        self._ready: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, name="system under test", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self._ready.result(PATIENCE_S)
        except BaseException:
            self.__exit__()
            raise
        return self

    def actors(self, kind: str) -> list[Actor[Any]]:
        """Those that run."""
        return [a for runtime in self.runtimes[kind] for a in runtime.actors if isinstance(a, self.KINDS[kind])]

    @property
    def http_port(self) -> int:
        """Of the first gateway."""
        (gateway, *_) = self.actors("gateway")
        assert isinstance(gateway, HttpGateway)
        return gateway.port

    @property
    def grpc_port(self) -> int:
        """Of the first gRPC gateway."""
        (gateway, *_) = self.actors("grpc")
        assert isinstance(gateway, GrpcGateway)
        return gateway.port

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Runs a coroutine on the system's event loop, e.g. `runtime.drain()`."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def __exit__(self, *error: object) -> None:
        """Stops without draining: what is open is answered UNAVAILABLE."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "the system under test did not stop"
        self._loop.close()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._live())
        except BaseException as error:
            if self._ready.done():
                raise
            self._ready.set_exception(error)

    async def _live(self) -> None:
        async with AsyncExitStack() as stack:
            shared: Runtime | None = None
            for kind, count in self._counts.items():
                for _ in range(count):
                    config = replace(self.config, nats=self._login(kind))
                    runtime = shared or await stack.enter_async_context(Runtime(config, kind))
                    shared = runtime if self.config.mode == "inline" else None
                    await runtime.start(partial(self._build, kind, runtime.bus))
                    self.runtimes[kind].append(runtime)
            await self._wait_served()
            self._ready.set_result(None)
            await self._stop.wait()

    def _build(self, kind: str, bus: Bus) -> Actor[Any]:
        if kind == "gateway":
            return HttpGateway(self.config, bus)
        if kind == "grpc":
            return GrpcGateway(self.config, bus)
        if kind == "batcher":
            return Batcher(self.config, bus)
        folder = self.config.model_repository
        return Executor(self.config, bus, Repository(self._models, Path(folder) if folder else None), self._loader)

    def _login(self, kind: str) -> NatsConfig:
        nats = self.config.nats
        return replace(nats, nkey_seed_file=str(self._seeds[kind])) if kind in self._seeds else nats

    async def _wait_served(self) -> None:
        wanted = {(spec.name, spec.version) for spec in map(read_spec, self._models)}
        async with asyncio.timeout(PATIENCE_S), Client(self._login("client")) as client:
            while not wanted <= {(ref.name, ref.version) for ref in client.models()}:  # noqa: ASYNC110 no signal
                await asyncio.sleep(0.005)


def expected(model: Path, dense: NDArray[np.float32], ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """What the reference backend, called directly, says of one-hot rows."""
    scores = np.empty(len(dense), np.float32)
    reference.load(model).run(RaggedBatch(dense, np.ascontiguousarray(ids).reshape(-1)), scores)
    return scores


def invoke(*args: str | Path, **environ: str) -> Result:
    """The command `narsil` in this process, which is quick. Files only: its standard input and output are no pipes."""
    root = logging.getLogger()
    before = root.handlers[:]
    settings = {name: None for name in os.environ if name.startswith("NARSIL_")}
    try:
        return CliRunner().invoke(cli, list(map(str, args)), env=settings | environ)
    finally:
        root.handlers = before


def plain_environ(**extra: str) -> dict[str, str]:
    """This process's variables without settings of ours that the developer's shell may hold."""
    return {name: value for name, value in os.environ.items() if not name.startswith("NARSIL_")} | extra


def narsil(*args: str | Path, **popen: Any) -> subprocess.Popen[bytes]:
    """The command `narsil` as a process, with pipes for what `popen` does not say."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE) | {"env": plain_environ()}
    return subprocess.Popen([sys.executable, "-m", "narsil_stream", *map(str, args)], **(pipes | popen))
