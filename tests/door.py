"""What every door of the system calls, asked from ordinary code: for tests of what is the same over each protocol."""

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, Self, TypeVar

from msgspec.structs import replace
from prometheus_client import CollectorRegistry

from narsil_stream.core.bus import Bus
from narsil_stream.core.config import Config, NatsConfig
from narsil_stream.gateways.inference import Inference
from narsil_stream.schemas.oip import ModelStatistics, RepositoryAction
from narsil_stream.schemas.wire import InferAnswer, InferRequest
from tests.support import PATIENCE_S

T = TypeVar("T")


class Door:
    """`with Door(url) as door`: an `Inference` with a connection and an event loop of its own."""

    def __init__(self, url: str, config: Config | None = None) -> None:
        self._config = replace(config or Config(model_control="explicit"), nats=NatsConfig(url=url))
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="door", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self.do(self._open())
        return self

    def __exit__(self, *error: object) -> None:
        self.do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE_S)
        self._loop.close()

    async def _open(self) -> None:
        self._bus = Bus(self._config.nats, "door")
        await self._bus.connect()
        self.inference = Inference(self._config, self._bus, CollectorRegistry())
        await self.inference.start()
        await self.inference.wait_ready(PATIENCE_S)

    async def _close(self) -> None:
        await self.inference.stop()
        await self._bus.close()

    def submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        return self.submit(work).result(PATIENCE_S)

    def load(self, model: str, **parameters: Any) -> None:
        self.do(self.inference.load(model, RepositoryAction(parameters)))

    def unload(self, model: str, **parameters: Any) -> None:
        self.do(self.inference.unload(model, RepositoryAction(parameters)))

    def index(self, ready: bool = False) -> dict[tuple[str, str], str]:
        """State by name and version."""
        return {(entry.name, entry.version): entry.state for entry in self.do(self.inference.index(ready))}

    def reason(self, model: str, version: str) -> str:
        (entry,) = (e for e in self.do(self.inference.index(False)) if (e.name, e.version) == (model, version))
        return entry.reason

    def statistics(self, model: str = "", version: str = "") -> list[ModelStatistics]:
        return list(self.do(self.inference.statistics(model, version)).model_stats)

    def ask(self, model: str, request: InferRequest, version: str = "") -> Future[InferAnswer]:
        async def read() -> InferRequest:
            return request

        return self.submit(self.inference.ask(model, version, read))
