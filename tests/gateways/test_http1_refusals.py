"""HTTP/1.1 that cannot be read: what its caller is told, and what becomes of the requests before it."""

import json
import socket
from collections.abc import Iterator
from http.client import HTTPResponse
from pathlib import Path

import pytest

from tests.asking import ask_http, json_scores, some_rows
from tests.doubles import Gate
from tests.gateways.wires import request_bytes
from tests.support import PATIENCE_S, NatsServer, System, until

INFER = b"POST /v2/models/ctr/infer HTTP/1.1\r\nhost: x\r\n"
UPGRADE = b"connection: upgrade\r\nupgrade: h2c\r\n"
UNREADABLE = {
    # what is sent, the status, what the error says
    "no HTTP": (b"hello\r\n\r\n", 400, "not HTTP/1.1: "),
    "CONNECT": (b"CONNECT x.example:443 HTTP/1.1\r\nhost: x\r\n\r\n", 400, "CONNECT is not possible: this is no proxy"),
    "a URL that is none": (b"GET http://[x HTTP/1.1\r\nhost: x\r\n\r\n", 400, ""),
    "two lengths": (INFER + b"content-length: 5\r\ncontent-length: 6\r\n\r\n", 400, "not HTTP/1.1: "),
    "a bad chunk": (INFER + b"transfer-encoding: chunked\r\n\r\nXYZ\r\n{}\r\n", 400, "not HTTP/1.1: "),
    "chunks behind an upgrade": (
        INFER + UPGRADE + b"transfer-encoding: chunked\r\n\r\n0\r\n\r\n", 400, "a body in chunks behind an upgrade",
    ),
    "a large header": (INFER + b"x: " + b"a" * 70_000 + b"\r\n\r\n", 431, "expected at most 65536"),
    "a large target": (b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n", 431, "expected at most 65536"),
    "many headers of one name": (INFER + b"x: 1\r\n" * 40_000 + b"\r\n", 431, "expected at most 65536"),
}  # fmt: skip


@pytest.fixture(scope="module")
def gate() -> Gate:
    return Gate()


@pytest.fixture(scope="module")
def port(criteo_model: Path, gate: Gate) -> Iterator[int]:
    with NatsServer() as server, System(server.url, criteo_model, gateways=1, loader=gate.load) as running:
        yield running.http_port


@pytest.fixture
def wire(port: int) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as connected:
        yield connected


class Answers:
    """Those of one connection, one after the other."""

    def __init__(self, wire: socket.socket) -> None:
        self._file = wire.makefile("rb")

    def next(self) -> tuple[HTTPResponse, bytes]:
        response = HTTPResponse(self)  # type: ignore[arg-type]
        response.begin()
        return response, response.read()

    def makefile(self, _: str) -> "Answers":
        """For HTTPResponse, which would take more from the socket than is its own."""
        return self

    def readline(self, size: int = -1) -> bytes:
        return self._file.readline(size)

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size)

    def flush(self) -> None: ...
    def close(self) -> None: ...

    @property
    def ended(self) -> bool:
        try:
            return self._file.read(1) == b""
        except ConnectionError:
            return True


def told(answers: Answers, status: int, detail: str) -> bool:
    """Whether the next answer says so, and is the last."""
    response, body = answers.next()
    assert (response.status, response.getheader("connection")) == (status, "close"), body
    assert response.getheader("content-type") == "application/json"
    assert detail in json.loads(body)["error"], body
    return answers.ended


@pytest.mark.parametrize(("sent", "status", "detail"), UNREADABLE.values(), ids=UNREADABLE)
def test_what_cannot_be_read_is_told_why(wire: socket.socket, port: int, sent: bytes, status: int, detail: str) -> None:
    """431 for whatever was wrong sent people looking for large headers."""
    wire.sendall(sent)
    assert told(Answers(wire), status, detail)
    assert ask_http(port, "GET", "/v2/health/live").status == 200


@pytest.mark.parametrize(("sent", "status", "detail"), UNREADABLE.values(), ids=UNREADABLE)
def test_requests_before_one_that_cannot_be_read_are_answered(
    wire: socket.socket, criteo_model: Path, gate: Gate, sent: bytes, status: int, detail: str
) -> None:
    """They were right, and may have been computed already."""
    rows = some_rows(criteo_model, 2)
    with gate.closed():
        wire.sendall(request_bytes(rows.part(0)))
        until(lambda: gate.waiting, "the first is being computed")
        wire.sendall(request_bytes(rows.part(1)) + sent)
    answers = Answers(wire)
    for row in range(2):
        response, body = answers.next()
        assert response.status == 200, body
        assert json_scores(json.loads(body)) == pytest.approx(rows.scores[[row]], abs=1e-6)
    assert told(answers, status, detail)


def test_a_last_request_is_the_last_whatever_follows(wire: socket.socket, criteo_model: Path) -> None:
    """Its caller has said that it reads one answer more."""
    wire.sendall(request_bytes(some_rows(criteo_model, 1), "connection: close") + b"nonsense\r\n\r\n")
    answers = Answers(wire)
    assert answers.next()[0].status == 200
    assert answers.ended


def test_options_of_the_server_is_no_bad_request(wire: socket.socket) -> None:
    """`OPTIONS *` is HTTP; here it leads nowhere."""
    wire.sendall(b"OPTIONS * HTTP/1.1\r\nhost: x\r\n\r\n")
    assert Answers(wire).next()[0].status == 404
