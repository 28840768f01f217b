"""Several times more than an executor can do, over a real broker: what is refused and where, and what is served."""

import asyncio
import time
from collections import Counter
from pathlib import Path

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from narsil_stream.core.client import Client, make_request
from narsil_stream.core.config import BatchConfig, Config
from narsil_stream.kernels import reference
from narsil_stream.kernels.backend import Backend, RaggedBatch
from narsil_stream.schemas.errors import Fault, Refused
from tests.asking import Rows, some_rows
from tests.doubles import Gate, GatedBackend
from tests.support import NatsServer, System

PASS_S = 0.02
MAX_ROWS = 4
CAPACITY = MAX_ROWS / PASS_S
"""Rows a second: an executor with a fixed service time stands in for a device."""
BUDGET_S = 0.3


class Slow(GatedBackend):
    """Takes a fixed time for each batch."""

    def run(self, batch: RaggedBatch, scores: NDArray[np.float32]) -> None:
        time.sleep(PASS_S)
        super().run(batch, scores)


def load(folder: Path) -> Backend:
    return Slow(reference.load(folder), Gate())


class Load:
    """Requests of one row that come evenly, whatever becomes of them."""

    def __init__(self, client: Client, rows: Rows) -> None:
        self._client = client
        self._request = make_request(rows.dense, rows.ids, None, None)
        self.ends: Counter[str] = Counter()
        self.refused_s: list[float] = []

    async def offer(self, rate: float, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        start = loop.time()
        async with asyncio.TaskGroup() as group:
            for at in range(int(rate * seconds)):
                await asyncio.sleep(max(0.0, start + at / rate - loop.time()))
                group.create_task(self._ask())

    async def _ask(self) -> None:
        started = time.perf_counter()
        try:
            await self._client.infer("ctr", self._request, budget_s=BUDGET_S, retry=False)
        except Refused as refused:
            self.ends[refused.fault.name] += 1
            if refused.fault is Fault.OVERLOADED:
                assert refused.retry_after_us > 0
                self.refused_s.append(time.perf_counter() - started)
        else:
            self.ends["scored"] += 1


def test_under_overload_most_are_refused_at_the_door_and_what_can_be_served_is_served(
    nats_server: NatsServer, criteo_model: Path
) -> None:
    """Refusals that cost as much as scores bring the whole system down when it is needed most."""
    config = replace(Config(), batch=BatchConfig(max_rows=MAX_ROWS))
    rows = some_rows(criteo_model, 1)

    async def run() -> None:
        async with Client(nats_server.url) as client:
            warm = Load(client, rows)
            await warm.offer(CAPACITY / 2, 1)
            assert warm.ends["scored"] > 0.5 * CAPACITY / 2
            assert client._requester.throttled == 0
            await warm.offer(5 * CAPACITY, 1)
            throttled = client._requester.throttled
            peak = Load(client, rows)
            await peak.offer(5 * CAPACITY, 3)
            throttled = client._requester.throttled - throttled
            p50, p99 = 1e3 * np.percentile(peak.refused_s, [50, 99])
            print(f"{dict(peak.ends)}, {throttled} refused at the door; refusals: p50 {p50:.2f} ms, p99 {p99:.2f} ms")
            assert throttled > 0.5 * peak.ends["OVERLOADED"]
            assert peak.ends["scored"] > CAPACITY, "what can be served is served, as far as this machine has time"
            await asyncio.sleep(1)
            throttled = client._requester.throttled
            calm = Load(client, rows)
            await calm.offer(CAPACITY / 2, 1)
            assert client._requester.throttled == throttled
            assert calm.ends["scored"] > 0.5 * CAPACITY / 2

    with System(nats_server.url, criteo_model, config=config, loader=load):
        asyncio.run(run())
