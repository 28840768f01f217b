"""nats-py's client with a short way for messages: out in one write for a turn of the event loop, in from the socket
straight to who takes them.

Connecting, logins, TLS, reconnecting, pings and subscriptions stay nats-py's own, and so does all over a WebSocket.
"""

import asyncio
import logging
import ssl
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import ParseResult

from nats.aio.client import Client as NatsClient
from nats.aio.transport import TcpTransport

from narsil_stream.core.parser import HMSG, LINE_BYTES, MSG

log = logging.getLogger(__name__)

Headers = dict[str, str] | None
Take = Callable[[bytes, bytes, bytes, Headers], None]
"""Is given a message's subject, reply subject, payload and headers. Raises UnicodeDecodeError for no text alone."""


class Connection(NatsClient):  # type: ignore[misc]  # it has no types
    _transport: Any
    _pending: list[bytes]
    _pending_data_size: int

    def __init__(self) -> None:
        super().__init__()
        self.takers: dict[bytes, Take] = {}
        """By the number of their subscription, as the server spells it."""
        self.unreadable = 0
        """Messages that were dropped because their subject is no text."""
        self.unsent = 0
        """Messages that met a connection that was breaking."""
        self._frames: list[bytes] = []
        self._frames_bytes = 0
        self._writing = False
        self._sending: asyncio.Task[None] | None = None

    # Out

    @property
    def waiting_bytes(self) -> int:
        """What the socket has not taken yet."""
        stream = self._stream
        return self._frames_bytes + (stream.get_write_buffer_size() if stream is not None else 0)

    def send(self, head: bytes, payload: bytes) -> None:
        """Queue a message in the order of calls. It leaves at the end of this turn, with all others of the turn."""
        self._frames += (head, payload, b"\r\n")
        self._frames_bytes += len(payload)
        if not self._writing:
            self._writing = True
            asyncio.get_running_loop().call_soon(self.write)

    def write(self) -> None:
        """Let go of what is queued; nothing of it is kept for another connection."""
        self._writing = False
        frames, self._frames, self._frames_bytes = self._frames, [], 0
        if not frames:
            return
        stream = self._stream
        if not self.is_connected or (stream is not None and stream.is_closing()):
            self.unsent += len(frames) // 3
            return
        self._pending += frames  # behind subscriptions that nats-py has not written yet
        self._pending_data_size += sum(map(len, frames))
        if stream is None:
            self._sending = asyncio.get_running_loop().create_task(self._flush_pending())
            return
        pending, self._pending, self._pending_data_size = self._pending, [], 0
        stream.writelines(pending)

    def forget(self) -> None:
        """What is queued is not to be sent any more."""
        self._frames, self._frames_bytes = [], 0

    def cut(self) -> None:
        """End the connection at once: a polite end waits until what was written is taken."""
        self.forget()
        self._pending, self._pending_data_size = [], 0
        if (stream := self._stream) is not None:
            stream.abort()

    @property
    def _stream(self) -> Any:
        """An `asyncio.WriteTransport`; None over a WebSocket, and before there is a connection."""
        writer = getattr(self._transport, "_io_writer", None)
        return None if writer is None else writer.transport

    async def _send_ping(self, future: asyncio.Future[bool] | None = None) -> None:
        """nats-py writes a ping past the commands that wait for its flusher: the pong would confirm none of them."""
        if future is not None:
            self.write()
            await self._flush_pending(force_flush=True)
        await super()._send_ping(future)

    async def _process_op_err(self, error: Exception) -> None:
        """nats-py would wait for a server that has stopped reading before it looks for another one."""
        if self.is_connected and (stream := self._stream) is not None:
            stream.abort()
        await super()._process_op_err(error)

    # In

    async def _connect_to_server(self, server: Any) -> None:
        if server.uri.scheme in ("ws", "wss"):
            await super()._connect_to_server(server)
            return
        server.last_attempt = time.monotonic()
        if not self._transport:
            self._transport = _Tcp(self)
        await self._transport.connect(server.uri, LINE_BYTES, self.options["connect_timeout"])

    def take(self, sid: bytes, subject: bytes, reply: bytes, payload: bytes, headers: bytes) -> bool:
        """Whether somebody takes it."""
        taker = self.takers.get(sid)
        if taker is None:
            return False
        try:
            taker(subject, reply, payload, _read(headers) if headers else None)
        except UnicodeDecodeError as error:
            self.unreadable += 1
            log.warning("dropped a message on subject %r: %s", subject[:100], error)
        return True


class _Tcp(TcpTransport):  # type: ignore[misc]
    """nats-py's own, with a protocol that takes messages out before they reach its reader."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection = connection

    async def connect(self, uri: ParseResult, buffer_size: int, connect_timeout: int) -> None:
        loop = asyncio.get_running_loop()
        sieve = Sieve(asyncio.StreamReader(limit=buffer_size), self._connection)
        opening = loop.create_connection(lambda: sieve, uri.hostname or "", uri.port or 4222)
        stream, _ = await asyncio.wait_for(opening, connect_timeout)
        self._use(stream, sieve)
        self._bare_io_reader, self._bare_io_writer = self._io_reader, self._io_writer

    async def connect_tls(
        self, uri: str | ParseResult, ssl_context: ssl.SSLContext, buffer_size: int, connect_timeout: int
    ) -> None:
        loop = asyncio.get_running_loop()
        sieve = Sieve(asyncio.StreamReader(limit=buffer_size), self._connection)
        name = uri if isinstance(uri, str) else uri.hostname
        starting = loop.start_tls(self._io_writer.transport, sieve, ssl_context, server_hostname=name)
        self._use(await asyncio.wait_for(starting, connect_timeout), sieve)

    def _use(self, stream: Any, sieve: "Sieve") -> None:
        self._io_reader = sieve.reader
        self._io_writer = asyncio.StreamWriter(stream, sieve, sieve.reader, asyncio.get_running_loop())


class Sieve(asyncio.StreamReaderProtocol):
    """Hands messages to who takes them; the reader gets the rest of what the server says, whole lines and frames."""

    def __init__(self, reader: asyncio.StreamReader, connection: Connection) -> None:
        super().__init__(reader)
        self.reader = reader
        self._take = connection.take
        self._parts: list[bytes] = []
        self._size = 0
        self._needed = 0
        """Bytes before there is anything whole in the parts."""

    def data_received(self, data: bytes) -> None:
        if self._parts:
            self._parts.append(data)
            self._size += len(data)
            if self._size < self._needed:
                return
            data, self._parts = b"".join(self._parts), []
        at = self._sift(data)
        if at < len(data):
            self._parts, self._size = [data[at:]], len(data) - at

    def _sift(self, data: bytes) -> int:
        """How far it came. Work is bounded by what one read of the socket holds."""
        size, at, self._needed = len(data), 0, 0
        while at < size:
            if found := MSG.match(data, at):
                subject, sid, reply, total = found.groups()
                start = payload_at = found.end()
            elif found := HMSG.match(data, at):
                subject, sid, reply, headers, total = found.groups()
                start = found.end()
                payload_at = start + int(headers)
            else:
                end = data.find(b"\r\n", at) + 2
                if end < 2:
                    if size - at <= LINE_BYTES:
                        break
                    end = size  # the reader says what is wrong with it
                super().data_received(data[at:end])
                at = end
                continue
            stop = start + int(total)
            if size < stop + 2:
                self._needed = stop + 2 - at
                break
            if not self._take(sid, subject, reply or b"", data[payload_at:stop], data[start:payload_at]):
                super().data_received(data[at : stop + 2])
            at = stop + 2
        return at


def _read(headers: bytes) -> dict[str, str]:
    """As nats-py gives them: the server's own status, e.g. 503 for nobody who listens, as if it were headers."""
    first, _, rest = headers.partition(b"\r\n")
    status, _, description = first.decode(errors="replace").partition(" ")[2].strip().partition(" ")
    said = {"Status": status, "Description": description}
    read: dict[str, str] = NatsClient._parse_header_lines(rest)
    return {name: value for name, value in said.items() if value} | read
