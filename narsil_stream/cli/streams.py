"""Blocking reads and writes beside an event loop, and files that appear when they are whole."""

import asyncio
import os
import queue
import select
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from functools import partial
from io import FileIO
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

STANDARD = "-"
"""Names standard input or output."""


class Worker:
    """One thread that makes blocking calls, one after another.

    A call that never returns, such as a read from a silent pipe, holds up neither the event loop nor the exit.
    """

    def __init__(self, name: str) -> None:
        self._calls: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._work, name=name, daemon=True).start()

    async def run(self, call: Callable[[], T]) -> T:
        """What `call` returns or raises in the thread."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()

        def settle(set_outcome: Callable[[], None]) -> None:
            if not future.done():
                set_outcome()

        def made() -> None:
            try:
                outcome = partial(future.set_result, call())
            except Exception as error:
                outcome = partial(future.set_exception, error)
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(settle, outcome)

        self._calls.put(made)
        return await future

    async def iterate(self, items: Iterator[T]) -> AsyncIterator[T]:
        """`items`, each made in the thread when it is asked for."""
        while (item := await self.run(lambda: next(items, None))) is not None:
            yield item

    def _work(self) -> None:
        while True:
            self._calls.get()()


def open_input(name: str) -> FileIO:
    """Raises OSError. Unbuffered, so that a thread that waits in it holds no lock at exit."""
    if name != STANDARD:
        return Path(name).open("rb", buffering=0)
    os.set_blocking(sys.stdin.fileno(), True)
    return FileIO(sys.stdin.fileno(), closefd=False)


def read_some(descriptor: int, size: int) -> bytes:
    """Wait for data, then take what is there already, up to `size` bytes. Empty at the end."""
    parts = [os.read(descriptor, size)]
    left = size - len(parts[0])
    readable = select.poll()
    readable.register(descriptor, select.POLLIN)
    while parts[-1] and left and readable.poll(0):
        parts.append(os.read(descriptor, left))
        left -= len(parts[-1])
    return b"".join(parts)


class Output:
    """Where results go. A file has its name once it is whole; until then, or if it is never finished, it is NAME.part.

    So nobody takes a part for the whole, and what an earlier run wrote stays until the new file can take its place.
    Pipes, terminals and devices are written directly.
    """

    def __init__(self, name: str) -> None:
        """Raises OSError."""
        self._target = Path(name).resolve()
        self._part: Path | None = None
        if name == STANDARD:
            os.set_blocking(sys.stdout.fileno(), True)
            self._file = FileIO(sys.stdout.fileno(), "w", closefd=False)
            return
        if not self._target.exists() or self._target.is_file():
            self._part = self._target.with_name(self._target.name + ".part")
        path = self._part or self._target
        self._file = path.open("wb", buffering=0)
        self.shown = str(path)

    shown = "standard output"
    """For messages: where what was written is now."""

    def write(self, data: bytes) -> None:
        """Raises OSError, BrokenPipeError when nobody reads any more."""
        left = memoryview(data)
        try:
            while left:
                left = left[self._file.write(left) :]
        except OSError as error:
            raise OSError(error.errno, error.strerror, self.shown) from None

    def finish(self) -> None:
        """All is written: give the file its name."""
        if self._part is not None:
            os.fsync(self._file.fileno())
            self._part.replace(self._target)
        self._file.close()

    def discard(self) -> None:
        """Nothing was written: leave no empty file."""
        self._file.close()
        if self._part is not None:
            self._part.unlink(missing_ok=True)
