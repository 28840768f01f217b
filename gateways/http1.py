"""HTTP/1.1 in the gateway's own event loop: httptools (Node's llhttp) takes requests apart, handlers see them as RSGI.

granian does both in threads of its own, and each request crosses between them twice: three times the processor time of
this for a small request (docs/decisions.md). It keeps TLS and HTTP/2: a connection that begins with HTTP/2's preface is
handed on to it, byte by byte.
"""

import asyncio
import contextlib
import functools
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote

import httptools

from narsil_stream.gateways.http1_exchange import AHEAD_BYTES, Exchange, Headers, Scope

log = logging.getLogger(__name__)

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
IDLE_S = 75.0
"""A connection between two requests is kept open for so long."""
REASONS = {status.value: status.phrase for status in HTTPStatus}

Handler = Callable[[Scope, Exchange], Awaitable[None]]


class Connection(asyncio.Protocol):
    """One caller's: its requests are answered one after the other, in order."""

    def __init__(self, server: "Http1Server") -> None:
        self._server = server
        self._parser = httptools.HttpRequestParser(self)
        self._scope = Scope()
        self._url = b""
        self._head_bytes = 0
        self._unparsed = 0
        """Of a body that the parser leaves out, because its request also asks for another protocol."""
        self._beside_bytes = 0
        """Since the last piece of a body: of trailers and chunks' extensions, which the parser keeps."""
        self._in_head = True
        self._coming: Exchange | None = None
        """Whose body comes in."""
        self._exchanges: deque[Exchange] = deque()
        """The first one is being answered."""
        self._begun = b""
        self._paused = self._clogged = self._ending = False
        self.lost = False
        self.since = asyncio.get_running_loop().time()
        """When it began to wait for what it waits for."""
        self.fresh = True
        """Nothing was asked on it yet, or a head has begun to come."""

    # asyncio.Protocol

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._server.connections.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        """Also when the caller closes only its side: nobody can tell that from leaving."""
        self.lost = True
        self._server.connections.discard(self)
        for exchange in self._exchanges:
            exchange.leave()

    def pause_writing(self) -> None:
        self._clogged = True

    def resume_writing(self) -> None:
        self._clogged = False
        self._next()

    def data_received(self, data: bytes) -> None:
        if self._unparsed:
            self._feed_unparsed(data)
            return
        if self._ending:
            return
        if self._begun or (self.fresh and data.startswith(PREFACE[: len(data)])):
            self._begun += data
            if self._begun.startswith(PREFACE):
                self._hand_on()
                return
            if PREFACE.startswith(self._begun):
                return
            data, self._begun = self._begun, b""
        if self._in_head:
            if not self._exchanges and not self.fresh:
                self.fresh, self.since = True, asyncio.get_running_loop().time()
            self._head_bytes += len(data)
        else:
            self._beside_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._ending = True  # to nothing that is spoken here: the request itself is answered, and it is the last
            self._feed_unparsed(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            refused = isinstance(error, httptools.HttpParserCallbackError)
            self._refuse(431 if refused else 400)
            return
        if self._beside_bytes > self._server.head_bytes + AHEAD_BYTES or (
            self._in_head and self._head_bytes > self._server.head_bytes
        ):
            self._refuse(431)

    # What the parser says

    def on_message_begin(self) -> None:
        self._scope, self._url = Scope(), b""

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            return  # a trailer
        if value.isascii():
            self._scope.headers.setdefault(name.decode("latin-1").lower(), value.decode("latin-1").strip())

    def on_headers_complete(self) -> None:
        parser, scope = self._parser, self._scope
        headers = scope.headers
        size = len(self._url) + sum(map(len, headers)) + sum(map(len, headers.values()))
        if size > self._server.head_bytes:
            raise ValueError("the head is too large")
        scope.method = parser.get_method().decode("latin-1")
        scope.http_version = parser.get_http_version()
        scope.path = _path(self._url)
        if parser.should_upgrade():
            self._unparsed = _length(headers)
        self._in_head = False
        exchange = self._coming = Exchange(self, scope)
        exchange.keep = parser.should_keep_alive() and not parser.should_upgrade()
        self._exchanges.append(exchange)
        self._begin_first()

    def _begin_first(self) -> None:
        """Once each, in order, and not while answers are not taken."""
        if self._exchanges and not self._clogged and not self._exchanges[0].begun:
            self._exchanges[0].begun = True
            self._server.begin(self, self._exchanges[0])

    def on_body(self, data: bytes) -> None:
        self._beside_bytes = 0
        if self._coming is not None and self._coming.feed(data):
            self._pause()

    def _feed_unparsed(self, data: bytes) -> None:
        if not self._unparsed:
            return
        piece = data[: self._unparsed]
        self._unparsed -= len(piece)
        self.on_body(piece)
        if not self._unparsed:
            self.on_message_complete()

    def on_message_complete(self) -> None:
        if self._unparsed:
            return
        exchange, self._coming = self._coming, None
        self._in_head, self._head_bytes, self._beside_bytes = True, 0, 0
        if exchange is not None:
            exchange.complete = True
            exchange.wake()
        if len(self._exchanges) > 1:
            self._pause()  # answers come in order, so more questions can wait

    # For exchanges

    def want(self, exchange: Exchange) -> None:
        """Its handler waits for the body."""
        if "expect" in exchange.scope.headers and not exchange.answered:
            del exchange.scope.headers["expect"]
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._resume()

    def answer(self, exchange: Exchange, status: int, headers: Headers, body: bytes) -> None:
        if self.lost:
            return
        if not exchange.complete or ("connection", "close") in headers or self._server.closing:
            exchange.keep = False  # of a body that nobody wants, the rest would be taken for a request
        said = _head(status, tuple(headers), exchange.keep, exchange.scope.http_version == "1.0", round(time.time()))
        head = b"%bcontent-length: %d\r\n\r\n" % (said, len(body))
        self._transport.write(head if exchange.scope.method == "HEAD" else head + body)

    def ended(self, exchange: Exchange) -> None:
        """Its handler is through with it."""
        if self.lost:
            return
        if not exchange.answered or not exchange.keep:
            self.close()
            return
        self._exchanges.popleft()
        self.fresh, self.since = False, asyncio.get_running_loop().time()
        self._next()

    def close(self) -> None:
        """What is written still leaves."""
        self._ending = True
        self._transport.close()

    @property
    def idle(self) -> bool:
        return not self._exchanges

    def _next(self) -> None:
        if self._clogged or self.lost:
            return
        if self._exchanges:
            self._begin_first()
        elif self._ending:
            self._transport.close()
        if len(self._exchanges) < 2:
            self._resume()

    def _refuse(self, status: int) -> None:
        """What cannot be read: nothing on this connection can be, from here on."""
        self._ending = True
        if not self._exchanges:
            self._transport.write(_head(status, (), False, False, round(time.time())) + b"content-length: 0\r\n\r\n")
            self._transport.close()
        elif self._coming is not None:  # in the middle of its body
            self._transport.abort()
        else:
            self._exchanges[-1].keep = False

    def _pause(self) -> None:
        if not self._paused:
            self._paused = True
            self._transport.pause_reading()

    def _resume(self) -> None:
        if self._paused and (self._unparsed or not self._ending):
            self._paused = False
            self._transport.resume_reading()

    def _hand_on(self) -> None:
        self._server.connections.discard(self)
        self._server.hand_on(self._transport, self._begun)


class Http1Server:
    """Listens, keeps time, and bounds how much is worked on at once."""

    def __init__(
        self, handler: Handler, http2_path: str, head_bytes: int, head_timeout_s: float, parallel: int
    ) -> None:
        """`http2_path`: the Unix socket of a server that speaks HTTP/2. `head_bytes`: of a request before its body."""
        self._handler = handler
        self._http2_path = http2_path
        self.head_bytes = head_bytes
        self._head_timeout_s = head_timeout_s
        self._parallel = parallel
        self._open = 0
        self._waiting: deque[tuple[Connection, Exchange]] = deque()
        self.connections: set[Connection] = set()
        self.closing = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._sweep: asyncio.TimerHandle | None = None

    async def start(self, host: str, port: int, backlog: int) -> None:
        """Listens beside others that share the port. Raises OSError."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: Connection(self), host, port, backlog=backlog, reuse_port=True)
        self._look()

    def stop(self) -> None:
        """No new connection, and no further request on those that there are; what is open is still answered."""
        self.closing = True
        if self._sweep is not None:
            self._sweep.cancel()
        if self._server is not None:
            self._server.close()
        for connection in list(self.connections):
            if connection.idle:
                connection.close()

    async def end(self) -> None:
        """Cut what is left."""
        self.stop()
        for connection in list(self.connections):
            connection.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def begin(self, connection: Connection, exchange: Exchange) -> None:
        if self._open >= self._parallel:
            self._waiting.append((connection, exchange))
            return
        self._open += 1
        task = asyncio.get_running_loop().create_task(self._serve(connection, exchange))
        exchange.task = task
        self._tasks.add(task)

    async def _serve(self, connection: Connection, exchange: Exchange) -> None:
        try:
            await self._handler(exchange.scope, exchange)
        except Exception:
            log.exception("a request to %s failed", exchange.scope.path)
        finally:
            self._tasks.discard(exchange.task)
            self._open -= 1
            while self._waiting and self._open < self._parallel:
                self.begin(*self._waiting.popleft())
            connection.ended(exchange)

    def _look(self) -> None:
        """Who has begun a request and does not go on, or has not asked for long, is not waited for."""
        loop = asyncio.get_running_loop()
        now = loop.time()
        for connection in list(self.connections):
            if connection.idle and now - connection.since > (self._head_timeout_s if connection.fresh else IDLE_S):
                connection.close()
        self._sweep = loop.call_later(min(1.0, self._head_timeout_s / 4), self._look)

    def hand_on(self, transport: Any, begun: bytes) -> None:
        task = asyncio.get_running_loop().create_task(_relay(transport, begun, self._http2_path))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        transport.pause_reading()  # until somebody listens


async def _relay(transport: Any, begun: bytes, path: str) -> None:
    """Carry the bytes of a connection to a Unix socket and back, until one end closes."""
    try:
        reader, writer = await asyncio.open_unix_connection(path)
    except OSError as error:
        log.warning("HTTP/2 is not served: %s", error)
        transport.abort()
        return
    loop = asyncio.get_running_loop()
    outside = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(outside)
    protocol.connection_made(transport)
    transport.set_protocol(protocol)
    writer.write(begun)
    transport.resume_reading()
    back = asyncio.StreamWriter(transport, protocol, outside, loop)
    await asyncio.gather(_pump(outside, writer), _pump(reader, back))


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(AHEAD_BYTES):
            writer.write(data)
            await writer.drain()
    writer.close()


def _length(headers: dict[str, str]) -> int:
    """Of a body. Raises ValueError where only its chunks would say it."""
    if "transfer-encoding" in headers:
        raise ValueError("an upgrade with a body in chunks, which the parser would leave out")
    return int(headers.get("content-length", "0"))


def _path(url: bytes) -> str:
    """Decoded, without a query; the URL may name the host."""
    path = url.partition(b"?")[0] if url.startswith(b"/") else httptools.parse_url(url).path or b"/"
    text = path.decode("latin-1")
    return unquote(text) if "%" in text else text


@functools.lru_cache(maxsize=64)
def _head(status: int, headers: tuple[tuple[str, str], ...], keep: bool, old: bool, now: int) -> bytes:
    """All but the length. `now`: Unix time in seconds; `old`: to HTTP/1.0."""
    lines = [f"HTTP/1.1 {status} {REASONS.get(status, '')}", f"date: {formatdate(now, usegmt=True)}"]
    lines += [f"{name}: {value}" for name, value in headers if name != "connection"]
    if not keep:
        lines.append("connection: close")
    elif old:
        lines.append("connection: keep-alive")
    return "\r\n".join([*lines, ""]).encode("latin-1")
