"""One ModelStreamInfer call: many requests at a time on one stream, answered as they finish."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias

from grpc import aio

Context: TypeAlias = "aio.ServicerContext[Any, Any]"
"""gRPC's own of one call."""

STREAM_OPEN = 256
"""Requests of one stream that are worked on at a time; more wait in the connection."""


class InferStream:
    """`run` ends when the caller has sent its last request and has every answer; cancelling it withdraws what is open.

    `answered` gives the answer to a request, both as bytes; it raises nothing.
    """

    def __init__(self, context: Context, answered: Callable[[bytes], Awaitable[bytes]]) -> None:
        self._context = context
        self._answered = answered
        self._room = asyncio.Semaphore(STREAM_OPEN)
        self._writing = asyncio.Lock()
        self._reading: asyncio.Task[None] | None = None
        self.cut = False
        """It was ended from here, perhaps before the caller's last request was read."""

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            self._reading = group.create_task(self._read(group))

    def end(self) -> None:
        """Read no more; what was read is answered."""
        if self._reading is not None:
            self.cut |= self._reading.cancel()

    async def _read(self, group: asyncio.TaskGroup) -> None:
        while (data := await self._context.read()) is not aio.EOF:
            await self._room.acquire()
            group.create_task(self._answer(data))

    async def _answer(self, data: bytes) -> None:
        try:
            answer = await self._answered(data)
            async with self._writing:  # gRPC takes one message of a stream at a time
                await self._context.write(answer)
        finally:
            self._room.release()
