"""Binary tensors, compressed bodies and frames that are wrong, and connections that behave badly."""

import gzip
import json
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from msgspec.structs import replace

from narsil_stream.core.config import Config, HttpConfig
from tests.asking import HttpCaller, Rows, ask_http, infer_json, some_rows
from tests.gateways.wires import request_bytes, right_binary, still_answers, talk
from tests.support import PATIENCE_S, NatsServer, System

INFER = "/v2/models/ctr/infer"
LIMIT = 1 << 20
PATIENCE_MS = 300


@pytest.fixture(scope="module")
def system(criteo_model: Path) -> Iterator[System]:
    """A gateway that takes bodies up to 1 MiB and waits for none."""
    config = replace(Config(), http=HttpConfig(max_body_bytes=LIMIT, body_timeout_ms=PATIENCE_MS))
    with NatsServer() as server, System(server.url, criteo_model, config=config, gateways=1) as running:
        yield running


@pytest.fixture(scope="module")
def port(system: System) -> int:
    return system.http_port


Change = Callable[[dict[str, Any], bytes], tuple[dict[str, Any], bytes]]


def binary(rows: Rows, **input_changes: Any) -> tuple[dict[str, Any], bytes]:
    """An infer request as JSON and the bytes behind it; `dense__shape=[..]` changes one field of one input."""
    inputs: list[dict[str, Any]] = []
    blob = b""
    for name, datatype, array in (("dense", "FP32", rows.dense), ("sparse", "INT32", rows.ids)):
        raw = array.tobytes()
        inputs.append(
            {
                "name": name,
                "datatype": datatype,
                "shape": list(array.shape),
                "parameters": {"binary_data_size": len(raw)},
            }
        )
        blob += raw
    for key, value in input_changes.items():
        name, field = key.split("__")
        (one,) = [one for one in inputs if one["name"] == name]
        one[field] = value
    return {"inputs": inputs}, blob


SIZE = "binary_data_size"
WRONG_BINARY: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    # changes of inputs, changes of the frame, what the error says
    "truncated": ({}, {"cut": 1}, "'sparse' has binary_data_size 208; 207 bytes are left"),
    "cut in the first tensor": ({}, {"cut": 250}, "'dense' has binary_data_size 104; 62 bytes are left"),
    "bytes behind the last tensor": ({}, {"more": b"x"}, "1 bytes follow the last binary tensor"),
    "no size": ({"sparse__parameters": {}}, {}, "208 bytes follow the last binary tensor"),
    "a smaller size": ({"sparse__parameters": {SIZE: 204}}, {}, "4 bytes follow the last binary tensor"),
    "a size that its shape does not have": ({"dense__shape": [3, 13]}, {}, "'dense' has 104 bytes; expected 156"),
    "a huge size": ({"sparse__parameters": {SIZE: 2**52}}, {}, "binary_data_size 4503599627370496; 208 bytes are left"),
    "a size beyond 64 bits": ({"sparse__parameters": {SIZE: 2**70}}, {}, "not an Open Inference Protocol request"),
    "a negative size": ({"sparse__parameters": {SIZE: -1}}, {}, "not an Open Inference Protocol request"),
    "a size that is text": ({"sparse__parameters": {SIZE: "208"}}, {}, "not an Open Inference Protocol request"),
    "a huge shape": ({"dense__shape": [2**52, 2**52]}, {}, "'dense' has shape"),
    "a shape whose size is 0 beyond 64 bits": ({"dense__shape": [2**52, 2**52, 0]}, {}, "'dense' has shape"),
    "a shape beyond 64 bits": ({"dense__shape": [2**64, 13]}, {}, "not an Open Inference Protocol request"),
    "data and a size": ({"sparse__data": [1]}, {}, "both data and binary_data_size"),
    "text for a tensor": ({"dense__datatype": "BYTES"}, {}, "not an Open Inference Protocol request"),
    "shared memory": ({"dense__parameters": {"shared_memory_region": "x"}}, {"cut": 104}, "shared memory"),
    "a header length beyond the body": ({}, {"length": 10**6}, "the body has"),
    "a header length beyond 64 bits": ({}, {"length": 10**30}, "Inference-Header-Content-Length"),
    "a header length that is none": ({}, {"length": "12x"}, "expected a number of bytes"),
    "a negative header length": ({}, {"length": -5}, "expected a number of bytes"),
    "a header length in other digits": ({}, {"length": "\xb2"}, "not an Open Inference Protocol request"),
    "a header length of 0": ({}, {"length": 0}, "not an Open Inference Protocol request"),
    "a header length that cuts the JSON": ({}, {"length": 20}, "not an Open Inference Protocol request"),
    "no header length": ({}, {"length": None}, "not an Open Inference Protocol request"),
    "no header length and no bytes": ({}, {"length": None, "cut": 312}, "Inference-Header-Content-Length says where"),
}


@pytest.mark.parametrize(("inputs", "frame", "told"), WRONG_BINARY.values(), ids=WRONG_BINARY)
def test_a_wrong_binary_request_is_400_that_says_what_is_wrong(
    port: int, criteo_model: Path, inputs: dict[str, Any], frame: dict[str, Any], told: str
) -> None:
    """Sizes that do not add up are the commonest fault of clients, and the oldest way to crash a server."""
    rows = some_rows(criteo_model, 2)
    head, blob = binary(rows, **inputs)
    text = json.dumps(head).encode()
    body = text + blob + frame.get("more", b"")
    length = frame.get("length", len(text))
    headers = {} if length is None else {"Inference-Header-Content-Length": str(length)}
    with HttpCaller(port) as call:
        answer = call("POST", INFER, body[: len(body) - frame.get("cut", 0)], headers)
        assert (answer.status, answer.json["code"]) == (400, "INVALID_ARGUMENT"), answer
        assert told in answer.json["error"]
        assert len(answer.body) < 2_000
        assert right_binary(call("POST", INFER, *good_binary(rows)).json, rows)


def good_binary(rows: Rows) -> tuple[bytes, dict[str, str]]:
    head, blob = binary(rows)
    text = json.dumps(head).encode()
    return text + blob, {"Inference-Header-Content-Length": str(len(text))}


GOOD = json.dumps({"inputs": []}).encode()
WRONG_ENCODING: dict[str, tuple[str, bytes, int, str]] = {
    "brotli": ("br", b"\x0b\x02\x80", 415, "use gzip or deflate"),
    "two encodings": ("gzip, gzip", gzip.compress(gzip.compress(GOOD)), 415, "use gzip or deflate"),
    "an unknown one": ("x" * 300, GOOD, 415, "use gzip or deflate"),
    "not gzip": ("gzip", GOOD, 400, "the body is not gzip"),
    "not deflate": ("deflate", gzip.compress(GOOD), 400, "the body is not deflate"),
    "raw deflate": ("deflate", zlib.compress(GOOD)[2:-4], 400, "the body is not deflate"),
    "truncated gzip": ("gzip", gzip.compress(GOOD)[:-9], 400, "ends in the middle"),
    "damaged gzip": ("gzip", gzip.compress(GOOD)[:-8] + b"12345678", 400, "the body is not gzip"),
    "garbage behind gzip": ("gzip", gzip.compress(GOOD) + b"garbage", 400, "the body is not gzip"),
    "nothing": ("gzip", b"", 400, "ends in the middle"),
    "a gzip bomb": ("gzip", gzip.compress(b" " * 200 * LIMIT), 413, f"more than {LIMIT} bytes"),
    "a deflate bomb": ("deflate", zlib.compress(b" " * 200 * LIMIT), 413, f"more than {LIMIT} bytes"),
    "a bomb in members": (
        "gzip",
        gzip.compress(b" " * (LIMIT // 2)) * 50,
        413,
        "bytes",
    ),
}


@pytest.mark.parametrize(("encoding", "body", "status", "told"), WRONG_ENCODING.values(), ids=WRONG_ENCODING)
def test_a_body_that_cannot_be_inflated_is_refused_in_bounded_memory(
    port: int, criteo_model: Path, encoding: str, body: bytes, status: int, told: str
) -> None:
    """200 kB that become 200 MB are an attack."""
    before = psutil.Process().memory_info().rss
    answer = ask_http(port, "POST", INFER, body, **{"content-encoding": encoding})
    assert (answer.status, told in answer.json["error"]) == (status, True), answer
    assert psutil.Process().memory_info().rss - before < 64 << 20
    assert still_answers(port, criteo_model)


@pytest.fixture(scope="module")
def roomy(criteo_model: Path) -> Iterator[int]:
    """The port of a gateway with the default limits, but little patience."""
    config = replace(Config(), http=HttpConfig(body_timeout_ms=5_000))
    with NatsServer() as server, System(server.url, criteo_model, config=config, gateways=1) as running:
        yield running.http_port


def test_bombs_from_many_callers_do_not_stop_the_others(roomy: int, criteo_model: Path) -> None:
    """64 kB become 63 MB each: inflating them must neither hold up the event loop nor be done for nothing."""
    bomb = gzip.compress(b" " * (63 << 20))
    assert len(bomb) < 70_000
    headers = {"content-encoding": "gzip", "Inference-Header-Content-Length": "10"}
    stop = threading.Event()
    slowest = [0.0]

    def probe() -> None:
        with HttpCaller(roomy) as call:
            while not stop.is_set():
                started = time.monotonic()
                assert call("GET", "/v2/health/live").status == 200
                slowest[0] = max(slowest[0], time.monotonic() - started)

    prober = threading.Thread(target=probe)
    prober.start()
    with ThreadPoolExecutor(15) as threads:
        plain = threads.map(lambda _: ask_http(roomy, "POST", INFER, bomb, **{"content-encoding": "gzip"}), range(15))
        assert {answer.status for answer in plain} == {413}
        with_header = threads.map(lambda _: ask_http(roomy, "POST", INFER, bomb, **headers), range(15))
        assert {answer.status for answer in with_header} <= {400, 429}
    stop.set()
    prober.join()
    assert slowest[0] < 2, f"a probe took {slowest[0]:.1f} s"
    assert still_answers(roomy, criteo_model)


@pytest.mark.parametrize("framing", ["transfer-encoding: chunked", f"content-length: {64 << 20}"])
def test_slow_uploads_take_nothing_from_others(roomy: int, criteo_model: Path, framing: str) -> None:
    """Memory is counted as it fills, not as it is announced: twenty sockets must not be enough to close the gateway."""
    wires = [socket.create_connection(("127.0.0.1", roomy), PATIENCE_S) for _ in range(20)]
    try:
        for wire in wires:
            wire.sendall(f"POST {INFER} HTTP/1.1\r\nhost: x\r\n{framing}\r\n\r\n1\r\n{{".encode())
        assert still_answers(roomy, criteo_model)
    finally:
        for wire in wires:
            wire.close()


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "identity", "GZIP"])
def test_bodies_in_known_encodings_are_read(port: int, criteo_model: Path, encoding: str) -> None:
    """Also in several members, as parallel compressors write them."""
    rows = some_rows(criteo_model, 3)
    body = json.dumps(infer_json(rows)).encode()
    packed = {
        "gzip": gzip.compress(body[:100]) + gzip.compress(body[100:]),
        "deflate": zlib.compress(body),
        "identity": body,
        "GZIP": gzip.compress(body),
    }[encoding]
    assert right_binary(ask_http(port, "POST", INFER, packed, **{"content-encoding": encoding}).json, rows)


@pytest.mark.parametrize(
    ("accepts", "given"),
    [("gzip", "gzip"), ("deflate", "deflate"), ("br, gzip;q=0.5", "gzip"), ("gzip;q=0, deflate", "deflate"),
     ("br", ""), ("", ""), ("gzip;q=0", ""), ("identity", "")],
)  # fmt: skip
def test_answers_are_compressed_only_as_the_client_accepts(
    port: int, criteo_model: Path, accepts: str, given: str
) -> None:
    """Nobody gets brotli unasked."""
    rows = some_rows(criteo_model, 400)
    answer = ask_http(port, "POST", INFER, infer_json(rows), **{"accept-encoding": accepts})
    assert answer.headers.get("content-encoding", "") == given
    unpacked = {"gzip": gzip.decompress, "deflate": zlib.decompress, "": bytes}[given](answer.body)
    assert right_binary(json.loads(unpacked), rows)


JSON_BOMBS = {
    "deep lists": b'{"inputs":' + b"[" * 100_000,
    "deep objects": b'{"inputs":[{"parameters":' + b'{"a":' * 100_000,
    "many keys": b"{" + b",".join(b'"k%d":0' % i for i in range(60_000)) + b"}",
    "many inputs": json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [0]}] * 10_000}).encode(),
    "a long name": json.dumps({"inputs": [{"name": "x" * 500_000, "datatype": "FP32", "shape": [0]}]}).encode(),
    "a long id": json.dumps({"inputs": [], "id": "x" * 500_000}).encode(),
    "a long number": b'{"inputs":[],"parameters":{"timeout":' + b"9" * 500_000 + b"}}",
    "many dimensions": json.dumps({"inputs": [{"name": "x", "datatype": "FP32", "shape": [1] * 50_000}]}).encode(),
    "escapes": b'{"inputs":[],"id":"' + b"\\u0000" * 80_000 + b'"}',
}


@pytest.mark.parametrize("body", JSON_BOMBS.values(), ids=JSON_BOMBS)
def test_a_json_bomb_is_400_in_no_time(port: int, criteo_model: Path, body: bytes) -> None:
    """Depth, width and length are bounded before anything is built from them."""
    started = time.monotonic()
    answer = ask_http(port, "POST", INFER, body)
    assert (answer.status, answer.json["code"]) == (400, "INVALID_ARGUMENT")
    assert len(answer.body) < 2_000
    assert time.monotonic() - started < 5
    assert still_answers(port, criteo_model)


def test_a_body_longer_than_its_length_is_a_second_request_that_is_none(port: int, criteo_model: Path) -> None:
    """The rest of the bytes must not be taken for somebody's request."""
    answer = talk(port, request_bytes(some_rows(criteo_model, 1), length=50))
    first, _, rest = answer.partition(b"HTTP/1.1 400 ")
    assert first == b""
    assert rest.count(b"HTTP/1.1 2") == 0
    assert still_answers(port, criteo_model)


def test_a_body_shorter_than_its_length_is_408(port: int, criteo_model: Path) -> None:
    """Within the time limit, and it ends the connection."""
    answer = talk(port, request_bytes(some_rows(criteo_model, 1), length=100_000))
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert still_answers(port, criteo_model)


def test_a_half_closed_connection_gets_its_answer(port: int, criteo_model: Path) -> None:
    """`printf ... | nc` closes its side once it has sent."""
    answer = talk(port, request_bytes(some_rows(criteo_model, 1), "connection: close"), close=True)
    assert answer.startswith(b"HTTP/1.1 200 ") or answer == b""  # the parser may take it for a caller who left
    assert still_answers(port, criteo_model)


@pytest.mark.parametrize(
    "head",
    {
        "one huge header": b"x: " + b"a" * 1_000_000,
        "many headers": b"\r\n".join(b"x%d: 1" % i for i in range(50_000)),
        "a header without an end": b"x: " + b"a" * 2_000_000,
        "two lengths": b"content-length: 5\r\ncontent-length: 6",
        "a length and chunks": b"content-length: 5\r\ntransfer-encoding: chunked",
        "a negative length": b"content-length: -1",
        "a length beyond 64 bits": b"content-length: 99999999999999999999999",
        "a bad chunk": b"transfer-encoding: chunked\r\n\r\nXYZ\r\nhello",
        "a huge chunk": b"transfer-encoding: chunked\r\n\r\nffffffffffffffffff\r\nhello",
        "a space in a name": b"con tent: 1",
        "a NUL": b"x: a\x00b",
    }.items(),
    ids=lambda head: head[0],
)
def test_what_the_parser_refuses_is_closed_without_a_scored_answer(
    port: int, criteo_model: Path, head: tuple[str, bytes]
) -> None:
    """It need not be JSON then, but it must end, and harm nobody."""
    answer = talk(port, f"POST {INFER} HTTP/1.1\r\nhost: x\r\n".encode(), head[1], b"\r\n\r\n{}")
    assert not answer.startswith((b"HTTP/1.1 2", b"HTTP/1.1 500")), answer[:200]
    assert still_answers(port, criteo_model)


@pytest.mark.parametrize("begin", [b"POST / HT", b"POST /v2 HTTP/1.1\r\nhost: x\r\nx: y"])
def test_a_header_that_does_not_come_holds_up_nobody_and_is_cut(port: int, criteo_model: Path, begin: bytes) -> None:
    """A hundred connections that send a little and wait are cheap for their owner; they must be cheap here too."""
    wires = [socket.create_connection(("127.0.0.1", port), PATIENCE_S) for _ in range(100)]
    started = time.monotonic()
    try:
        for wire in wires:
            wire.sendall(begin)
        assert still_answers(port, criteo_model)
        for wire in wires:
            assert not wire.recv(65_536).startswith(b"HTTP/1.1 2")
    finally:
        for wire in wires:
            wire.close()
    assert time.monotonic() - started < PATIENCE_S / 2


def test_a_flood_of_bad_requests_leaves_memory_and_good_requests_as_they_were(port: int, criteo_model: Path) -> None:
    """Each refused body is let go of."""
    rows = some_rows(criteo_model, 2)
    bad = b'{"inputs":' + b"[" * (LIMIT // 2)

    def flood() -> None:
        with HttpCaller(port) as call:
            for _ in range(40):
                assert call("POST", INFER, bad).status == 400

    flood()
    before = psutil.Process().memory_info().rss
    threads = [threading.Thread(target=flood) for _ in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert right_binary(ask_http(port, "POST", INFER, infer_json(rows)).json, rows)
    for thread in threads:
        thread.join()
    assert psutil.Process().memory_info().rss - before < 64 << 20
