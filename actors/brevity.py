"""Which forward passes are over before a thread would have begun them. Pure; times in µs.

To wake a thread, and then the event loop again, takes 50 to 200 µs on virtual machines; a GPU is done with a hundred
rows in 50.
"""

from collections import deque
from statistics import median
from weakref import WeakKeyDictionary

from narsil_stream.kernels.backend import Backend

BRIEF_US = 150
"""The event loop may stand still for so long."""
SEEN = 5
"""Passes of a size that are remembered; fewer prove nothing."""


class Brevity:
    """The passes of each backend, by their size in powers of two."""

    def __init__(self) -> None:
        self._seen: WeakKeyDictionary[Backend, dict[int, deque[int]]] = WeakKeyDictionary()

    def observe(self, backend: Backend, rows: int, took_us: int) -> None:
        sizes = self._seen.setdefault(backend, {})
        sizes.setdefault(rows.bit_length(), deque(maxlen=SEEN)).append(took_us)

    def expected(self, backend: Backend, rows: int) -> bool:
        """Whether a pass of so many rows is brief, as the last ones were."""
        seen = self._seen.get(backend, {}).get(rows.bit_length(), ())
        return len(seen) == SEEN and median(seen) <= BRIEF_US
