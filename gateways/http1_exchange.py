"""One HTTP/1.1 request and its answer, in the form of granian's RSGI: what handlers know of a caller."""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Self

from granian.rsgi import ProtocolClosed, ProtocolError

if TYPE_CHECKING:
    from narsil_stream.gateways.http1 import Connection

AHEAD_BYTES = 64 << 10
"""Of a body that nobody reads yet: more waits in the socket."""
IDLE_S = 75.0
"""A connection is kept for so long between two requests, and with a caller who takes nothing of its answer."""

Headers = list[tuple[str, str]]


class Scope:
    """What a request says before its body. Of a header that is there twice, the first; none that is not ASCII."""

    __slots__ = ("headers", "http_version", "method", "path")

    def __init__(self) -> None:
        self.method = ""
        self.path = ""
        self.http_version = ""
        self.headers: dict[str, str] = {}


class Exchange:
    """One request and its answer, as RSGI's HTTPProtocol."""

    __slots__ = (
        "_chunks", "_connection", "_left", "_size", "_waiter", "answered", "begun", "complete", "gone", "keep",
        "scope", "taken", "task",
    )  # fmt: skip
    task: asyncio.Task[None]
    """The handler's."""

    def __init__(self, connection: "Connection", scope: Scope) -> None:
        self.scope = scope
        self.complete = False
        """The whole body is here."""
        self.taken = False
        """The body was read to its end."""
        self.answered = False
        self.begun = False
        """Its handler was called."""
        self.gone = False
        """Nobody waits for the answer any more."""
        self.keep = False
        """The connection may live on."""
        self._connection = connection
        self._chunks: list[bytes] = []
        self._size = 0
        self._waiter: asyncio.Future[None] | None = None
        self._left: Callable[[], None] | None = None

    # For the handler

    async def __call__(self) -> bytes:
        """The whole body. Raises ProtocolClosed when the caller leaves, ProtocolError when it was read before."""
        if self.taken:
            raise ProtocolError
        while not self.complete:
            await self._more()
        self.taken = True
        return self._take()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        while not self._chunks:
            if self.complete:
                self.taken = True
                raise StopAsyncIteration
            await self._more()
        return self._take()

    def when_left(self, call: Callable[[], None] | None) -> None:
        """`call` is called when the caller leaves before its answer; at once if it has. None: no more."""
        self._left = call
        if call is not None and self.gone:
            call()

    def response_bytes(self, status: int, headers: Headers, body: bytes) -> None:
        self.answered = True
        self._connection.answer(self, status, headers, body)

    # For the connection

    def feed(self, data: bytes) -> bool:
        """Whether to wait with more until this is read."""
        self._chunks.append(data)
        self._size += len(data)
        if self._waiter is None:
            return self._size > AHEAD_BYTES
        self.wake()
        return False

    def wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def leave(self) -> None:
        self.gone = True
        self.wake()
        if self._left is not None:
            self._left()

    async def _more(self) -> None:
        """Until something of the body comes."""
        if self.gone:
            raise ProtocolClosed
        self._connection.want(self)
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _take(self) -> bytes:
        chunks, self._chunks, self._size = self._chunks, [], 0
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)
