"""Load with known answers: callers over HTTP and over NATS that check each score and never ask twice at a time."""

import asyncio
import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import uvloop

from narsil_stream.core.client import Client
from narsil_stream.core.config import NatsConfig
from narsil_stream.kernels.artifact import read_spec
from narsil_stream.kernels.init import random_batch
from narsil_stream.schemas.errors import Refused, named
from tests.support import PATIENCE_S, expected, until

ROWS = 500
BUDGET_S = 10.0
REST_S = 0.1


class Traffic:
    """`with Traffic(model, http=port, nats=url) as traffic`: until the end of the block, callers ask without pause.

    `ended` counts how requests ended: "right", "wrong", or the name of the error; "connection" is an HTTP connection
    that broke or was refused before an answer. `other` is an artifact of the same shape, for instance the next weights:
    answers by it count as "other".
    """

    def __init__(
        self,
        model: Path,
        *,
        http: int = 0,
        nats: str | NatsConfig = "",
        callers: int = 16,
        retry: bool = False,
        other: Path | None = None,
    ) -> None:
        spec = read_spec(model)
        batch = random_batch(spec, ROWS, seed=11)
        self._name = spec.name
        self._dense, self._ids = batch.dense, batch.ids.reshape(ROWS, spec.n_sparse)
        self._expected = {"right": expected(model, self._dense, self._ids)}
        if other is not None:
            self._expected["other"] = expected(other, self._dense, self._ids)
        self._http, self._nats, self._callers, self._retry = http, nats, callers, retry
        self.ended: Counter[str] = Counter()
        self.slowest_s = 0.0
        self._rest_s = 0.0
        self._enough = threading.Event()
        self._thread = threading.Thread(target=lambda: uvloop.run(self._run()), name="traffic", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self.answered(50)
        return self

    def __exit__(self, *error: object) -> None:
        self._enough.set()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive(), "requests were never answered"

    def answered(self, more: int) -> None:
        """Returns when this many more requests got their right score."""
        goal = self.good + more
        until(lambda: self.good >= goal or self.ended["wrong"], f"{more} more answers; so far {self.ended}")

    def until_ended(self, how: str) -> None:
        """Returns when one more request has ended so."""
        goal = self.ended[how] + 1
        until(lambda: self.ended[how] >= goal, f"a request that ends as {how}; so far {self.ended}")

    @contextlib.contextmanager
    def gentle(self) -> Iterator[None]:
        """Callers rest between their requests: a process that starts beside full load takes many times as long."""
        self._rest_s = REST_S
        try:
            yield
        finally:
            self._rest_s = 0.0

    @property
    def good(self) -> int:
        """Answers with the scores of one of the artifacts."""
        return sum(self.ended[how] for how in self._expected)

    @property
    def bad(self) -> Counter[str]:
        """All that did not get such scores."""
        return Counter({how: count for how, count in self.ended.items() if how not in self._expected})

    async def _run(self) -> None:
        async with contextlib.AsyncExitStack() as stack:
            tasks: list[Awaitable[None]] = []
            if self._nats:
                client = await stack.enter_async_context(Client(self._nats))
                tasks += [self._ask_forever(i, self._over_nats(client)) for i in range(self._callers)]
            if self._http:
                tasks += [self._ask_forever(i, HttpCaller(self._http, self._name).ask) for i in range(self._callers)]
            await asyncio.gather(*tasks)

    async def _ask_forever(self, caller: int, ask: Callable[[list[int], "Traffic"], Awaitable[list[float]]]) -> None:
        rng = np.random.default_rng(caller)
        while not self._enough.is_set():
            rows = rng.choice(ROWS, size=int(rng.integers(1, 6)), replace=False).tolist()
            started = time.monotonic()
            try:
                scores = await ask(rows, self)
            except Refused as refused:
                self.ended[refused.fault.name] += 1
                await asyncio.sleep(0.01)
            except (OSError, asyncio.IncompleteReadError):
                self.ended["connection"] += 1
                await asyncio.sleep(0.01)
            else:
                self.ended[self._judged(scores, rows)] += 1
            self.slowest_s = max(self.slowest_s, time.monotonic() - started)
            if self._rest_s:
                await asyncio.sleep(self._rest_s)

    def _judged(self, scores: list[float], rows: list[int]) -> str:
        by = (how for how, known in self._expected.items() if np.allclose(scores, known[rows], rtol=0, atol=1e-6))
        return next(by, "wrong")

    def _over_nats(self, client: Client) -> Callable[[list[int], "Traffic"], Awaitable[list[float]]]:
        async def ask(rows: list[int], traffic: Traffic) -> list[float]:
            scores = await client.score(
                traffic._name,
                dense=traffic._dense[rows],
                sparse=traffic._ids[rows],
                budget_s=BUDGET_S,
                retry=traffic._retry,
            )
            return scores.tolist()

        return ask


class HttpCaller:
    """One keep-alive connection, opened again when it breaks."""

    def __init__(self, port: int, model: str) -> None:
        self._port = port
        self._path = f"/v2/models/{model}/infer"
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, rows: list[int], traffic: Traffic) -> list[float]:
        dense, ids = traffic._dense[rows], traffic._ids[rows]
        body = json.dumps({
            "parameters": {"timeout": int(BUDGET_S * 1e6)},
            "inputs": [
                {"name": "dense", "datatype": "FP32", "shape": dense.shape, "data": dense.reshape(-1).tolist()},
                {"name": "sparse", "datatype": "INT32", "shape": ids.shape, "data": ids.reshape(-1).tolist()},
            ],
        }).encode()  # fmt: skip
        try:
            status, answer = await self._post(body)
        except BaseException:
            if self._streams is not None:
                self._streams[1].close()
                self._streams = None
            raise
        if status != 200:
            raise Refused(named(answer["code"]), answer["error"])
        scores: list[float] = answer["outputs"][0]["data"]
        return scores

    async def _post(self, body: bytes) -> tuple[int, dict[str, Any]]:
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        writer.write(b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (self._path.encode(), len(body)))
        writer.write(body)
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.partition("content-length: ")[2].partition("\r")[0])
        return int(head.split()[1]), json.loads(await reader.readexactly(length))
