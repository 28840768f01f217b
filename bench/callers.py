"""Connections of a load generator: each asks and says when the answer is there, with as little work as it can."""

import asyncio
import contextlib
import functools
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

from narsil_stream.bench.questions import Question

CONNECT_S = 30.0

Done = Callable[[bytes | None], None]
"""Takes the answer's body, None for an error."""


class Caller(Protocol):
    async def open(self) -> None:
        """Raises TimeoutError, which says what did not answer."""

    def ask(self, which: int, done: Done) -> None:
        """Ask question number `which`. What comes while no connection is free waits here."""

    def close(self) -> None: ...


class HttpCaller:
    """Keep-alive connections, one request at a time on each. One that the server closes is opened anew."""

    def __init__(self, port: int, questions: list[Question], connections: int) -> None:
        self._port = port
        self._requests = [http_request(one) for one in questions]
        self._count = connections
        self._free: list[_Connection] = []
        self._waiting: deque[tuple[int, Done]] = deque()
        self._opening: set[asyncio.Task[None]] = set()
        self._closed = False

    async def open(self) -> None:
        for _ in range(self._count):
            await self._connect()

    async def _connect(self) -> None:
        connect = functools.partial(asyncio.get_running_loop().create_connection, host="127.0.0.1", port=self._port)
        async with within(CONNECT_S, f"HTTP server on port {self._port}"):
            _, connection = await _again(functools.partial(connect, lambda: _Connection(self._freed, self._lost)))
        self._freed(connection)

    def _lost(self, connection: "_Connection") -> None:
        if self._closed:
            return
        if connection in self._free:
            self._free.remove(connection)
        task = asyncio.ensure_future(self._connect())
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    def ask(self, which: int, done: Done) -> None:
        if self._free:
            self._free.pop().send(self._requests[which], done)
        else:
            self._waiting.append((which, done))

    def _freed(self, connection: "_Connection") -> None:
        if self._waiting:
            which, done = self._waiting.popleft()
            connection.send(self._requests[which], done)
        else:
            self._free.append(connection)

    def close(self) -> None:
        self._closed = True
        for task in self._opening:
            task.cancel()
        for connection in self._free:
            connection.close()


class _Connection(asyncio.Protocol):
    def __init__(self, freed: Callable[["_Connection"], None], lost: Callable[["_Connection"], None]) -> None:
        self._freed = freed
        self._lost = lost
        self._done: Done | None = None
        self._buffer = b""
        self._needed = 0
        """Bytes of head and body; 0 until the head is there."""
        self._body_at = 0

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def send(self, request: bytes, done: Done) -> None:
        self._done = done
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        buffer = self._buffer = self._buffer + data if self._buffer else data
        if not self._needed:
            end = buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            self._body_at = end + 4
            length = content_length(buffer[:end])
            if length < 0:
                self._transport.abort()
                return
            self._needed = self._body_at + length
        if len(buffer) < self._needed:
            return
        body = buffer[self._body_at : self._needed] if buffer.startswith(b"HTTP/1.1 200") else None
        self._buffer, self._needed = b"", 0
        self._answer(body)
        self._freed(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._lost(self)
        self._answer(None)

    def _answer(self, body: bytes | None) -> None:
        done, self._done = self._done, None
        if done is not None:
            done(body)

    def close(self) -> None:
        self._transport.close()


def http_request(one: Question) -> bytes:
    headers = {"host": "bench"} | one.headers | {"content-length": str(len(one.body))}
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"POST {one.path} HTTP/1.1\r\n{lines}\r\n".encode() + one.body


def content_length(head: bytes) -> int:
    """-1 where it is not said: no server under test answers so, except with errors."""
    at = head.lower().find(b"\r\ncontent-length:")
    if at < 0:
        return -1
    return int(head[at + 17 :].split(b"\r\n", 1)[0])


class GrpcCaller:
    """One channel, as many calls in flight as are asked for."""

    def __init__(self, port: int, questions: list[Question], connections: int) -> None:
        self._port = port
        self._path = questions[0].path
        self._bodies = [one.body for one in questions]
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        from grpc import aio

        self._channel = aio.insecure_channel(f"127.0.0.1:{self._port}", [("grpc.use_local_subchannel_pool", 1)])
        self._infer = self._channel.unary_unary(self._path)
        async with within(CONNECT_S, f"gRPC server on port {self._port}"):
            await self._channel.channel_ready()

    def ask(self, which: int, done: Done) -> None:
        task = asyncio.ensure_future(self._one(self._bodies[which], done))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _one(self, body: bytes, done: Done) -> None:
        from grpc import RpcError

        try:
            answer = await self._infer(body, timeout=CONNECT_S)
        except RpcError:
            answer = None
        done(answer)

    def close(self) -> None:
        for task in self._tasks:
            task.cancel()


class NatsCaller:
    """A producer as its users write it: nats-py, one connection, one inbox for all answers."""

    def __init__(self, port: int, questions: list[Question], connections: int) -> None:
        self._port = port
        self._questions = questions
        self._asked: dict[str, Done] = {}
        self._number = 0
        self._publishing: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        self._nats = await nats_connection(f"nats://127.0.0.1:{self._port}", allow_reconnect=False)
        self._inbox = self._nats.new_inbox()
        await self._nats.subscribe(f"{self._inbox}.*", cb=self._on_answer, pending_msgs_limit=0, pending_bytes_limit=0)
        await self._nats.flush()

    def ask(self, which: int, done: Done) -> None:
        self._number += 1
        reply = f"{self._inbox}.{self._number}"
        self._asked[reply] = done
        one = self._questions[which]
        task = asyncio.ensure_future(self._nats.publish(one.path, one.body, reply))
        self._publishing.add(task)
        task.add_done_callback(self._publishing.discard)

    async def _on_answer(self, message: Any) -> None:
        done = self._asked.pop(message.subject, None)
        if done is not None:
            done(None if message.headers else message.data)

    def close(self) -> None:
        for task in self._publishing:
            task.cancel()


CALLERS: dict[str, Callable[[int, list[Question], int], Caller]] = {
    "http": HttpCaller,
    "grpc": GrpcCaller,
    "nats": NatsCaller,
}


@contextlib.asynccontextmanager
async def within(seconds: float, what: str) -> AsyncIterator[None]:
    """Bounds the block in time. Raises TimeoutError, which says what was not there by then."""
    try:
        async with asyncio.timeout(seconds):
            yield
    except TimeoutError:
        raise TimeoutError(f"no {what} within {seconds:g} s") from None


async def nats_connection(url: str, **options: Any) -> Any:
    """nats-py's client, connected as soon as a server is there. Raises TimeoutError, which says what is not."""
    import nats

    async def quiet(error: Exception) -> None:
        """By itself it prints a traceback for each try."""

    patient = {"max_reconnect_attempts": -1, "reconnect_time_wait": 0.05, "error_cb": quiet}
    async with within(CONNECT_S, f"NATS server at {url}"):
        return await nats.connect(url, **(patient | options))


async def _again(connect: Callable[[], Any]) -> Any:
    """Tries until the server listens."""
    while True:
        try:
            return await connect()
        except OSError:
            await asyncio.sleep(0.02)
