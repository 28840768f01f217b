"""The short way of messages: out in one write, in past nats-py, with nothing lost, mixed up or added."""

import asyncio
from itertools import pairwise
from typing import Any

import uvloop
from hypothesis import given
from hypothesis import strategies as st

from narsil_stream.core.bus import Bus
from narsil_stream.core.config import NatsConfig
from narsil_stream.core.connection import Connection, Sieve
from tests.core.test_parser import MESSAGE, spelled
from tests.support import PATIENCE_S, NatsServer

CONTROL = st.sampled_from([b"PING\r\n", b"PONG\r\n", b"+OK\r\n", b'INFO {"max_payload":5} \r\n', b"-ERR 'x'\r\n"])
TAKEN = 5
"""Subscriptions up to this one are taken from the short way."""


def sifted(stream: bytes, cuts: list[int]) -> tuple[list[Any], bytes]:
    """What was taken, and what nats-py's reader gets."""

    async def feed() -> tuple[list[Any], bytes]:
        connection, taken = Connection(), []
        for sid in range(1, TAKEN + 1):
            connection.takers[b"%d" % sid] = lambda *message, sid=sid: taken.append((sid, *message[:3]))
        reader = asyncio.StreamReader()
        sieve = Sieve(reader, connection)
        for a, b in pairwise([0, *sorted(cuts), len(stream)]):
            if stream[a:b]:
                sieve.data_received(stream[a:b])
        reader.feed_eof()
        return taken, await reader.read()

    return asyncio.run(feed())


@given(st.lists(MESSAGE | CONTROL, max_size=8), st.lists(st.integers(0, 400), max_size=6))
def test_messages_are_taken_out_and_the_rest_is_left_as_it_is_however_the_bytes_arrive(
    said: list[Any], cuts: list[int]
) -> None:
    """A byte too many or too few, and all that follows is read out of step."""
    pieces = [one if isinstance(one, bytes) else spelled(*one) for one in said]
    own = [not isinstance(one, bytes) and one[1] <= TAKEN for one in said]
    taken, rest = sifted(b"".join(pieces), cuts)
    assert taken == [(sid, s, r, p) for s, sid, r, p, _ in (m for m, o in zip(said, own, strict=True) if o)]
    assert rest == b"".join(piece for piece, mine in zip(pieces, own, strict=True) if not mine)


def test_an_unreadable_message_is_dropped_alone() -> None:
    """Any producer can send one."""

    async def scene() -> None:
        connection, heard = Connection(), []
        connection.takers[b"1"] = lambda subject, *_: heard.append(subject.decode())
        sieve = Sieve(asyncio.StreamReader(), connection)
        sieve.data_received(b"MSG \xff 1 0\r\n\r\nMSG good 1 0\r\n\r\n")
        assert (heard, connection.unreadable) == (["good"], 1)

    asyncio.run(scene())


def test_messages_of_a_real_server_take_the_short_way(nats_server: NatsServer) -> None:
    """Past it they cost three times as much, and nothing else would show."""

    async def scene() -> None:
        bus, other = (Bus(NatsConfig(url=nats_server.url), name) for name in ("one", "other"))
        await bus.connect()
        await other.connect()
        heard = asyncio.Event()
        await bus.subscribe("test.short", lambda _: heard.set())
        await bus.flush()
        other.publish("test.short", b"x" * 300_000, "reply")
        async with asyncio.timeout(PATIENCE_S):
            await heard.wait()
        assert bus._nats.stats["in_msgs"] == 0
        await bus.close()
        await other.close()

    uvloop.run(scene())


def test_a_subject_with_a_line_in_it_is_not_sent(nats_server: NatsServer) -> None:
    """Whoever names a reply subject could make this process say what he likes to the broker."""

    async def scene() -> None:
        bus = Bus(NatsConfig(url=nats_server.url), "test")
        await bus.connect()
        for wrong in ("a b", "a\tb", "a\r\nPUB b 0\r\n\r\n", "", "a\n"):
            bus.publish(wrong, b"")
        bus.publish("good", b"", reply="a\r\nPUB b 0")
        await bus.flush()
        assert (bus.dropped, bus.connected) == (6, True)
        await bus.close()

    uvloop.run(scene())


def test_headers_arrive_and_a_line_in_one_does_not_end_it(nats_server: NatsServer) -> None:
    """By them a plain producer knows an error, whose text may be anything."""

    async def scene() -> None:
        bus, other = (Bus(NatsConfig(url=nats_server.url), name) for name in ("one", "other"))
        await bus.connect()
        await other.connect()
        heard: list[Any] = []
        came = asyncio.Event()
        await bus.subscribe("test.headers", lambda message: (heard.append(message), came.set()))
        await bus.flush()
        other.publish("test.headers", b"payload", "reply", {"Name": "a\r\nOther: b"})
        async with asyncio.timeout(PATIENCE_S):
            await came.wait()
        (message,) = heard
        assert (message.data, message.reply, message.headers) == (b"payload", "reply", {"Name": "a  Other: b"})
        await bus.close()
        await other.close()

    uvloop.run(scene())
