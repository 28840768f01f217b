"""HTTP/1.1 in the gateway's own event loop: httptools (Node's llhttp) takes requests apart, handlers see them as RSGI.

granian does both in threads of its own, and each request crosses between them twice: three times the processor time of
this for a small request (docs/decisions.md). It keeps TLS and HTTP/2: a connection that begins with HTTP/2's preface is
handed on to it, byte by byte.
"""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

import httptools

from narsil_stream.gateways.http1_exchange import AHEAD_BYTES, IDLE_S, Exchange, Headers, Scope
from narsil_stream.gateways.http1_head import head, length_of, path_of, problem, too_large
from narsil_stream.gateways.http1_relay import relay
from narsil_stream.gateways.http_body import Problem
from narsil_stream.gateways.http_verbs import error as told

log = logging.getLogger(__name__)

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
LAST_WORDS_S = 1.0
"""At the end, for answers on their way to the socket."""

Handler = Callable[[Scope, Exchange], Awaitable[None]]


class Connection(asyncio.Protocol):
    """One caller's: its requests are answered one after the other, in order."""

    def __init__(self, server: "Http1Server") -> None:
        self._server = server
        self._parser = httptools.HttpRequestParser(self)
        self._scope = Scope()
        self._url = b""
        self._head_bytes = 0
        self._header_bytes = 0
        """Of one request's names and values, also of those that are left out."""
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
        self._refusal: Problem | None = None
        """Told when all before it is answered."""
        self._unread = 0
        """Bytes of answers that were not taken when it was last looked at."""
        self.gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
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
        self._server.connections.discard(self)
        self.gone.set_result(None)
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
            self._refuse(problem(error))
            return
        most = self._server.head_bytes
        if self._beside_bytes > most + AHEAD_BYTES:
            self._refuse(too_large(f"trailers, or what stands beside chunks, expected at most {most} bytes"))
        elif self._in_head and self._head_bytes > most:
            self._refuse(too_large(f"a request's head; expected at most {most} bytes"))

    # What the parser says

    def on_message_begin(self) -> None:
        self._scope, self._url, self._header_bytes = Scope(), b"", 0

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            return  # a trailer
        self._header_bytes += len(name) + len(value)
        if value.isascii():
            self._scope.headers.setdefault(name.decode("latin-1").lower(), value.decode("latin-1").strip())

    def on_headers_complete(self) -> None:
        parser, scope = self._parser, self._scope
        headers = scope.headers
        size = len(self._url) + self._header_bytes
        if size > self._server.head_bytes:
            raise too_large(f"a head of {size} bytes; expected at most {self._server.head_bytes}")
        scope.method = parser.get_method().decode("latin-1")
        if scope.method == "CONNECT":
            raise Problem(HTTPStatus.BAD_REQUEST, "CONNECT is not possible: this is no proxy")
        scope.http_version = parser.get_http_version()
        scope.path = path_of(self._url)
        if parser.should_upgrade():
            self._unparsed = length_of(headers)
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
        if exchange.gone:
            return
        if not exchange.complete or ("connection", "close") in headers or self._server.closing:
            exchange.keep = False  # of a body that nobody wants, the rest would be taken for a request
        said = head(status, headers, len(body), exchange.keep, exchange.scope.http_version == "1.0")
        self._transport.write(said if exchange.scope.method == "HEAD" else said + body)

    def ended(self, exchange: Exchange) -> None:
        """Its handler is through with it."""
        if exchange.gone:
            return
        if not exchange.answered or not exchange.keep:
            self.close()
            return
        self._exchanges.popleft()
        self.fresh, self.since = False, asyncio.get_running_loop().time()
        self._next()

    # For the server

    @property
    def idle(self) -> bool:
        return not self._exchanges

    def close(self) -> None:
        """What is written still leaves, if it is taken."""
        self._ending, self.fresh, self.since = True, False, asyncio.get_running_loop().time()
        self._transport.close()

    def cut(self) -> None:
        self._transport.abort()

    def look(self, now: float, head_timeout_s: float) -> None:
        """Cut a caller who does not go on: with a head, with asking, or with taking what it is told."""
        unread = self._transport.get_write_buffer_size()
        if unread < self._unread:
            self.since = now
        self._unread = unread
        if self._exchanges and self._exchanges[0].begun and not self._transport.is_closing():
            return  # it waits for us
        if now - self.since > (head_timeout_s if self.fresh and self.idle else IDLE_S):
            self.cut()

    def _next(self) -> None:
        if self._clogged:
            return
        if self._exchanges:
            self._begin_first()
        elif self._ending:
            if self._refusal is not None:
                reply = told(self._refusal.status, self._refusal.detail)
                self._transport.write(head(reply.status, reply.headers, len(reply.body), False, False) + reply.body)
            self.close()
        if len(self._exchanges) < 2:
            self._resume()

    def _refuse(self, reason: Problem) -> None:
        """What cannot be read. All before it is answered first; behind it nothing can be read either."""
        self._ending, self._refusal = True, reason
        coming, self._coming = self._coming, None
        if coming is not None:  # in the middle of its body
            self._exchanges.remove(coming)
            coming.leave()
        self._next()

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
        """What is answered may still leave; cut what is left then."""
        self.stop()
        self._waiting.clear()
        if leaving := {connection.gone for connection in self.connections} | self._tasks:
            await asyncio.wait(leaving, timeout=LAST_WORDS_S)
        for connection in list(self.connections):
            connection.cut()
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
        """Nobody is waited for for ever."""
        loop = asyncio.get_running_loop()
        for connection in list(self.connections):
            connection.look(loop.time(), self._head_timeout_s)
        self._sweep = loop.call_later(min(1.0, self._head_timeout_s / 4), self._look)

    def hand_on(self, transport: Any, begun: bytes) -> None:
        task = asyncio.get_running_loop().create_task(relay(transport, begun, self._http2_path))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        transport.pause_reading()  # until somebody listens
