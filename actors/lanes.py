"""Threads that compute: as many batches of a model at once as its backend takes, in the order in which they came."""

import threading
from collections import Counter, deque
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

MOST = 64
"""Threads. They start when they are needed."""


class Work(NamedTuple):
    model: Hashable
    lanes: int
    """Of its model: how much of its work may be under way."""
    do: Callable[[], None]
    """Does not raise."""


class Lanes:
    """At most `width` pieces of work are under way, and of each model at most its lanes; the rest waits."""

    def __init__(self, name: str) -> None:
        self._threads = ThreadPoolExecutor(MOST, thread_name_prefix=name)
        self._lock = threading.Lock()
        self._waiting: deque[Work] = deque()
        self._running: Counter[Hashable] = Counter()
        self._width = 1

    def put(self, work: Work) -> None:
        with self._lock:
            self._waiting.append(work)
            self._start()

    def claim(self, model: Hashable) -> bool:
        """Take a lane for work that the caller does itself, up to `release`, if nothing else is under way or waits."""
        with self._lock:
            free = not self._waiting and not self._running.total()
            self._running[model] += free
        return free

    def release(self, model: Hashable) -> None:
        with self._lock:
            self._running[model] -= 1
            self._start()

    def widen(self, width: int) -> None:
        """Or narrow: what is under way goes on."""
        with self._lock:
            self._width = min(width, MOST)
            self._start()

    def stop(self) -> None:
        """Drops what waits, and returns when what is under way has ended."""
        with self._lock:
            self._waiting.clear()
        self._threads.shutdown(wait=True)

    def _start(self) -> None:
        while (work := self._next()) is not None:
            self._threads.submit(self._work, work)

    def _work(self, work: Work | None) -> None:
        """In a thread: this, and what may follow it. No turn of the event loop lies between two batches."""
        while work is not None:
            work.do()
            with self._lock:
                self._running[work.model] -= 1
                work = self._next()

    def _next(self) -> Work | None:
        """What may begin now counts as begun."""
        if self._running.total() >= self._width:
            return None
        for work in self._waiting:
            if self._running[work.model] < work.lanes:
                self._waiting.remove(work)
                self._running[work.model] += 1
                return work
        return None
