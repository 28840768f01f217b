"""HTTP/1.1 without TLS: connections that stay, requests that come all at once, and who is cut off."""

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from http.client import HTTPResponse
from pathlib import Path

import pytest
from msgspec.structs import replace

from narsil_stream.core.config import Config, HttpConfig
from narsil_stream.gateways.http1 import Connection, Http1Server
from narsil_stream.gateways.http1_exchange import Exchange, Scope
from tests.asking import json_scores, some_rows
from tests.gateways.wires import request_bytes
from tests.support import PATIENCE_S, NatsServer, System

LIVE = b"GET /v2/health/live HTTP/1.1\r\nhost: x\r\n\r\n"
PATIENCE_MS = 500


@pytest.fixture(scope="module")
def port(criteo_model: Path) -> Iterator[int]:
    config = replace(Config(), http=HttpConfig(body_timeout_ms=PATIENCE_MS))
    with NatsServer() as server, System(server.url, criteo_model, config=config, gateways=1) as running:
        yield running.http_port


@pytest.fixture
def wire(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as connected:
        yield connected


def answer(wire: socket.socket, method: str = "POST") -> tuple[HTTPResponse, bytes]:
    response = HTTPResponse(wire, method=method)
    response.begin()
    return response, response.read()


def ended(wire: socket.socket) -> bool:
    try:
        return wire.recv(1) == b""
    except ConnectionError:
        return True


def test_requests_sent_at_once_are_answered_in_their_order(wire: socket.socket, criteo_model: Path) -> None:
    """Pipelining: scores under somebody else's request would be believed."""
    rows = some_rows(criteo_model, 8)
    wire.sendall(b"".join(request_bytes(rows.part(row)) for row in range(8)))
    reader = wire.makefile("rb")
    for row in range(8):
        head = b"".join(iter(reader.readline, b"\r\n"))
        assert head.startswith(b"HTTP/1.1 200 OK\r\n")
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        (score,) = json_scores(json.loads(reader.read(length)))
        assert abs(score - rows.scores[row]) < 1e-6


@pytest.mark.parametrize("size", [1, 7, 100])
def test_a_request_may_come_in_pieces(wire: socket.socket, criteo_model: Path, size: int) -> None:
    """Networks cut where they like."""
    sent = request_bytes(some_rows(criteo_model, 1))
    for at in range(0, len(sent), size):
        wire.sendall(sent[at : at + size])
    assert answer(wire)[0].status == 200


def test_a_body_in_chunks_with_a_trailer_is_read(wire: socket.socket, criteo_model: Path) -> None:
    """A trailer is no header: it must not change what the request says."""
    head, _, body = request_bytes(some_rows(criteo_model, 1)).partition(b"\r\n\r\n")
    head = head.replace(b"content-length: %d" % len(body), b"transfer-encoding: chunked")
    parts = b"".join(b"%x\r\n%b\r\n" % (len(p), p) for p in (body[:100], body[100:]))
    wire.sendall(head + b"\r\n\r\n" + parts + b"0\r\ncontent-encoding: br\r\n\r\n" + LIVE)
    assert answer(wire)[0].status == 200


@pytest.mark.parametrize(
    ("version", "said", "stays"),
    [("1.1", "", True), ("1.1", "close", False), ("1.0", "", False), ("1.0", "keep-alive", True)],
)
def test_a_connection_stays_as_long_as_the_caller_wants(
    wire: socket.socket, version: str, said: str, stays: bool
) -> None:
    """A connection for each request costs more than the request; one that hangs costs its caller the answer."""
    line = f"connection: {said}\r\n" if said else ""
    request = f"GET /v2/health/live HTTP/{version}\r\nhost: x\r\n{line}\r\n".encode()
    wire.sendall(request)
    response, _ = answer(wire, "GET")
    assert response.status == 200
    if stays:
        wire.sendall(request)
        assert answer(wire, "GET")[0].status == 200
    else:
        assert ended(wire)


def test_a_head_request_gets_the_length_and_no_body(wire: socket.socket) -> None:
    """A body would be read as the next answer."""
    wire.sendall(LIVE.replace(b"GET", b"HEAD") + LIVE)
    first, body = answer(wire, "HEAD")
    assert (first.status, body, first.getheader("content-length")) == (200, b"", "13")
    assert first.getheader("date", "").endswith("GMT")


def test_a_wish_to_speak_another_protocol_is_not_heard(wire: socket.socket) -> None:
    """curl asks for HTTP/2 so; what follows on the connection is not ours to read."""
    wire.sendall(LIVE.replace(b"\r\n\r\n", b"\r\nconnection: upgrade, http2-settings\r\nupgrade: h2c\r\n\r\n"))
    assert answer(wire, "GET")[0].status == 200
    assert ended(wire)


@pytest.mark.parametrize("size", [1_000_000, 700])
def test_a_body_behind_such_a_wish_is_scored(wire: socket.socket, criteo_model: Path, size: int) -> None:
    """Java's HTTP client asks for HTTP/2 with its first request, body and all; its parser leaves such a body out."""
    rows = some_rows(criteo_model, 5)
    wish = b"\r\nconnection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABk\r\n\r\n"
    request = request_bytes(rows).replace(b"\r\n\r\n", wish, 1)
    for at in range(0, len(request), size):
        wire.sendall(request[at : at + size])
    head, body = answer(wire)
    assert head.status == 200, body
    assert json_scores(json.loads(body)) == pytest.approx(rows.scores, abs=1e-6)
    assert ended(wire)


def test_trailers_are_bounded(wire: socket.socket) -> None:
    """The parser keeps a whole line of them, however long."""
    wire.sendall(
        b"POST /v2/models/ctr/infer HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nx: "
    )
    with pytest.raises(OSError):
        for _ in range(1_000):
            wire.sendall(b"x" * 65_536)


def test_a_request_behind_an_answer_that_is_not_taken_is_begun_once() -> None:
    """Begun twice, it would be answered twice, and every later answer would go to the wrong question."""

    class Wire:
        said = b""

        def write(self, data: bytes) -> None:
            self.said += data

        def pause_reading(self) -> None: ...
        def resume_reading(self) -> None: ...
        def close(self) -> None: ...

    begun: list[str] = []

    async def handler(scope: Scope, exchange: Exchange) -> None:
        begun.append(scope.path)
        exchange.response_bytes(200, [], scope.path.encode())

    async def scene() -> bytes:
        wire, connection = Wire(), Connection(Http1Server(handler, "", 8192, 10.0, 100))
        connection.connection_made(wire)
        connection.data_received(b"GET /a HTTP/1.1\r\nhost: x\r\n\r\n")
        connection.pause_writing()
        await asyncio.sleep(0.01)
        connection.data_received(b"GET /b HTTP/1.1\r\nhost: x\r\n\r\n")
        await asyncio.sleep(0.01)
        assert begun == ["/a"]
        connection.resume_writing()
        await asyncio.sleep(0.01)
        return wire.said

    said = asyncio.run(scene())
    assert begun == ["/a", "/b"]
    assert said.count(b"HTTP/1.1 200") == 2


def test_a_path_may_be_escaped_and_carry_a_query_and_a_host(wire: socket.socket) -> None:
    """Proxies do all of it."""
    for path in (b"/v2/health/li%76e", b"/v2/health/live?x=/v2", b"http://x:80/v2/health/live"):
        wire.sendall(LIVE.replace(b"/v2/health/live", path))
        assert answer(wire, "GET")[0].status == 200


def test_who_waits_between_requests_is_not_cut_and_who_waits_within_one_is(wire: socket.socket) -> None:
    """Keeping a connection is polite, holding one up is not."""
    wire.sendall(LIVE)
    answer(wire, "GET")
    time.sleep(3 * PATIENCE_MS / 1e3)  # longer than a head may take: nothing must happen meanwhile
    wire.sendall(LIVE)
    assert answer(wire, "GET")[0].status == 200
    wire.sendall(LIVE[:20])
    started = time.monotonic()
    assert ended(wire)
    assert time.monotonic() - started < PATIENCE_S / 2


def test_more_than_a_head_may_hold_is_431(wire: socket.socket) -> None:
    """The protocol's own answer for it, so that the caller can find out."""
    wire.sendall(b"GET / HTTP/1.1\r\nhost: x\r\ncookie: " + b"a" * 80_000 + b"\r\n\r\n")
    assert answer(wire, "GET")[0].status == 431


def test_many_small_requests_at_once_do_not_keep_others_waiting(port: int, criteo_model: Path) -> None:
    """Who sends a thousand in one piece gets them one after the other; memory is bounded by one read of the socket."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as greedy:
        greedy.sendall(LIVE * 1_000)
        with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as other:
            other.sendall(request_bytes(some_rows(criteo_model, 1)))
            assert answer(other)[0].status == 200
        received = b""
        while received.count(b"HTTP/1.1 200 ") < 1_000:
            part = greedy.recv(65_536)
            assert part
            received += part


def test_nobody_is_served_more_than_he_takes(port: int) -> None:
    """A caller that asks and does not read must not fill the gateway's memory with answers."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as wire:
        wire.settimeout(1)
        document = b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n"
        sent = 0
        with pytest.raises(TimeoutError):
            while sent < 64 << 20:
                sent += wire.send(document * 1_000)
        assert sent < 32 << 20
