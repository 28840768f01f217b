"""What the NATS server says is taken apart as it was put together, whatever subjects and payloads hold."""

import asyncio
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nats.errors import ProtocolError

from narsil_stream.core.parser import LINE_BYTES, Parser

TOKEN = st.binary(min_size=1, max_size=12).filter(lambda b: not set(b) & set(b" \t\r\n"))
MESSAGE = st.tuples(TOKEN, st.integers(1, 9), TOKEN | st.just(b""), st.binary(max_size=60), st.just(b"") | TOKEN)


class Client:
    """Stands in for nats-py's: notes what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    async def _process_msg(self, sid: int, subject: bytes, reply: bytes, payload: bytes, headers: bytes) -> None:
        self.told.append((subject, sid, reply, payload, headers))
        if b"bad" in subject:
            raise UnicodeDecodeError("utf-8", subject, 0, 1, "bad")

    async def _process_ping(self) -> None:
        self.told.append("ping")

    async def _process_pong(self) -> None:
        self.told.append("pong")

    async def _process_info(self, info: dict[str, Any]) -> None:
        self.told.append(info)

    async def _process_err(self, reason: str) -> None:
        self.told.append(reason)


def told(*parts: bytes) -> list[Any]:
    client = Client()
    parser = Parser(client)

    async def feed() -> None:
        for part in parts:
            await parser.parse(part)

    asyncio.run(feed())
    return client.told


def spelled(subject: bytes, sid: int, reply: bytes, payload: bytes, headers: bytes) -> bytes:
    """As nats-server writes it."""
    words = [b"HMSG" if headers else b"MSG", subject, b"%d" % sid, *([reply] if reply else [])]
    words += [b"%d" % len(headers)] if headers else []
    words.append(b"%d" % (len(headers) + len(payload)))
    return b" ".join(words) + b"\r\n" + headers + payload + b"\r\n"


@given(st.lists(MESSAGE, max_size=5), st.lists(st.integers(0, 400), max_size=6))
def test_messages_come_out_as_they_went_in_however_the_bytes_arrive(messages: list[Any], cuts: list[int]) -> None:
    """A message for another subscription, or with another's payload, would be believed."""
    stream = b"".join(spelled(*message) for message in messages)
    edges = [0, *sorted(cuts), len(stream)]
    assert told(*(stream[a:b] for a, b in pairwise(edges))) == messages


@pytest.mark.parametrize("sign", [b"\x0b", b"\x0c", b"\x1c", b"\x85", b"\xff", b"\x00"])
def test_a_subject_with_odd_signs_stays_one_subject(sign: bytes) -> None:
    """Split there, the next word would be taken for the subscription: the sender could choose who hears it."""
    message = (b"narsil.v1.infer.a" + sign + b"5", 2, b"", b"payload", b"")
    assert told(spelled(*message)) == [message]


def test_a_message_that_cannot_be_decoded_is_dropped_alone() -> None:
    """nats-py would end its reading there, and look connected."""
    client = Client()
    parser = Parser(client)
    good = (b"good", 1, b"", b"x", b"")
    asyncio.run(parser.parse(spelled(b"bad", 1, b"", b"x", b"") + spelled(*good)))
    assert client.told[-1] == good
    assert parser.unreadable == 1


def test_everything_else_that_a_server_says() -> None:
    """Pings unanswered, or errors unheard, end the connection."""
    said = b"INFO {\"max_payload\":5} \r\nPING\r\nPONG\r\n+OK\r\n-ERR 'Stale Connection'\r\nPI"
    assert told(said, b"NG\r\n") == [{"max_payload": 5}, "ping", "pong", "'stale connection'", "ping"]


@pytest.mark.parametrize("line", [b"HELLO\r\n", b"MSG a\r\n", b"MSG a b 3\r\n", b"MSG a 1 -3\r\n", b"HMSG a 1 3\r\n"])
def test_what_no_server_says_is_a_protocol_error(line: bytes) -> None:
    """Whatever follows would be read out of step."""
    with pytest.raises(ProtocolError):
        told(line)


def test_a_line_that_never_ends_is_not_collected_for_ever() -> None:
    """It would fill the memory."""
    with pytest.raises(ProtocolError):
        told(b"x" * (LINE_BYTES + 1))


def test_after_a_reset_nothing_is_left_of_the_old_connection() -> None:
    """Half a message of the old one would swallow the beginning of the new one."""
    client = Client()
    parser = Parser(client)

    async def feed() -> None:
        await parser.parse(b"MSG a 1 100\r\nhalf")
        parser.reset()
        await parser.parse(b"PING\r\n")

    asyncio.run(feed())
    assert client.told == ["ping"]
