"""Plain NATS producers under faults: at most one answer, the right one, and nobody served with what is stale."""

import asyncio
import contextlib
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

import nats
import numpy as np
import uvloop
from msgspec.structs import replace
from nats.aio.msg import Msg

from narsil_stream.core.actor import unix_us
from narsil_stream.core.client import make_request
from narsil_stream.kernels.artifact import read_spec
from narsil_stream.kernels.init import random_batch
from narsil_stream.schemas import codec
from tests.faults.serving import Serve
from tests.faults.traffic import Traffic
from tests.support import PATIENCE_S, NatsServer, expected, until

ROWS = 200
IN_FLIGHT = 16
WAIT_S = 1.5


class RawProducer:
    """Publishes msgpack requests with a reply subject each, and counts the answers on every one of them."""

    def __init__(self, model: Path, url: str) -> None:
        spec = read_spec(model)
        batch = random_batch(spec, ROWS, seed=5)
        self._dense, self._ids = batch.dense, batch.ids.reshape(ROWS, spec.n_sparse)
        self._expected = expected(model, self._dense, self._ids)
        self._subject, self._url = f"narsil.v1.infer.{spec.name}", url
        self.ended: Counter[str] = Counter()
        self.answers: Counter[str] = Counter()
        self.enough = threading.Event()

    def run(self) -> None:
        uvloop.run(self._run())

    async def _run(self) -> None:
        async def quiet(_: Exception) -> None:
            """A broker that goes away is what the test is about."""

        nc = await nats.connect(self._url, max_reconnect_attempts=-1, reconnect_time_wait=0.1, error_cb=quiet)
        waiting: dict[str, asyncio.Future[Msg]] = {}

        async def on_answer(message: Msg) -> None:
            self.answers[message.subject] += 1
            future = waiting.get(message.subject)
            if future is not None and not future.done():
                future.set_result(message)

        inbox = nc.new_inbox()
        await nc.subscribe(f"{inbox}.>", cb=on_answer)
        await asyncio.gather(*(self._ask_forever(nc, f"{inbox}.{caller}", waiting) for caller in range(IN_FLIGHT)))
        await asyncio.sleep(0.3)  # what would be a second answer has the time to come
        await nc.close()

    async def _ask_forever(self, nc: nats.NATS, inbox: str, waiting: dict[str, "asyncio.Future[Msg]"]) -> None:
        number = 0
        while not self.enough.is_set():
            number += 1
            row, reply = hash((inbox, number)) % ROWS, f"{inbox}.{number}"
            request = make_request(self._dense[row : row + 1], self._ids[row : row + 1])
            waiting[reply] = asyncio.get_running_loop().create_future()
            with contextlib.suppress(nats.errors.Error):
                await nc.publish(self._subject, codec.encode_request(request, codec.Spelling.MSGPACK), reply)
            try:
                message = await asyncio.wait_for(waiting[reply], WAIT_S)
            except TimeoutError:
                self.ended["no answer"] += 1
                continue
            finally:
                del waiting[reply]
            if message.headers and message.headers.get("Status") == "503":
                self.ended["no responders"] += 1
                await asyncio.sleep(0.01)
                continue
            answer = codec.decode_answer(message.data)
            if answer.fault:
                self.ended[answer.fault] += 1
                await asyncio.sleep(0.01)
                continue
            right = np.allclose(codec.array(answer.outputs[0]), self._expected[row : row + 1], rtol=0, atol=1e-6)
            self.ended["right" if right else "wrong"] += 1


@contextmanager
def producing(model: Path, url: str) -> Iterator[RawProducer]:
    producer = RawProducer(model, url)
    thread = threading.Thread(target=producer.run, daemon=True)
    thread.start()
    try:
        more(producer, 100)
        yield producer
    finally:
        producer.enough.set()
        thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert max(producer.answers.values()) == 1, "nobody is answered twice"
    assert not producer.ended["wrong"], producer.ended


def more(producer: RawProducer, answers: int) -> None:
    goal = producer.ended["right"] + answers
    until(lambda: producer.ended["right"] >= goal, f"{answers} more right answers; so far {producer.ended}")


def test_a_batcher_that_joins_and_leaves_costs_a_plain_producer_nothing(criteo_model: Path, tmp_path: Path) -> None:
    """A newcomer knows no model yet, and a leaver still gets messages: neither may refuse what the other can answer."""
    with Serve(criteo_model, tmp_path, "--batch-batchers", "2", "--placement", "apart") as serve:
        with producing(criteo_model, serve.nats_url) as producer:
            for _ in range(2):
                os.kill(serve.pids("batcher")[0], signal.SIGTERM)
                more(producer, 1_000)
                serve.until_up("batcher", 2)
        assert set(producer.ended) == {"right"}, producer.ended


def test_killed_batchers_and_executors_cost_a_plain_producer_time_outs_at_most(
    criteo_model: Path, tmp_path: Path
) -> None:
    """Core NATS delivers at most once: what a dead batcher held is lost to a plain producer, and never doubled."""
    with Serve(criteo_model, tmp_path, "--batch-batchers", "2", "--executor-executors", "2") as serve:
        with producing(criteo_model, serve.nats_url) as producer:
            for kind in ("batcher", "executor", "batcher"):
                os.kill(serve.pids(kind)[0], signal.SIGKILL)
                more(producer, 1_000)
                serve.until_up(kind, 2)
        assert set(producer.ended) <= {"right", "no answer"}, producer.ended


AWAY_S = 5.0
BUFFERED = 20


def test_a_broker_away_for_seconds_is_told_to_all_and_nothing_stale_is_scored(
    criteo_model: Path, tmp_path: Path
) -> None:
    """nats-py keeps what a producer publishes meanwhile and delivers it late, for somebody who has left by then."""
    options = ["--batch-stale-grace-us", "1000"]
    with NatsServer() as broker, Serve(criteo_model, tmp_path, "--nats-url", broker.url, *options) as serve:
        with Traffic(criteo_model, http=serve.http_port) as traffic, Buffering(criteo_model, broker.url) as producer:
            traffic.answered(500)
            broker.kill()
            back = time.monotonic() + AWAY_S
            until(lambda: not serve.ready(), "not ready without a broker")
            producer.publish(BUFFERED)
            while time.monotonic() < back:
                assert not serve.ready()
                traffic.until_ended("UNAVAILABLE")
            broker.start()
            until(serve.ready, "ready again")
            traffic.answered(500)
            until(lambda: len(producer.answers) == BUFFERED, "what was buffered is answered")
        # Empty: the broker's own answer (503) to what came before a batcher was back.
        faults = {codec.decode_answer(payload).fault if payload else "nobody there" for payload in producer.answers}
        assert faults <= {"DEADLINE_EXCEEDED", "nobody there"}
        assert set(traffic.bad) == {"UNAVAILABLE"}, traffic.ended


class Buffering:
    """A plain producer whose client library keeps what it publishes while the broker is away."""

    def __init__(self, model: Path, url: str) -> None:
        spec = read_spec(model)
        batch = random_batch(spec, 1, seed=6)
        self._request = make_request(batch.dense, batch.ids.reshape(1, -1))
        self._subject, self._url = f"narsil.v1.infer.{spec.name}", url
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.answers: list[bytes] = []

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._connect(), self._loop).result(PATIENCE_S)
        return self

    def __exit__(self, *error: object) -> None:
        asyncio.run_coroutine_threadsafe(self._nc.close(), self._loop).result(PATIENCE_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE_S)
        self._loop.close()

    def publish(self, count: int) -> None:
        asyncio.run_coroutine_threadsafe(self._publish(count), self._loop).result(PATIENCE_S)

    async def _connect(self) -> None:
        async def quiet(_: Exception) -> None:
            """A broker that goes away is what the test is about."""

        async def on_answer(message: Msg) -> None:
            self.answers.append(message.data)

        self._nc = await nats.connect(self._url, max_reconnect_attempts=-1, reconnect_time_wait=0.1, error_cb=quiet)
        self._inbox = self._nc.new_inbox()
        await self._nc.subscribe(self._inbox, cb=on_answer)
        await self._nc.flush()

    async def _publish(self, count: int) -> None:
        request = replace(self._request, sent_us=unix_us(), budget_us=500_000)
        for _ in range(count):
            await self._nc.publish(self._subject, codec.encode_request(request, codec.Spelling.MSGPACK), self._inbox)
