"""Bodies that no client should send, and some that some client will."""

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from narsil_stream.core.config import Config, HttpConfig
from tests.asking import HttpCaller, ask_http, infer_json, json_scores, metric, scrape, some_rows
from tests.support import PATIENCE_S, NatsServer, System

INFER = "/v2/models/ctr/infer"
LIMIT = 16_384
PATIENCE_MS = 300


@pytest.fixture(scope="module")
def port(criteo_model: Path) -> Iterator[int]:
    """A gateway that takes small bodies only and waits for none."""
    config = replace(Config(), http=HttpConfig(max_body_bytes=LIMIT, body_timeout_ms=PATIENCE_MS))
    with NatsServer() as server, System(server.url, criteo_model, config=config, gateways=1) as system:
        yield system.http_port


GOOD = '{"inputs":[{"name":"dense","datatype":"FP32","shape":[1,1],"data":[%s]}]}'
MALFORMED = {
    "empty": b"",
    "white space": b" \n",
    "null": b"null",
    "a number": b"17",
    "a list": b"[]",
    "an empty object": b"{}",
    "truncated": b'{"inputs":[{"name":"dense"',
    "trailing": b'{"inputs":[]} x',
    "not UTF-8": b'{"id":"\xff","inputs":[]}',
    "UTF-16": '{"inputs":[]}'.encode("utf-16"),
    "binary": bytes(range(256)),
    "msgpack": b"\x92\xa1x\x90",
    "deep nesting": b'{"inputs":' + b"[" * 5_000,
    "deep nesting, closed": b'{"id":' + b"[" * 5_000 + b"]" * 5_000 + b"}",
    "deep data": (GOOD % ("[" * 4_000 + "1" + "]" * 4_000)).encode(),
    "a huge integer": (GOOD % ("9" * 5_000)).encode(),
    "a huge exponent": (GOOD % "1e999999999").encode(),
    "NaN": (GOOD % "NaN").encode(),
    "Infinity": (GOOD % "-Infinity").encode(),
    "text for a number": (GOOD % '"1"').encode(),
    "an object for a number": (GOOD % "{}").encode(),
    "inputs of a wrong type": b'{"inputs":"dense"}',
    "a negative shape": b'{"inputs":[{"name":"dense","datatype":"FP32","shape":[-1],"data":[]}]}',
    "a shape of a wrong type": b'{"inputs":[{"name":"dense","datatype":"FP32","shape":1.5,"data":[]}]}',
    "an unknown datatype": b'{"inputs":[{"name":"dense","datatype":"FP31","shape":[1],"data":[1]}]}',
    "a negative timeout": b'{"inputs":[],"parameters":{"timeout":-1}}',
    "a priority that is none": b'{"inputs":[],"parameters":{"priority":"high"}}',
    "an unknown output": b'{"inputs":[],"outputs":[{"name":"logits"}]}',
    "65 inputs": json.dumps({"inputs": 65 * [{"name": "x", "datatype": "FP32", "shape": [0]}]}).encode(),
}


@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED)
def test_a_malformed_body_is_400_and_the_connection_lives_on(port: int, criteo_model: Path, body: bytes) -> None:
    """It is never 500, which would say that we are broken, and never the end of the caller's other requests."""
    rows = some_rows(criteo_model, 1)
    with HttpCaller(port) as call:
        answer = call("POST", INFER, body)
        assert answer.status == 400, answer
        assert answer.json["code"] == "INVALID_ARGUMENT"
        assert len(answer.body) < 2_000
        assert json_scores(call("POST", INFER, infer_json(rows)).json)


@pytest.mark.parametrize("size", [LIMIT + 1, 50 * LIMIT])
@pytest.mark.parametrize("declared", [True, False], ids=["declared", "chunked"])
def test_a_body_above_the_limit_is_413(port: int, size: int, declared: bool) -> None:
    """One that is read to its end would fill the memory, by its declared length or without one."""
    body = b" " * size
    with HttpCaller(port) as call:
        answer = call("POST", INFER, body if declared else iter([body[:1_000], body[1_000:]]))
    assert answer.status == 413
    assert answer.json["code"] == "TOO_LARGE"
    assert str(LIMIT) in answer.json["error"]


def test_a_body_just_within_the_limit_is_read(port: int) -> None:
    """The limit is the one that is documented."""
    assert ask_http(port, "POST", INFER, b" " * LIMIT).status == 400


def test_a_length_beyond_the_limit_is_refused_before_the_body_comes(port: int) -> None:
    """A client that waits for 100-continue need not send gigabytes in vain."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as wire:
        head = f"POST {INFER} HTTP/1.1\r\nhost: x\r\ncontent-length: {10**12}\r\nexpect: 100-continue\r\n\r\n"
        wire.sendall(head.encode())
        assert wire.recv(65_536).startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("framing", ["content-length: 1000", "transfer-encoding: chunked"])
def test_a_body_that_does_not_come_is_408_in_time_and_ends_the_connection(port: int, framing: str) -> None:
    """A client that stopped half way would hold its memory for ever."""
    before = scrape(port)
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as wire:
        wire.sendall(f"POST {INFER} HTTP/1.1\r\nhost: x\r\n{framing}\r\n\r\n".encode())
        wire.sendall(b"5\r\nhello\r\n")
        started = time.monotonic()
        answer = b"".join(iter(lambda: wire.recv(65_536), b""))
        took_ms = (time.monotonic() - started) * 1e3
    head, _, body = answer.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ")
    assert "error" in json.loads(body)
    assert PATIENCE_MS * 0.9 <= took_ms < PATIENCE_MS + 1_000
    after = scrape(port)
    offered, ended = ("narsil_requests_offered_total", "narsil_requests_total")
    assert metric(after, offered) - metric(before, offered) == metric(after, ended) - metric(before, ended) == 1


@pytest.mark.parametrize(
    "head",
    ["GET", "GET / HTTP/9.9", "POST / HTTP/1.1\r\ncontent-length: x", "POST / HTTP/1.1\r\nbad header",
     "POST / HTTP/1.1\r\ncontent-length: 1\r\ncontent-length: 2", "\x16\x03\x01\x02\x00\x01\x00"],
)  # fmt: skip
def test_what_is_not_http_is_refused_and_harms_nobody(port: int, criteo_model: Path, head: str) -> None:
    """Port scanners and TLS clients come to every port."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE_S) as wire:
        wire.sendall(head.encode("latin-1") + b"\r\n\r\n")
        with contextlib.suppress(OSError):  # it may be closed already
            wire.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            answer = b"".join(iter(lambda: wire.recv(65_536), b""))
    assert not answer.startswith((b"HTTP/1.1 2", b"HTTP/1.1 5"))
    assert json_scores(ask_http(port, "POST", INFER, infer_json(some_rows(criteo_model, 1))).json)
