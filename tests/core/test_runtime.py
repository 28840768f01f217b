"""A process of actors: who crashes is replaced, and the end comes in order and in time."""

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable

import msgspec
import pytest
import uvloop
from msgspec.structs import replace

from narsil_stream.actors.batcher import Batcher
from narsil_stream.core import runtime as module
from narsil_stream.core.actor import Actor
from narsil_stream.core.bus import Bus
from narsil_stream.core.config import Config, NatsConfig
from narsil_stream.core.runtime import Backoff, Runtime
from narsil_stream.schemas import subjects
from narsil_stream.schemas.internal import Report
from tests.support import PATIENCE_S, NatsServer

SUBJECT = "test.probe"


class Probe(Actor[bytes]):
    """Keeps what it is sent on `SUBJECT` and fails at "crash". `log` is common to all probes of a test.

    `label` stands in the log, and is its kind.
    """

    kind = "probe"

    def __init__(self, bus: Bus, log: list[str], label: str = "", drains: bool = True) -> None:
        super().__init__(8)
        self._bus, self._log, self._label, self._drains = bus, log, label, drains
        self.kind = label or Probe.kind  # type: ignore[misc]  # as if each were a class
        self.received: list[bytes] = []

    async def start(self) -> None:
        await self._bus.subscribe(SUBJECT, lambda m: self.mailbox.put_urgent(m.data), owner=self)
        self._bus.signal(subjects.HELLO)
        await self._bus.flush()

    def receive(self, message: bytes) -> None:
        if message == b"crash":
            raise ZeroDivisionError
        self.received.append(message)

    async def drain(self) -> None:
        self._log.append(f"{self._label} drains")
        if not self._drains:
            await asyncio.Event().wait()

    async def stop(self) -> None:
        self._log.append(f"{self._label} stops")
        await self._bus.unsubscribe(SUBJECT, owner=self)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 nothing tells of it
            await asyncio.sleep(0.002)


def config_for(server: NatsServer, drain_ms: int = 10_000) -> Config:
    config = Config()
    return replace(config, nats=NatsConfig(url=server.url), timing=replace(config.timing, drain_ms=drain_ms))


def play(scene: Callable[[], Awaitable[None]]) -> None:
    """No task may be left after it."""

    async def bounded() -> None:
        async with asyncio.timeout(2 * PATIENCE_S):
            await scene()
        await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})

    uvloop.run(bounded())


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BACKOFF", (0.002, 0.01))


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Back-off without end."""
    monkeypatch.setattr(module, "BACKOFF", (3_600.0, 3_600.0))


def test_an_actor_that_fails_is_replaced_and_its_end_is_reported_once(nats_server: NatsServer, quick: None) -> None:
    """One bad message costs a moment; a report that stayed would be shown as a silent actor for ever."""

    async def scene() -> None:
        log: list[str] = []
        reports: list[Report] = []
        watcher = Bus(NatsConfig(url=nats_server.url), "watcher")
        await watcher.connect()
        await watcher.listen(subjects.REPORT, reports.append, msgspec.msgpack.Decoder(Report).decode)
        await watcher.flush()
        async with Runtime(config_for(nats_server), "probe") as runtime:
            first = await runtime.start(lambda: Probe(runtime.bus, log))
            watcher.publish(SUBJECT, b"crash")
            await until(lambda: runtime.actors[0] is not first)
            second = runtime.actors[0]
            assert isinstance(second, Probe)
            watcher.publish(SUBJECT, b"hello")
            await until(lambda: second.received)
            await until(lambda: any(r.actor == second.name and r.state == "up" for r in reports))
            states = [r.state for r in reports if r.actor == first.name]
            assert states[-2:] == ["down", "stopped"] and states.count("stopped") == 1
            assert log == [" stops"]
        await watcher.close()

    play(scene)


def test_an_actor_that_always_fails_is_given_up_and_its_process_with_it(nats_server: NatsServer, quick: None) -> None:
    """Whoever started the process sees it, instead of a process that does nothing."""

    async def scene() -> None:
        log: list[str] = []

        def build() -> Probe:
            probe = Probe(runtime.bus, log)
            probe.mailbox.put(b"crash")
            return probe

        async with Runtime(config_for(nats_server), "probe") as runtime:
            await runtime.start(build)
            assert await runtime.until_stopped() == 1
            assert log == [" stops"] * 5

    play(scene)


def test_a_stop_drains_in_the_reverse_order_of_the_start(nats_server: NatsServer) -> None:
    """Whoever drains still needs those that were started before it."""

    async def scene() -> None:
        log: list[str] = []
        async with Runtime(config_for(nats_server), "probe") as runtime:
            for label in ("executor", "batcher", "gateway"):
                await runtime.start(lambda label=label: Probe(runtime.bus, log, label))
            before = signal.getsignal(signal.SIGTERM)
            stopped = asyncio.create_task(runtime.until_stopped())
            await until(lambda: signal.getsignal(signal.SIGTERM) is not before)
            os.kill(os.getpid(), signal.SIGTERM)
            assert await stopped == 0
        kinds = ("gateway", "batcher", "executor")
        assert log == [f"{kind} {what}" for kind in kinds for what in ("drains", "stops")]

    play(scene)


def test_actors_of_one_kind_drain_at_the_same_time(nats_server: NatsServer) -> None:
    """The HTTP and the gRPC door of a process: the second would go on saying that it is ready, and have less time."""

    async def scene() -> None:
        log: list[str] = []
        async with Runtime(config_for(nats_server, drain_ms=300), "probe") as runtime:
            for label in ("batcher", "gateway", "gateway"):
                await runtime.start(lambda label=label: Probe(runtime.bus, log, label, drains=label == "batcher"))
            await runtime.drain()
        assert log[:2] == ["gateway drains"] * 2
        assert sorted(log[2:4]) == ["gateway stops"] * 2
        assert log[4:] == ["batcher drains", "batcher stops"]

    play(scene)


def test_actors_whose_drain_never_ends_share_one_time(nats_server: NatsServer) -> None:
    """In mode inline there are three, and the supervisor kills after one time."""

    async def scene() -> None:
        log: list[str] = []
        async with Runtime(config_for(nats_server, drain_ms=500), "probe") as runtime:
            for label in "abcd":
                await runtime.start(lambda label=label: Probe(runtime.bus, log, label, drains=False))
            started = time.monotonic()
            await runtime.drain()
            assert 0.4 < time.monotonic() - started < 1.5
        assert log == [f"{label} {what}" for label in "dcba" for what in ("drains", "stops")]

    play(scene)


def test_an_actor_that_is_down_is_not_waited_for(nats_server: NatsServer, slow: None) -> None:
    """Its loop is dead: its drain would take all the time there is."""

    async def scene() -> None:
        log: list[str] = []
        async with Runtime(config_for(nats_server, drain_ms=600_000), "probe") as runtime:
            probe = await runtime.start(lambda: Probe(runtime.bus, log, drains=False))
            probe.mailbox.put(b"crash")
            await until(lambda: probe.state == "down" and log)
            await runtime.drain()
        assert log == [" stops"]

    play(scene)


def test_an_actor_that_fails_while_it_drains_is_not_waited_for(nats_server: NatsServer) -> None:
    """As above, a moment later."""

    async def scene() -> None:
        log: list[str] = []
        async with Runtime(config_for(nats_server, drain_ms=600_000), "probe") as runtime:
            probe = await runtime.start(lambda: Probe(runtime.bus, log, drains=False))
            draining = asyncio.create_task(runtime.drain())
            await until(lambda: log == [" drains"])
            probe.mailbox.put(b"crash")
            await draining
        assert log == [" drains", " stops"]

    play(scene)


def test_actors_start_and_are_replaced_without_a_broker(nats_server: NatsServer, quick: None) -> None:
    """Five tries are soon used up while a broker is away, and the process would be gone when it comes back."""

    async def scene() -> None:
        log: list[str] = []
        async with Runtime(config_for(nats_server), "probe") as runtime:
            first = await runtime.start(lambda: Probe(runtime.bus, log))
            nats_server.kill()
            await until(lambda: not runtime.bus.connected)
            first.mailbox.put(b"crash")
            await until(lambda: runtime.actors[0] is not first)
            batcher = await runtime.start(lambda: Batcher(runtime.config, runtime.bus))
            assert [actor.state for actor in runtime.actors] == ["up", "up"]
            assert batcher in runtime.actors

    play(scene)


def test_an_actor_is_stopped_also_when_its_process_ends_at_once(nats_server: NatsServer) -> None:
    """What it has started would go on without it."""

    async def scene() -> None:
        log: list[str] = []
        async with Runtime(config_for(nats_server), "probe") as runtime:
            await runtime.start(lambda: Probe(runtime.bus, log))
        assert log == [" stops"]

    play(scene)


def test_the_delay_between_tries_grows_to_a_bound_and_old_failures_are_forgotten() -> None:
    """A crash a day is no reason to give up."""
    backoff = Backoff()
    delays = [backoff.failed(3_600.0 * hour) for hour in range(20)]
    assert all(delay is not None and 0 < delay <= module.BACKOFF[1] for delay in delays)
    assert [backoff.failed(100_000.0) is None for _ in range(5)] == [False] * 4 + [True]
