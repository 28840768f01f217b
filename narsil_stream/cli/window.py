"""Many calls at a time, their results in the order of the questions. Knows nothing of files, models or brokers."""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class Window(Generic[T, R]):
    """One task puts items in, another takes results out. At most `size` items are between the two.

    An item counts until its result is taken, answered or not: what waits behind a slow one costs memory too.
    """

    def __init__(self, call: Callable[[T], Awaitable[R]], size: int) -> None:
        self._call = call
        self._room = asyncio.Semaphore(size)
        self._tasks: deque[asyncio.Task[R]] = deque()
        self._changed = asyncio.Event()
        self._closed = False

    async def put(self, item: T) -> None:
        """Start the call for `item`, as soon as there is room."""
        await self._room.acquire()
        self._tasks.append(asyncio.create_task(self._run(item)))
        self._changed.set()

    def close(self) -> None:
        """Nothing more is put in: `take` ends after the last result."""
        self._closed = True
        self._changed.set()

    async def take(self) -> list[R]:
        """Wait for the next result; all that are there in order. Empty after the last. Raises what a call raised."""
        while not self._tasks:
            if self._closed:
                return []
            self._changed.clear()
            await self._changed.wait()
        await asyncio.wait([self._tasks[0]])
        return self.take_ready()

    def take_ready(self) -> list[R]:
        """Without waiting: the results whose turn it is. Raises what a call raised, once all before it are taken."""
        results: list[R] = []
        while self._tasks and self._tasks[0].done():
            if results and (self._tasks[0].cancelled() or self._tasks[0].exception()):
                break
            results.append(self._tasks.popleft().result())
            self._room.release()
        return results

    async def cancel(self) -> None:
        """End what is open, and wait until it has ended."""
        tasks, self._tasks = list(self._tasks), deque()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, item: T) -> R:
        return await self._call(item)
