"""The referee of `narsil bench chaos`: what it makes of answers that are none, and of servers that are not there."""

import asyncio
import time

import pytest

from narsil_stream.bench import callers
from narsil_stream.bench.chaos.asks import Sizes
from narsil_stream.bench.chaos.doors import door
from narsil_stream.bench.chaos.generator import End, Generator, Load, Outcome, Phase
from narsil_stream.bench.questions import GRPC_INFER, Question


def http(status: str, body: bytes, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", *headers, f"content-length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body


def seen(answer: bytes) -> Outcome:
    """Of a short load on an HTTP server that says this to each request, and hangs up."""

    async def scene() -> Outcome:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(answer)
            writer.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            where = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
            load = Load({"http": where}, [Phase(0.1, rate=100.0)], Sizes(most=2), seed=1, budget_s=1.0)
            return await Generator(load).run()

    return asyncio.run(scene())


@pytest.mark.parametrize(
    ("answer", "end"),
    [
        (http("429 Too Many Requests", b'{"error":"full","code":"OVERLOADED","retry_after_us":5}'), End.OVERLOADED),
        (http("503 Service Unavailable", b"<html>no upstream</html>", "retry-after: 1"), End.UNAVAILABLE),
        (http("504 Gateway Timeout", b""), End.DEADLINE_EXCEEDED),
        (http("431 Request Header Fields Too Large", b"\xff\xfe"), End.OTHER),
        (b"HTTP/1.1 400 Bad Request\r\n\r\nnot HTTP", End.OTHER),
        (http("200 OK", b"<html>hello</html>"), End.WRONG),
        (http("200 OK", b'{"error":"full","code":"OVERLOADED"}'), End.WRONG),
    ],
    ids=["ours", "a proxy's", "an empty one", "no text", "without a length", "a page with 200", "an error with 200"],
)
def test_an_answer_that_is_an_error_counts_as_what_its_status_says(answer: bytes, end: End) -> None:
    """Counted as wrong, each would read as somebody else's scores: the worst that a server can do."""
    outcome = seen(answer)
    assert len(outcome.records) > 0
    assert set(outcome.records["end"]) == {end}
    assert set(outcome.records["retry_after_us"]) == {5 if b"full" in answer and end is End.OVERLOADED else 0}
    assert outcome.surplus == 0


def test_a_request_that_fails_in_a_way_of_its_own_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty record reads as a right answer."""

    def no_answer(_: bytes) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("narsil_stream.schemas.codec.decode_answer", no_answer)
    with pytest.raises(ExceptionGroup) as ended:
        seen(http("200 OK", b""))
    assert ended.group_contains(ZeroDivisionError)


def opening(transport: str, port: int) -> None:
    question = Question(transport, GRPC_INFER, {}, b"")  # type: ignore[arg-type]
    asyncio.run(callers.CALLERS[transport](port, [question], 1).open())


@pytest.mark.parametrize(("transport", "server"), [("http", "HTTP"), ("grpc", "gRPC"), ("nats", "NATS")])
def test_a_load_generator_says_soon_which_server_is_not_there(
    transport: str, server: str, free_port: int, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A bench that stands still for minutes tells nobody what is missing."""
    monkeypatch.setattr(callers, "CONNECT_S", 0.3)
    started = time.monotonic()
    with pytest.raises(TimeoutError, match=rf"no {server} server .*\b{free_port} within 0.3 s"):
        opening(transport, free_port)
    assert time.monotonic() - started < 5
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("way", ["grpc", "producer"])
def test_the_referee_says_soon_which_server_is_not_there(
    way: str, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As above: its connections are of another kind."""
    monkeypatch.setattr(callers, "CONNECT_S", 0.3)
    monkeypatch.setattr("narsil_stream.bench.chaos.doors.CONNECT_S", 0.3)
    where = f"127.0.0.1:{free_port}"
    with pytest.raises(TimeoutError, match=rf"no (gRPC|NATS) server at .*{free_port} within 0.3 s"):
        asyncio.run(door(way, f"nats://{where}" if way == "producer" else where, retry=False).open())
