"""Who may send a batch to an executor: its fixed number of slots, leased to batchers. Pure; times in µs.

More batchers never mean more slots. A slot changes hands under a new generation, so whoever still holds the old one
sends a batch that is turned away and sent again; no message has to arrive for that to be safe.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from narsil_stream.schemas.internal import Batch, BatcherBeat, Demand, Grant, Lease, Slot, Waiting

HOLD_US = 20_000
"""A batcher that said it has work and leaves its slot unused for so long has no use for it, or never heard of it."""


@dataclass(slots=True)
class Place:
    """One slot. `last` had it before and keeps it while nobody asks for it."""

    index: int
    generation: int = 0
    holder: str = ""
    last: str = ""
    busy: bool = False
    leased_us: int = 0

    @property
    def slot(self) -> Slot:
        return Slot(self.index, self.generation)


@dataclass(slots=True)
class Batcher:
    near: bool
    """In this process: no hop over the broker lies between."""
    seen_us: int
    paired: bool = False
    """It has an executor in its own process."""
    rows: int = 0
    due_us: int = 0
    """Earliest deadline of what waits there; of no meaning while `rows` is 0."""


class Ledger:
    """The slots of one executor."""

    def __init__(self, executor: str, slots: int, lease_us: int, near: Callable[[str], bool] = lambda _: False) -> None:
        """`near`: whether a batcher is in this process."""
        self._near = near
        self.executor = executor
        self.lease_us = lease_us
        self.places = [Place(index) for index in range(slots)]
        self.batchers: dict[str, Batcher] = {}
        self.open = True
        self._expired_us = 0

    def grow(self, slots: int) -> None:
        """To this many slots at least: who holds one keeps it."""
        self.places.extend(Place(index) for index in range(len(self.places), slots))

    def beat(self, beat: BatcherBeat, now_us: int) -> None:
        if beat.state == "gone":
            self._lose(beat.batcher)
            return
        self._hear(beat.batcher, beat.demand_rows, beat.slack_us, now_us)
        self.batchers[beat.batcher].paired = beat.paired

    def demand(self, demand: Demand, now_us: int) -> None:
        self._hear(demand.batcher, demand.rows, demand.slack_us, now_us)
        for slot in demand.returned:
            place = self._place(slot, demand.batcher)
            if place is not None:
                self._free(place)

    def _hear(self, batcher: str, rows: int, slack_us: int, now_us: int) -> None:
        known = self.batchers.get(batcher)
        if known is None:
            known = self.batchers[batcher] = Batcher(self._near(batcher), now_us)
        known.seen_us, known.rows, known.due_us = now_us, rows, now_us + slack_us

    def accept(self, batch: Batch, now_us: int) -> bool:
        """Whether the batch comes with a valid slot; the slot is then busy until `finish`."""
        self.demand(batch.demand, now_us)
        place = self._place(batch.slot, batch.batcher)
        if place is None or not self.open:
            return False
        place.busy = True
        return True

    def finish(self, slot: Slot) -> None:
        """The batch of this slot is computed."""
        place = self.places[slot.index]
        place.busy = False
        self._free(place)

    def expire(self, now_us: int) -> None:
        """Take back the slots of batchers that were not heard of for a lease. To be called several times in a lease:
        after a pause of our own, heartbeats that came meanwhile are given the time to be read."""
        pause_us, self._expired_us = now_us - self._expired_us, now_us
        if pause_us > self.lease_us // 2:
            for batcher in self.batchers.values():
                batcher.seen_us = max(batcher.seen_us, now_us - self.lease_us // 2)
        for name in [n for n, b in self.batchers.items() if b.seen_us + self.lease_us <= now_us]:
            self._lose(name)

    def close(self) -> None:
        """Take back what is not in use and lease nothing more."""
        self.open = False
        for place in self.places:
            if not place.busy:
                self._free(place)

    def assign(self, now_us: int) -> list[Grant]:
        """Lease what is free: to who asks, earliest deadline first, then to who is near, to who had it, or evenly."""
        if not self.open or not self.batchers:
            return []
        granted = [self._lease(place, name, now_us) for place, name in self._asked(now_us)]
        spare = [p for p in self.places if not p.busy and (not p.holder or self._strayed(p.holder))]
        granted += [self._lease(place, self._heir(place), now_us) for place in spare]
        return [Grant(self.executor, place.slot) for place in granted]

    def leases(self) -> tuple[Lease, ...]:
        return tuple(Lease(p.holder, p.slot, p.busy) for p in self.places if p.holder)

    def waiting(self) -> tuple[Waiting, ...]:
        """Rows that wait, at each batcher that has some."""
        return tuple(Waiting(name, batcher.rows) for name, batcher in self.batchers.items() if batcher.rows)

    def busy(self) -> int:
        return sum([place.busy for place in self.places])

    def holder(self, slot: Slot) -> str:
        return self.places[slot.index].holder

    def _asked(self, now_us: int) -> list[tuple[Place, str]]:
        """Free slots, or idle ones of batchers that do not use them, for those who wait without a slot in hand."""
        asking = [(b.due_us, name) for name, b in self.batchers.items() if b.rows]
        if not asking:
            return []
        idle = [place for place in self.places if not place.busy]
        in_hand = {place.holder for place in idle}
        asking = [(due_us, name) for due_us, name in asking if name not in in_hand]
        if not asking or not idle:
            return []
        spare = [p for p in idle if not p.holder]
        spare += [p for p in idle if p.holder and (not self.batchers[p.holder].rows or p.leased_us + HOLD_US <= now_us)]
        return [(place, name) for place, (_, name) in zip(spare, sorted(asking), strict=False)]

    def _lease(self, place: Place, name: str, now_us: int) -> Place:
        if place.holder:
            place.generation += 1
        place.holder = place.last = name
        place.leased_us = now_us
        return place

    def _heir(self, place: Place) -> str:
        """Of a slot that nobody asks for."""
        wanted = self._likely() or list(self.batchers)
        return place.last if place.last in wanted else self._fewest(wanted)

    def _likely(self) -> list[str]:
        """Batchers that send here first: that of this process, and those that have no executor in their own."""
        return [name for name, batcher in self.batchers.items() if batcher.near or not batcher.paired]

    def _strayed(self, holder: str) -> bool:
        """Whether an idle slot is with a batcher that has others nearer and no work, while there is one near here."""
        batcher = self.batchers[holder]
        if not batcher.paired or batcher.near or batcher.rows:
            return False
        return any(other.near for other in self.batchers.values())

    def _fewest(self, names: Iterable[str]) -> str:
        held = dict.fromkeys(names, 0)
        for place in self.places:
            if place.holder in held:
                held[place.holder] += 1
        return min(held, key=lambda name: (held[name], name))

    def _place(self, slot: Slot, batcher: str) -> Place | None:
        if not 0 <= slot.index < len(self.places):
            return None
        place = self.places[slot.index]
        valid = place.generation == slot.generation and place.holder == batcher and not place.busy
        return place if valid else None

    def _free(self, place: Place) -> None:
        place.generation += 1
        place.holder = ""

    def _lose(self, name: str) -> None:
        self.batchers.pop(name, None)
        for place in self.places:
            if place.holder == name and not place.busy:
                self._free(place)
