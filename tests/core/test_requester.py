"""Each request ends once, whatever becomes of the batchers behind it. These are puppets: they do what they are told."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import msgspec
import pytest
import uvloop
from msgspec.structs import replace

from narsil_stream.core.actor import now_us
from narsil_stream.core.bus import Bus
from narsil_stream.core.config import Config, NatsConfig, TimingConfig
from narsil_stream.core.requester import Requester
from narsil_stream.core.routing import MAX_SENDS
from narsil_stream.schemas import subjects
from narsil_stream.schemas.errors import Fault, Refused
from narsil_stream.schemas.internal import Answers, Ask, BatcherBeat, Bundle, Cancel, ModelRef
from narsil_stream.schemas.wire import InferAnswer, InferRequest
from tests.support import PATIENCE_S, NatsServer

MODEL = ModelRef("ctr", "1", "digest")
LEASE_MS = 150
REQUEST = InferRequest("mine", (), budget_us=5_000_000)


class Puppet:
    """A batcher that beats while it is `alive`, notes what it gets, and answers when it is told."""

    def __init__(self, bus: Bus, name: str) -> None:
        self._bus = bus
        self.name = name
        self.alive = True
        self.wait_us = 0
        self.asked: list[tuple[str, Ask]] = []
        self.cancelled: list[int] = []

    async def start(self) -> None:
        decode = msgspec.msgpack.Decoder(Bundle | Cancel).decode
        await self._bus.listen(subjects.ask(self.name), self._take, decode)
        await self._bus.flush()
        self._beating = asyncio.create_task(self._beat_forever())

    def _take(self, message: Bundle | Cancel) -> None:
        if isinstance(message, Cancel):
            self.cancelled += message.slots
        else:
            self.asked += [(message.reply, ask) for ask in message.asks]

    async def _beat_forever(self) -> None:
        while True:
            if self.alive and self._bus.connected:
                self.beat("up")
            await asyncio.sleep(0.02)

    def beat(self, state: str) -> None:
        self._bus.broadcast(subjects.BATCHER_BEAT, BatcherBeat(self.name, (MODEL,), self.wait_us, state=state))

    def answer(self, at: int = -1, fault: str = "", retry_after_us: int = 0, *, by_deadline: bool = False) -> None:
        reply, ask = self.asked[at]
        answer = InferAnswer(ask.request.id, model=self.name, fault=fault, retry_after_us=retry_after_us)
        self._bus.send(reply, Answers(self.name, (ask.slot,), (answer,), (ask.slot,) if by_deadline else ()))

    def stop(self) -> None:
        self._beating.cancel()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 nothing tells of it
            await asyncio.sleep(0.002)


class Stage:
    """A requester and puppets, each on a connection of its own."""

    def __init__(self, requester: Requester, puppets: list[Puppet]) -> None:
        self.requester = requester
        self.puppets = puppets

    def ask(self, request: InferRequest = REQUEST) -> asyncio.Task[InferAnswer]:
        return asyncio.create_task(self.requester.ask("ctr", "", request))

    async def taken(self) -> Puppet:
        """The one that got the request that is under way."""
        await until(lambda: any(p.asked for p in self.puppets))
        (puppet,) = [p for p in self.puppets if p.asked]
        return puppet

    def other(self, puppet: Puppet) -> Puppet:
        return next(p for p in self.puppets if p is not puppet)


@asynccontextmanager
async def stage(url: str, puppets: int) -> AsyncIterator[Stage]:
    config = replace(Config(), nats=NatsConfig(url=url), timing=TimingConfig(beat_ms=20, lease_ms=LEASE_MS))
    buses = [Bus(config.nats, f"test {n}") for n in range(puppets + 1)]
    for bus in buses:
        await bus.connect()
    requester = Requester(config, buses[0])
    await requester.start()
    made = [Puppet(bus, f"batcher-{n}") for n, bus in enumerate(buses[1:])]
    for puppet in made:
        await puppet.start()
    try:
        await until(lambda: len(requester._router.alive()) == puppets)
        yield Stage(requester, made)
    finally:
        for puppet in made:
            puppet.stop()
        await requester.stop()
        for bus in buses:
            await bus.close()


@pytest.fixture
def play(nats_server: NatsServer) -> Callable[[int, Callable[[Stage], Awaitable[None]]], None]:
    """`play(2, scene)`: the scene with two puppets."""

    def run(puppets: int, scene: Callable[[Stage], Awaitable[None]]) -> None:
        async def whole() -> None:
            async with stage(nats_server.url, puppets) as on:
                await scene(on)

        uvloop.run(whole())

    return run


Play = Callable[[int, Callable[[Stage], Awaitable[None]]], None]


@pytest.mark.parametrize("how", ["says goodbye", "falls silent"])
def test_a_batcher_that_is_lost_loses_its_requests_to_another_and_one_answer_counts(play: Play, how: str) -> None:
    """The caller shall not notice, and shall not be answered twice when the lost one wakes up."""

    async def scene(on: Stage) -> None:
        asked = on.ask()
        first = await on.taken()
        first.alive = False
        if how == "says goodbye":
            first.beat("gone")
        second = on.other(first)
        await until(lambda: second.asked)
        second.answer()
        assert (await asked).model == second.name
        assert (on.requester.resent, on.requester.late) == (1, 0)
        first.answer()
        await until(lambda: on.requester.late == 1)
        assert on.requester.open == 0

    play(2, scene)


def test_the_budget_goes_on_running_when_a_request_is_sent_again(play: Play) -> None:
    """Otherwise the second batcher would work for a caller who has given up."""

    async def scene(on: Stage) -> None:
        asked = on.ask()
        first = await on.taken()
        first.alive = False
        second = on.other(first)
        await until(lambda: second.asked)
        (_, before), (_, after) = first.asked[0], second.asked[0]
        assert before.request.budget_us <= 5_000_000
        assert after.request.budget_us < before.request.budget_us - LEASE_MS * 1_000 / 2
        assert after.request.sent_us > before.request.sent_us > 0
        second.answer()
        await asked

    play(2, scene)


def test_when_the_last_batcher_is_lost_callers_are_told_at_once(play: Play) -> None:
    """Waiting for nobody helps nobody."""

    async def scene(on: Stage) -> None:
        asked = on.ask()
        puppet = await on.taken()
        puppet.alive = False
        puppet.beat("gone")
        with pytest.raises(Refused) as told:
            await asked
        assert told.value.fault is Fault.UNAVAILABLE
        assert not on.requester.ready
        with pytest.raises(Refused) as told:
            await on.ask()
        assert told.value.fault is Fault.UNAVAILABLE

    play(1, scene)


def test_a_request_that_outlives_several_batchers_is_given_up(play: Play) -> None:
    """It may be what kills them."""

    async def scene(on: Stage) -> None:
        asked = on.ask()
        for sends in range(1, MAX_SENDS + 1):
            await until(lambda sends=sends: sum(len(p.asked) for p in on.puppets) == sends)
            next(p for p in on.puppets if p.asked and p.alive).alive = False
        with pytest.raises(Refused) as told:
            await asked
        assert told.value.fault is Fault.UNAVAILABLE
        assert sum(len(p.asked) for p in on.puppets) == MAX_SENDS

    play(MAX_SENDS + 1, scene)


def test_a_cancelled_request_is_withdrawn_from_its_batcher(play: Play) -> None:
    """Its place in the queue is wanted by others."""

    async def scene(on: Stage) -> None:
        asked = on.ask()
        puppet = await on.taken()
        asked.cancel()
        await until(lambda: puppet.cancelled)
        assert puppet.cancelled == [puppet.asked[0][1].slot]
        assert on.requester.open == 0
        puppet.answer()
        await until(lambda: on.requester.late == 1)

    play(1, scene)


def test_a_client_that_closes_takes_its_requests_with_it(play: Play) -> None:
    """What it leaves behind would be computed for nobody, in the place of somebody."""

    async def scene(on: Stage) -> None:
        asked = [on.ask() for _ in range(3)]
        puppet = await on.taken()
        await until(lambda: len(puppet.asked) == 3)
        await on.requester.stop()
        await until(lambda: sorted(puppet.cancelled) == sorted(ask.slot for _, ask in puppet.asked))
        for one in asked:
            with pytest.raises(Refused):
                await one

    play(1, scene)


def test_an_answer_that_does_not_come_is_deadline_exceeded_within_100_ms_of_the_budget(play: Play) -> None:
    """Even when the batcher is alive and says nothing."""

    async def scene(on: Stage) -> None:
        for budget_ms in (1, 100):
            started = now_us()
            with pytest.raises(Refused) as told:
                await on.ask(replace(REQUEST, budget_us=budget_ms * 1_000))
            assert told.value.fault is Fault.DEADLINE_EXCEEDED
            assert budget_ms <= (now_us() - started) / 1e3 < budget_ms + 100

    play(1, scene)


def test_requests_go_to_the_batcher_with_the_least_to_do(play: Play) -> None:
    """A queue beside an idle batcher is a wait for nothing."""

    async def scene(on: Stage) -> None:
        busy, idle = on.puppets
        busy.wait_us = 50_000
        await until(lambda: on.requester._router.peers[busy.name].wait_us)
        asked = [on.ask() for _ in range(5)]
        await until(lambda: len(idle.asked) == 5)
        assert not busy.asked
        for at in range(5):
            idle.answer(at)
        await asyncio.gather(*asked)

    play(2, scene)


@pytest.mark.parametrize("by_deadline", [True, False])
def test_only_a_refusal_by_deadline_is_repeated_here_and_only_to_who_would_go_there(
    play: Play, by_deadline: bool
) -> None:
    """A full queue has room with the next batch, and an idle batcher has it now."""

    async def scene(on: Stage) -> None:
        first = on.ask()
        full = await on.taken()
        full.answer(0, "OVERLOADED", 60_000_000, by_deadline=by_deadline)
        assert (await first).fault == "OVERLOADED"
        on.other(full).wait_us = 50_000
        await until(lambda: on.requester._router.peers[on.other(full).name].wait_us)
        again = on.ask()
        if by_deadline:
            with pytest.raises(Refused) as refused:
                await again
            assert refused.value.fault is Fault.OVERLOADED and len(full.asked) == 1
        else:
            await until(lambda: len(full.asked) == 2)
            full.answer(1)
            assert not (await again).fault
        on.other(full).wait_us, full.wait_us = 0, 50_000
        await until(lambda: not on.requester._router.peers[on.other(full).name].wait_us)
        await until(lambda: on.requester._router.peers[full.name].wait_us)
        elsewhere = on.ask()
        await until(lambda: len(on.other(full).asked) == 1)
        on.other(full).answer()
        assert not (await elsewhere).fault

    play(2, scene)


def test_requests_of_one_turn_travel_together_and_are_answered_in_any_order(play: Play) -> None:
    """A message costs more than a request in it."""

    async def scene(on: Stage) -> None:
        asked = [on.ask(replace(REQUEST, id=str(n))) for n in range(20)]
        puppet = await on.taken()
        await until(lambda: len(puppet.asked) == 20)
        for at in reversed(range(20)):
            puppet.answer(at)
        assert [answer.id for answer in await asyncio.gather(*asked)] == [str(n) for n in range(20)]

    play(1, scene)


def test_when_this_process_stops_whoever_waits_is_told(play: Play) -> None:
    """Nobody may wait for an answer that cannot come."""

    async def scene(on: Stage) -> None:
        asked = on.ask()
        await on.taken()
        await on.requester.stop()
        with pytest.raises(Refused) as told:
            await asked
        assert told.value.fault is Fault.UNAVAILABLE
        await on.requester.start()

    play(1, scene)
