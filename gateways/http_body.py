"""Request bodies as they come in: bounded in size, in time and in what all of them together may hold."""

import asyncio
import contextlib
from http import HTTPStatus
from typing import Self

from granian.rsgi import HTTPProtocol, ProtocolClosed, ProtocolError, Scope

from narsil_stream.core.config.schema import HttpConfig
from narsil_stream.gateways.http1_exchange import Exchange
from narsil_stream.gateways.http_codec import ENCODINGS, JSON_BYTES, inflated
from narsil_stream.schemas.errors import Fault, Refused

HELD_BYTES = 512 << 20
"""Bytes of bodies that one gateway process holds at the same time, counted as they come in."""
SMALL_BYTES = 64 << 10
"""A body that is declared to be no larger is awaited in one piece, and counted at once."""
DISCARD_BYTES, DISCARD_S = 1 << 20, 1.0
"""Of a body that nobody will read: so much of it is taken in, and for so long."""
WATCH_AFTER_S = 0.01
"""Whether a caller is still there is asked only when its answer takes longer than this: asking costs 8 µs."""


class Problem(Exception):
    """What only HTTP knows: 404 of a path, 405, 408, 415."""

    def __init__(self, status: HTTPStatus, detail: str, *headers: tuple[str, str]) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = headers


class Held:
    """What one request holds of the gateway's memory: `with bodies.held() as held`."""

    def __init__(self, bodies: "Bodies") -> None:
        self._bodies = bodies
        self._bytes = 0

    def take(self, count: int) -> None:
        """Raises `Refused` OVERLOADED."""
        if self._bodies.held_bytes + count > self._bodies.most_bytes:
            raise Refused(Fault.OVERLOADED, "too many large bodies are here at once", 100_000)
        self._bodies.held_bytes += count
        self._bytes += count

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._bodies.held_bytes -= self._bytes


class Bodies:
    """Reads the bodies of one gateway."""

    def __init__(self, config: HttpConfig) -> None:
        self._config = config
        self.most_bytes = max(HELD_BYTES, 2 * config.max_body_bytes)
        self.held_bytes = 0

    def held(self) -> Held:
        return Held(self)

    async def read(self, scope: Scope, proto: HTTPProtocol, held: Held, inflated_bytes: int = JSON_BYTES) -> bytes:
        """Without its content-encoding, of which at most `inflated_bytes` may come out.

        Raises `Refused` TOO_LARGE, OVERLOADED or INVALID_ARGUMENT; Problem 408 or 415.
        """
        headers = scope.headers
        encoding = headers.get("content-encoding", "").strip().lower()
        if encoding not in ("", "identity", *ENCODINGS):
            detail = f"content-encoding {encoding[:40]!r} is not known here; use {' or '.join(ENCODINGS)}"
            raise Problem(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, detail, ("accept-encoding", ", ".join(ENCODINGS)))
        body = await self._in_time(headers.get("content-length", ""), proto, held)
        if encoding not in ENCODINGS:
            return body
        whole = await inflated(body, encoding, min(inflated_bytes, self._config.max_body_bytes))
        held.take(len(whole))
        return whole

    async def _in_time(self, declared: str, proto: HTTPProtocol, held: Held) -> bytes:
        limit = self._config.max_body_bytes
        length = int(declared) if declared.isdigit() else None
        if length is not None and length > limit:
            raise Refused(Fault.TOO_LARGE, f"a body of {declared} bytes; expected at most {limit}")
        if isinstance(proto, Exchange) and proto.complete and length is not None:
            held.take(length)
            return await proto()
        try:
            async with asyncio.timeout(self._config.body_timeout_ms / 1e3):
                if length is None or length > SMALL_BYTES:
                    return await _chunks(proto, limit, held)
                held.take(length)
                return bytes(await proto())
        except TimeoutError:
            detail = f"the body did not come within {self._config.body_timeout_ms} ms"
            raise Problem(HTTPStatus.REQUEST_TIMEOUT, detail, ("connection", "close")) from None


async def _chunks(proto: HTTPProtocol, limit: int, held: Held) -> bytes:
    """Counted as they come: who declares much and sends little takes nothing from others."""
    chunks, size = [], 0
    async for chunk in proto:
        held.take(len(chunk))
        chunks.append(chunk)
        size += len(chunk)
        if size > limit:
            raise Refused(Fault.TOO_LARGE, f"a body of more than {limit} bytes")
    return b"".join(chunks)


async def discard(scope: Scope, proto: HTTPProtocol) -> None:
    """Lets a body come that nobody will read, within bounds, so that the answer does not overtake it.

    After such an answer the connection is closed, or over HTTP/2 the stream reset, and clients that are still sending
    then show that and not the answer: curl does. Who asks first whether to send (Expect) sends nothing.
    """
    left = DISCARD_BYTES
    if "expect" in scope.headers:
        return
    with contextlib.suppress(ProtocolError, ProtocolClosed, TimeoutError):  # ProtocolError: it has been read
        async with asyncio.timeout(DISCARD_S):
            async for chunk in proto:
                left -= len(chunk)
                if left < 0:
                    return


class WhileThere:
    """`with WhileThere(proto) as caller`: from `watch` on, the block is cancelled when the caller leaves.

    `caller.left` is true then.
    """

    def __init__(self, proto: HTTPProtocol) -> None:
        self._proto = proto
        self._timer: asyncio.TimerHandle | None = None
        self._gone: asyncio.Future[None] | None = None
        self.left = False

    def __enter__(self) -> Self:
        self._task = self._proto.task if isinstance(self._proto, Exchange) else asyncio.current_task()
        return self

    def watch(self) -> None:
        """The body is there: from now on the caller only waits."""
        if isinstance(self._proto, Exchange):
            self._proto.when_left(self._leave)
            return
        self._timer = asyncio.get_running_loop().call_later(WATCH_AFTER_S, self._watch)

    def __exit__(self, *error: object) -> None:
        if isinstance(self._proto, Exchange):
            self._proto.when_left(None)
        if self._timer is not None:
            self._timer.cancel()
        if self._gone is not None:
            self._gone.remove_done_callback(self._leave)
            self._gone.cancel()

    def _watch(self) -> None:
        self._gone = asyncio.ensure_future(self._proto.client_disconnect())
        self._gone.add_done_callback(self._leave)

    def _leave(self, _: asyncio.Future[None] | None = None) -> None:
        if self._task is not None:
            self.left = self._task.cancel()
