"""Callers on plain TCP who take nothing of their answers, or leave at once: how long they are kept."""

import asyncio
import contextlib
import os
import socket
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h2.config
import h2.connection
import psutil
import pytest
import uvloop

from narsil_stream.gateways import http1, http1_relay
from narsil_stream.gateways.http import HttpGateway
from narsil_stream.gateways.http1 import PREFACE
from tests.asking import ask_http
from tests.support import PATIENCE_S, NatsServer, System, until

IDLE_S = 1.0
LARGE = b"GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n"
"""Its answer is larger than what the kernel keeps for a caller that `small` has connected."""


@pytest.fixture(scope="module")
def system(criteo_model: Path) -> Iterator[System]:
    with NatsServer() as server, System(server.url, criteo_model, gateways=1) as running:
        (gateway,) = running.actors("gateway")
        assert isinstance(gateway, HttpGateway) and gateway._plain is not None and gateway._plain._server is not None
        for listening in gateway._plain._server.sockets:  # accepted ones are alike
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4_096)
        yield running


@pytest.fixture
def port(system: System, monkeypatch: pytest.MonkeyPatch) -> int:
    """Of a gateway that waits for a second where it else waits for 75."""
    for module in (http1, http1_relay):
        monkeypatch.setattr(module, "IDLE_S", IDLE_S)
    return system.http_port


def small(port: int) -> socket.socket:
    """A caller for whom the kernel keeps little: what it does not read soon waits in the gateway."""
    wire = socket.socket()
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
    wire.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 100)
    wire.settimeout(PATIENCE_S)
    wire.connect(("127.0.0.1", port))
    return wire


def kept(port: int, wire: socket.socket) -> bool:
    """Whether the gateway, which is in this process, still has its end of a connection."""
    caller = wire.getsockname()[1]
    return any(
        (one.laddr.port, one.raddr.port) == (port, caller)
        for one in psutil.net_connections("tcp")
        if one.pid == os.getpid() and one.raddr
    )


def whole_answers(received: bytes) -> int:
    """How many there are. Fails if one of them, or what follows them, is cut."""
    count = 0
    while received:
        head, _, rest = received.partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 "), head
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r")[0])
        assert len(rest) >= length, f"{len(rest)} of {length} bytes"
        received = rest[length:]
        count += 1
    return count


def read_all(wire: socket.socket, piece: int = 65_536, pause_s: float = 0.0) -> bytes:
    received = b""
    while part := wire.recv(piece):
        received += part
        time.sleep(pause_s)
    return received


@pytest.mark.parametrize(
    "asked",
    [LARGE, LARGE.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"), LARGE * 100, LARGE + b"nonsense\r\n\r\n"],
    ids=["one request", "the last request", "many requests", "a bad request behind it"],
)
def test_a_caller_who_takes_nothing_of_its_answer_is_cut(port: int, asked: bytes) -> None:
    """It would be kept for ever, its answer in memory: a close waits until all is taken."""
    with small(port) as wire:
        wire.sendall(asked)
        until(lambda: kept(port, wire), "it is connected")
        started = time.monotonic()
        until(lambda: not kept(port, wire), "it is cut", 6 * IDLE_S)
        assert time.monotonic() - started > IDLE_S / 2, "it had its time"
    assert ask_http(port, "GET", "/v2/health/live").status == 200


def test_a_caller_who_takes_its_answer_slowly_gets_all_of_it(port: int) -> None:
    """Mobile networks are slow; who goes on is not given up."""
    with small(port) as wire:
        wire.sendall(LARGE.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))
        started = time.monotonic()
        assert whole_answers(read_all(wire, 4_096, 0.1)) == 1
        assert time.monotonic() - started > 2 * IDLE_S, "it was too fast to tell anything"


def test_large_answers_are_not_cut_when_the_gateway_ends(criteo_model: Path) -> None:
    """They were accepted and computed; half an answer is none."""
    with (
        NatsServer() as server,
        System(server.url, criteo_model, gateways=1) as system,
        contextlib.ExitStack() as stack,
    ):
        wires = [stack.enter_context(small(system.http_port)) for _ in range(8)]
        for wire in wires:
            wire.sendall(LARGE * 20)
            wire.recv(1, socket.MSG_PEEK)
        (gateway,) = system.actors("gateway")
        stopped = system.submit(gateway.stop())
        until(lambda: not accepts(system.http_port), "it takes nobody else")
        assert all(1 <= whole_answers(read_all(wire)) < 20 for wire in wires)
        stopped.result(PATIENCE_S)


def accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), PATIENCE_S).close()
    except OSError:
        return False
    return True


def test_who_takes_nothing_does_not_keep_the_gateway_from_ending(criteo_model: Path) -> None:
    """A deployment would wait until it is killed."""
    with (
        NatsServer() as server,
        System(server.url, criteo_model, gateways=1) as system,
        small(system.http_port) as wire,
    ):
        wire.sendall(LARGE * 20)
        wire.recv(1, socket.MSG_PEEK)
        (gateway,) = system.actors("gateway")
        started = time.monotonic()
        system.submit(gateway.stop()).result(PATIENCE_S)
        assert time.monotonic() - started < 5
        until(lambda: not kept(system.http_port, wire), "it is cut")


# HTTP/2


def leave(wire: socket.socket) -> None:
    """As a process that is killed."""
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wire.close()


def test_callers_who_leave_with_the_preface_leave_nothing_behind(system: System, port: int) -> None:
    """Each would cost two descriptors until there are none."""
    before = psutil.Process().num_fds()
    for number in range(100):
        wire = socket.create_connection(("127.0.0.1", port), PATIENCE_S)
        wire.sendall(PREFACE if number % 2 else PREFACE[:10])
        leave(wire)
    until(lambda: psutil.Process().num_fds() <= before, "all are let go of")
    assert ask_http(port, "GET", "/v2/health/live").status == 200


def test_a_caller_who_has_left_before_http2_is_reached_leaves_nothing_behind(tmp_path: Path) -> None:
    """Nobody would tell the server behind, and its end would wait for ever."""

    async def scene() -> None:
        loop = asyncio.get_running_loop()
        met: asyncio.Future[Any] = loop.create_future()
        ended: asyncio.Future[bytes] = loop.create_future()

        class Caller(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                met.set_result(transport)

        async def behind(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            ended.set_result(await reader.read())
            writer.close()

        path = str(tmp_path / "http2")
        server = await asyncio.start_unix_server(behind, path)
        door = await loop.create_server(Caller, "127.0.0.1", 0)
        _, writer = await asyncio.open_connection("127.0.0.1", door.sockets[0].getsockname()[1])
        async with asyncio.timeout(PATIENCE_S):
            transport = await met
            transport.pause_reading()
            transport.close()
            await http1_relay.relay(transport, PREFACE, path)
            assert await ended == b""
        writer.close()
        door.close()
        server.close()

    uvloop.run(scene())


def greedy(port: int) -> socket.socket:
    """Asks for much over HTTP/2, and lets all of it be sent."""
    connection = h2.connection.H2Connection(h2.config.H2Configuration())
    connection.local_settings.initial_window_size = 1 << 30
    connection.initiate_connection()
    connection.increment_flow_control_window(1 << 30)
    for stream in range(1, 101, 2):
        pseudo = [(":method", "GET"), (":path", "/openapi.json"), (":scheme", "http"), (":authority", "x")]
        connection.send_headers(stream, pseudo, end_stream=True)
    wire = small(port)
    wire.sendall(connection.data_to_send())
    return wire


def test_a_caller_who_takes_nothing_over_http2_is_cut(port: int) -> None:
    """Pings do not reach who does not read, and the end of the server behind is not seen while the way is blocked."""
    with greedy(port) as wire:
        until(lambda: kept(port, wire), "it is connected")
        until(lambda: not kept(port, wire), "it is cut", 6 * IDLE_S)
    assert ask_http(port, "GET", "/v2/health/live").status == 200


def test_nothing_is_left_of_http2_connections_when_the_gateway_ends(criteo_model: Path) -> None:
    """Also of those that nobody reads from."""
    with NatsServer() as server, System(server.url, criteo_model, gateways=1) as system:
        port = system.http_port
        with greedy(port) as wire, socket.create_connection(("127.0.0.1", port), PATIENCE_S) as silent:
            silent.sendall(PREFACE + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00")
            silent.recv(1, socket.MSG_PEEK)
            wire.recv(1, socket.MSG_PEEK)
            (gateway,) = system.actors("gateway")
            system.submit(gateway.stop()).result(PATIENCE_S)
            until(lambda: not kept(port, wire) and not kept(port, silent), "both are cut")
