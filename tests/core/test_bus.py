"""The road between actors: taken or refused, never kept for later."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import msgspec
import pytest
import uvloop
from nats.aio.msg import Msg

from narsil_stream.core.bus import HEADER_ROOM, OUTBOX_BYTES, Bus
from narsil_stream.core.config import NatsConfig
from narsil_stream.schemas.errors import Fault, Refused
from narsil_stream.schemas.internal import Cancel
from tests.support import PATIENCE_S, NatsServer

decode = msgspec.msgpack.Decoder(Cancel).decode


def message(number: int) -> Cancel:
    return Cancel("reply", (number,))


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 nothing tells of it
            await asyncio.sleep(0.002)


@asynccontextmanager
async def buses(url: str, count: int) -> AsyncIterator[list[Bus]]:
    made = [Bus(NatsConfig(url=url), f"test {n}") for n in range(count)]
    for bus in made:
        await bus.connect()
    try:
        yield made
    finally:
        for bus in made:
            await bus.close()


def run(scene: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(2 * PATIENCE_S):
            await scene()

    uvloop.run(bounded())


def test_messages_arrive_in_the_order_in_which_they_were_sent(nats_server: NatsServer) -> None:
    """A cancel before its request would cancel nothing."""

    async def scene() -> None:
        async with buses(nats_server.url, 2) as (one, other):
            heard: list[int] = []
            await other.listen("narsil.v1.test", lambda m: heard.append(m.slots[0]), decode)
            await other.flush()
            for number in range(1_000):
                one.send("narsil.v1.test", message(number))
            await until(lambda: len(heard) == 1_000)
            assert heard == list(range(1_000))

    run(scene)


def test_where_both_ends_are_in_one_process_the_message_itself_is_handed_over(nats_server: NatsServer) -> None:
    """Mode inline saves the encoding, the broker and the decoding."""

    async def scene() -> None:
        async with buses(nats_server.url, 1) as (bus,):
            heard: list[Cancel] = []
            await bus.listen("narsil.v1.test", heard.append, decode)
            sent = message(1)
            bus.send("narsil.v1.test", sent)
            assert heard[0] is sent
            nats_server.kill()
            await until(lambda: not bus.connected)
            bus.send("narsil.v1.test", sent)
            assert len(heard) == 2

    run(scene)


def test_several_actors_of_a_process_hear_a_subject_and_leave_it_one_by_one(nats_server: NatsServer) -> None:
    """In mode inline a gateway and an executor both live by the batcher's beats."""

    async def scene() -> None:
        async with buses(nats_server.url, 2) as (bus, elsewhere):
            heard: dict[str, list[Cancel]] = {"first": [], "second": []}
            for who, messages in heard.items():
                await bus.listen("narsil.v1.test", messages.append, decode, owner=who)
            await bus.flush()
            bus.broadcast("narsil.v1.test", message(1))
            assert [len(m) for m in heard.values()] == [1, 1]
            elsewhere.broadcast("narsil.v1.test", message(2))
            await until(lambda: [len(m) for m in heard.values()] == [2, 2])
            await bus.unsubscribe("narsil.v1.test", owner="first")
            bus.broadcast("narsil.v1.test", message(3))
            elsewhere.broadcast("narsil.v1.test", message(4))
            await until(lambda: len(heard["second"]) == 4)
            assert len(heard["first"]) == 2
            await bus.unsubscribe("narsil.v1.test", owner="second")
            assert not bus.is_local("narsil.v1.test")

    run(scene)


def test_what_is_sent_without_a_broker_is_refused_and_never_arrives_later(nats_server: NatsServer) -> None:
    """A request that is delivered after its caller was told otherwise is work for nobody."""

    async def scene() -> None:
        async with buses(nats_server.url, 2) as (one, other):
            heard: list[int] = []
            lost, back = [], []
            one.on_lost.append(lambda: lost.append(1))
            one.on_back.append(lambda: back.append(1))
            await other.listen("narsil.v1.test", lambda m: heard.append(m.slots[0]), decode)
            await other.flush()
            nats_server.kill()
            await until(lambda: not one.connected and not other.connected)
            for number in range(10):
                with pytest.raises(Refused) as told:
                    one.send("narsil.v1.test", message(number))
                assert told.value.fault is Fault.UNAVAILABLE
            one.broadcast("narsil.v1.test", message(10))  # raises nothing
            with pytest.raises(Refused):
                await one.request("narsil.v1.test")
            nats_server.start()
            await until(lambda: one.connected and other.connected)
            await other.flush()
            one.send("narsil.v1.test", message(99))
            await until(lambda: heard)
            assert heard == [99]
            assert (len(lost), len(back)) == (1, 1)

    run(scene)


def test_a_message_above_the_brokers_limit_is_refused_and_the_connection_holds(nats_server: NatsServer) -> None:
    """The server would cut the connection with everything that is under way on it."""

    async def scene() -> None:
        async with buses(nats_server.url, 2) as (one, other):
            heard: list[int] = []
            await other.subscribe("test.size", lambda m: heard.append(len(m.data)))
            await other.flush()
            headers = {"Nats-Service-Error": "x" * (HEADER_ROOM - 100)}
            one.publish("test.size", bytes(one.max_payload), headers=headers)
            with pytest.raises(Refused) as told:
                one.publish("test.size", bytes(one.max_payload + 1))
            assert told.value.fault is Fault.TOO_LARGE
            one.publish("test.size", b"still here")
            await until(lambda: len(heard) == 2)
            assert heard == [one.max_payload, 10]

    run(scene)


def test_more_than_the_outbox_holds_is_refused_and_beats_are_left_out(nats_server: NatsServer) -> None:
    """A broker that has stopped reading must not fill this process's memory, nor stop its actors."""

    async def scene() -> None:
        async with buses(nats_server.url, 1) as (bus,):
            nats_server.pause()
            try:
                piece = bytes(bus.max_payload)
                with pytest.raises(Refused) as told:
                    for _ in range(2 * OUTBOX_BYTES // len(piece)):
                        bus.publish("test.flood", piece)
                assert told.value.fault is Fault.OVERLOADED
                dropped = bus.dropped
                bus.broadcast("narsil.v1.test", Cancel("x" * (OUTBOX_BYTES - bus.waiting_bytes), ()))
                assert bus.dropped == dropped + 1
            finally:
                nats_server.resume()

    run(scene)


def test_a_handler_that_fails_does_not_stop_the_next_message(nats_server: NatsServer) -> None:
    """One bad message must not make an actor deaf."""

    async def scene() -> None:
        async with buses(nats_server.url, 2) as (one, other):
            heard: list[int] = []

            def handle(got: Cancel) -> None:
                if got.slots[0] == 0:
                    raise ZeroDivisionError
                heard.append(got.slots[0])

            await other.listen("narsil.v1.test", handle, decode)
            await other.flush()
            one.publish("narsil.v1.test", b"\xc1 undecodable")
            one.send("narsil.v1.test", message(0))
            one.send("narsil.v1.test", message(1))
            await until(lambda: heard == [1])
            assert other.dropped == 1

    run(scene)


def test_no_broker_is_said_with_its_address_and_in_time() -> None:
    """The first error that a new user meets."""

    async def scene() -> None:
        bus = Bus(NatsConfig(url="nats://127.0.0.1:9"), "test")
        with pytest.raises(Refused, match=r"127\.0\.0\.1:9") as told:
            await bus.connect(0.5)
        assert told.value.fault is Fault.UNAVAILABLE
        await bus.close()

    run(scene)


def test_a_frozen_broker_does_not_keep_a_process_from_ending(nats_server: NatsServer) -> None:
    """Its supervisor would have to kill it, and what is done after the connection would be left undone."""

    async def scene() -> None:
        bus = Bus(NatsConfig(url=nats_server.url), "test")
        await bus.connect()
        await bus.subscribe("test.flood", lambda m: None)
        nats_server.pause()
        try:
            for _ in range(20):
                bus.publish("test.flood", bytes(bus.max_payload))
            await until(lambda: bus.waiting_bytes > 0)
            async with asyncio.timeout(5):
                await bus.close()
            await until(lambda: asyncio.all_tasks() == {asyncio.current_task()})
        finally:
            nats_server.resume()

    run(scene)


def test_leaving_a_subject_of_a_frozen_broker_is_bounded(nats_server: NatsServer) -> None:
    """nats-py swallows the cancellation of what waits for its buffer."""

    async def scene() -> None:
        async with buses(nats_server.url, 1) as (bus,):
            await bus.subscribe("test.left", lambda m: None)
            nats_server.pause()
            try:
                for _ in range(20):
                    bus.publish("test.flood", bytes(bus.max_payload))
                await until(lambda: bus.waiting_bytes > 0)
                async with asyncio.timeout(4):
                    await bus.unsubscribe("test.left")
            finally:
                nats_server.resume()

    run(scene)


@pytest.mark.parametrize("lost", [True, False])
def test_a_subject_that_was_left_without_a_broker_is_not_heard_again(nats_server: NatsServer, lost: bool) -> None:
    """The next connection takes up all subscriptions: an actor that is gone would take a share of the requests."""

    async def scene() -> None:
        async with buses(nats_server.url, 2) as (one, other):
            left: list[Msg] = []
            kept: list[Msg] = []
            await other.subscribe("test.left", left.append)
            await other.subscribe("test.kept", kept.append)
            await other.flush()
            if lost:
                nats_server.kill()
                await until(lambda: not other.connected)
                await other.unsubscribe("test.left")
            else:
                nats_server.pause()
                await other.unsubscribe("test.left")
                nats_server.kill()
                await until(lambda: not other.connected)
            nats_server.start()
            await until(lambda: one.connected and other.connected)
            await other.flush()
            one.publish("test.left", b"")
            one.publish("test.kept", b"")
            await until(lambda: kept)
            assert not left

    run(scene)


def test_a_signal_reaches_those_elsewhere_and_is_nothing_without_a_broker(nats_server: NatsServer) -> None:
    """An actor that starts again while the broker is away must not fail for its greeting."""

    async def scene() -> None:
        async with buses(nats_server.url, 2) as (one, other):
            heard: list[bytes] = []
            await other.subscribe("test.signal", lambda m: heard.append(m.data))
            await other.flush()
            one.signal("test.signal")
            await until(lambda: heard == [b""])
            nats_server.kill()
            await until(lambda: not one.connected)
            one.signal("test.signal")
            assert one.dropped == 0

    run(scene)


def test_what_was_subscribed_to_before_a_flush_is_heard_after_it(nats_server: NatsServer) -> None:
    """nats-py's own ping overtakes the subscription: the first request would find nobody."""

    async def scene() -> None:
        async with buses(nats_server.url, 2) as (asked, asking):
            for number in range(500):
                await asked.respond(f"test.question.{number}", lambda: b"answer")
                await asked.flush()
                assert await asking.request(f"test.question.{number}") == b"answer"

    run(scene)


def test_what_the_server_sends_until_it_knows_of_a_leave_is_still_heard(nats_server: NatsServer) -> None:
    """Two share a queue group and one leaves amid traffic, as in a rolling restart: no message is lost."""

    async def scene() -> None:
        async with buses(nats_server.url, 3) as (sender, stays, goes):
            heard: list[bytes] = []
            sent = 0
            await stays.subscribe("test.work", lambda m: heard.append(m.data), "group")
            await stays.flush()
            for _ in range(50):
                await goes.subscribe("test.work", lambda m: heard.append(m.data), "group")
                await goes.flush()
                leaving = asyncio.create_task(goes.unsubscribe("test.work"))
                while not leaving.done():
                    sender.publish("test.work", b"")
                    sent += 1
                    await asyncio.sleep(0)
            await sender.flush()
            await until(lambda: len(heard) == sent)

    run(scene)
