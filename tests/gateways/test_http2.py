"""HTTP/2 without TLS: what serves, and what is no end of anybody else."""

import contextlib
import json
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import h2.config
import h2.connection
import h2.events
import h2.exceptions
import httpx
import pytest
from msgspec.structs import replace

from narsil_stream.core.config import Config, HttpConfig
from tests.asking import infer_json, some_rows
from tests.gateways.wires import right_binary, still_answers, talk
from tests.support import PATIENCE_S, NatsServer, System, until

INFER = "/v2/models/ctr/infer"
PATIENCE_MS = 300


@pytest.fixture(scope="module")
def system(criteo_model: Path) -> Iterator[System]:
    """A gateway that waits for no body."""
    config = replace(Config(), http=HttpConfig(body_timeout_ms=PATIENCE_MS))
    with NatsServer() as server, System(server.url, criteo_model, config=config, gateways=1) as running:
        yield running


@pytest.fixture(scope="module")
def port(system: System) -> int:
    return system.http_port


def test_http2_serves_the_same(port: int, criteo_model: Path) -> None:
    """With prior knowledge, as proxies speak it inside a cluster; many requests on one connection."""
    rows = some_rows(criteo_model, 40)
    with httpx.Client(http1=False, http2=True, base_url=f"http://127.0.0.1:{port}", timeout=PATIENCE_S) as client:
        for row in range(40):
            one = rows.part(row)
            answer = client.post(INFER, json=infer_json(one))
            assert (answer.http_version, answer.status_code) == ("HTTP/2", 200)
            assert right_binary(answer.json(), one)


def http2(port: int) -> tuple[socket.socket, h2.connection.H2Connection]:
    wire = socket.create_connection(("127.0.0.1", port), PATIENCE_S)
    connection = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
    connection.initiate_connection()
    wire.sendall(connection.data_to_send())
    return wire, connection


def headers(length: int | None = None) -> list[tuple[str, str]]:
    pseudo = [(":method", "POST"), (":path", INFER), (":scheme", "http"), (":authority", "x")]
    return pseudo + ([("content-length", str(length))] if length is not None else [])


def test_streams_that_are_reset_free_their_place_and_harm_nobody(system: System, port: int, criteo_model: Path) -> None:
    """CVE-2023-44487: a client that opens and resets streams as fast as it can."""
    body = json.dumps(infer_json(some_rows(criteo_model, 1))).encode()
    wire, connection = http2(port)
    enough = (OSError, h2.exceptions.FlowControlError)  # the server had enough of it, or its window is used up
    with wire, contextlib.suppress(*enough):
        for _ in range(2_000):
            stream = connection.get_next_available_stream_id()
            connection.send_headers(stream, headers(len(body)))
            connection.send_data(stream, body, end_stream=True)
            connection.reset_stream(stream)
            wire.sendall(connection.data_to_send())
    assert still_answers(port, criteo_model)
    (gateway,) = system.actors("gateway")
    until(lambda: gateway.registry.get_sample_value("narsil_requests_open") == 0, "no request is left open")


def test_frames_that_break_http2_end_the_connection(port: int, criteo_model: Path) -> None:
    """A frame of a size that was never agreed on, data for a stream that was never opened, 5 bytes of settings."""
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    empty_settings = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
    for frame in (
        struct.pack(">I", 1 << 24)[1:] + b"\x00\x00\x00\x00\x00\x01" + b"x" * 65_536,
        b"\x00\x00\x01\x00\x00\x00\x00\x00\x09x",
        b"\x00\x00\x05\x04\x00\x00\x00\x00\x00hello",
        b"\x00\x00\x04\x08\x00\x00\x00\x00\x00\x00\x00\x00\x00",
    ):
        talk(port, preface, empty_settings, frame)
        assert still_answers(port, criteo_model)


def test_a_stream_whose_body_does_not_come_is_answered_408(port: int) -> None:
    """On HTTP/2 the connection may live on; the stream may not."""
    wire, connection = http2(port)
    with wire:
        connection.send_headers(1, headers(1_000))
        wire.sendall(connection.data_to_send())
        wire.settimeout(PATIENCE_S)
        status = None
        while status is None:
            for event in connection.receive_data(wire.recv(65_536)):
                if isinstance(event, h2.events.ResponseReceived):
                    status = dict(event.headers)[":status"]
            wire.sendall(connection.data_to_send())
    assert status == "408"
