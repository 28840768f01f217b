"""Memory for scores that is kept: a batch writes into what an earlier one wrote into, once nobody looks at that."""

import weakref
from collections import deque
from collections.abc import Callable

import numpy as np

from narsil_stream.kernels.backend import Floats

KEPT = 64
"""Arrays at most, in spite of bursts."""


class ScoreMemory:
    """Of one model. From any thread.

    Messages with scores are handed over by reference inside a process, and who gets one may keep a part of it for as
    long as it likes: memory comes back with the last reference to it, and not before.
    """

    def __init__(self, empty: Callable[[int], Floats], rows: int) -> None:
        """`empty`: the backend's; `rows`: of the longest batch that is expected."""
        self._empty = empty
        self._rows = rows
        self._free: deque[Floats] = deque(maxlen=KEPT)

    def take(self, rows: int) -> Floats:
        """At least [rows], of whatever content. It is the caller's until `lend`, or for good."""
        if rows > self._rows:
            return self._empty(rows)
        try:
            return self._free.pop()
        except IndexError:
            return self._empty(self._rows)

    def lend(self, memory: Floats, rows: int) -> memoryview:
        """The bytes of its first `rows` scores. Once nobody refers to them, nor to a part of them, it can be taken."""
        lent = memory[:rows].view(np.uint8)
        if memory.size == self._rows:
            weakref.finalize(lent, self._free.append, memory).atexit = False
        return lent.data
