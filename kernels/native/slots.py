"""Who uses which slot of an engine: threads that each need one, or several for a long batch."""

import heapq
import threading
from typing import Generic, Protocol, TypeVar


class Numbered(Protocol):
    index: int
    lane: int


S = TypeVar("S", bound=Numbered)


class Pool(Generic[S]):
    """Slots that are free."""

    def __init__(self, slots: list[S], lanes: int) -> None:
        """`slots` by rising index."""
        self._free = [[(slot.index, slot) for slot in slots[lane::lanes]] for lane in range(lanes)]
        """Of each lane a heap."""
        self._used = [0] * lanes
        self._count = len(slots)
        """Free ones."""
        self.changed = threading.Condition()
        self.waiting = 0
        """Threads that want a slot, and hold none."""

    def take(self, *, wait: bool) -> S | None:
        """The first free slot of the lane with the least to do.

        None: there is none, or others wait for it; never with `wait`. Only who holds no slot may wait, so that those
        who do can go on.
        """
        with self.changed:
            if not wait and self._count <= self.waiting:
                return None
            while not self._count:
                self.waiting += 1
                self.changed.wait()
                self.waiting -= 1
            _, lane = min((used, lane) for lane, used in enumerate(self._used) if self._free[lane])
            self._used[lane] += 1
            self._count -= 1
            return heapq.heappop(self._free[lane])[1]

    def give_back(self, slot: S) -> None:
        with self.changed:
            self._used[slot.lane] -= 1
            self._count += 1
            heapq.heappush(self._free[slot.lane], (slot.index, slot))
            if self.waiting:
                self.changed.notify()
