"""What the batcher knows of batches under way and of the executors that they went to. Pure; times in monotonic µs."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from heapq import heapify, heapreplace
from operator import attrgetter

from narsil_stream.actors.queue import ModelKey, State, Ticket
from narsil_stream.schemas.internal import ExecutorBeat, ModelRef, Slot

DEMAND_EVERY_US = 20_000
"""How often an executor is asked for a slot again."""

MISSED_BEATS = 2
"""A batch that is computed, or its result, overtakes one heartbeat at most that does not know of it: by the second one,
it is lost."""

ARRIVES_US = 20_000
"""Within this time a batch arrives, or heartbeats do not either."""


class Group:
    """Tickets that travel as one batch, with the history of its sendings."""

    def __init__(self, model: ModelKey, tickets: Iterable[Ticket]) -> None:
        self.model = model
        self.sends = 0
        self.bounces = 0
        self.avoid: set[str] = set()
        """Executors that were lost or silent with it."""
        self.done = False
        """Nobody waits for it any more, though it may still be under way."""
        self._tickets = sorted(tickets, key=attrgetter("deadline_us"))

    @property
    def rows(self) -> int:
        """Of its open tickets."""
        return sum(ticket.rows for ticket in self.open_tickets())

    @property
    def work(self) -> int:
        """Of its open tickets."""
        return sum(ticket.work for ticket in self.open_tickets())

    def open_tickets(self) -> list[Ticket]:
        return [ticket for ticket in self._tickets if ticket.state is State.IN_FLIGHT]

    def is_open(self) -> bool:
        return not self.done and any(ticket.state is State.IN_FLIGHT for ticket in self._tickets)

    def expired(self, now_us: int) -> list[Ticket]:
        """Takes out those whose deadline has passed."""
        tickets = self._tickets
        if tickets and tickets[0].deadline_us > now_us and tickets[0].state is not State.DONE:
            return []
        past = 0
        while past < len(tickets) and (tickets[past].deadline_us <= now_us or tickets[past].state is State.DONE):
            past += 1
        gone = [ticket for ticket in tickets[:past] if ticket.state is State.IN_FLIGHT]
        del tickets[:past]
        self.done = self.done or not tickets
        return gone

    def earliest_deadline(self) -> int | None:
        """May be that of a ticket that has left."""
        return self._tickets[0].deadline_us if self._tickets else None


@dataclass(slots=True, eq=False)
class Flight:
    """One sending of a group. Its rows are those of the tickets that were open then."""

    batch: int
    group: Group
    slot: Slot
    tickets: list[Ticket]
    rows: int
    sent_us: int
    predicted_us: int
    ahead_us: int
    """Until it was predicted to begin, behind what was sent there before."""
    overdue_us: int
    late: bool = False
    """It was overdue: the batch or its result may be lost."""
    missed: int = 0
    """Heartbeats of its executor in which its slot was not busy."""
    begun_us: int | None = None
    """When a lane was free for it, as far as batches of this batcher go; None: it waits for one."""
    joined_ns: int = 0
    """How long the joining of its rows took; for statistics."""


@dataclass(slots=True, eq=False)
class Executor:
    """One executor, as far as this batcher has heard."""

    id: str
    seen_us: int
    offers: frozenset[ModelKey] = frozenset()
    """Models that new requests are admitted for."""
    models: frozenset[ModelKey] = frozenset()
    """Those, and the ones on their way out, which still compute what was admitted before."""
    near: bool = False
    """In this process: no hop over the broker lies between."""
    slots: int = 0
    lanes: int = 1
    """Batches that it computes at once ..."""
    of_each: dict[ModelKey, int] = field(default_factory=dict)
    """... and of a model. Of others as many as there are lanes."""
    up: bool = True
    free: dict[int, int] = field(default_factory=dict)
    """Slots in hand: index -> generation."""
    spent: dict[int, int] = field(default_factory=dict)
    """Newest generation of each slot that was used."""
    flights: dict[int, Flight] = field(default_factory=dict)
    abandoned: dict[int, int] = field(default_factory=dict)
    """Slots whose batch may never have arrived: given back with every demand until the executor says otherwise."""
    demanded_us: int = -DEMAND_EVERY_US
    told_rows: int = 0
    """Rows that wait here, as it was told last."""
    rival_rows: int = 0
    """Rows that wait for it at other batchers."""
    rival_slots: int = 0
    """Slots that other batchers hold: so many of their batches may be before one of ours."""

    def hear(self, beat: ExecutorBeat, batcher: str, now_us: int) -> list[Flight]:
        """Takes out and returns flights that have ended although no result came: their slot has moved on.

        Those that never arrived are overdue from now on.
        """
        self.seen_us = now_us
        self.offers = keys(beat.models)
        self.models = self.offers | keys(beat.retiring)
        self.slots = beat.slots
        self.of_each = dict(zip(map(_key, beat.models), beat.lanes, strict=False))
        self.lanes = max(self.of_each.values(), default=max(1, beat.slots - 1))
        self.up = beat.state == "up"
        self.rival_rows = sum(other.rows for other in beat.waiting if other.batcher != batcher)
        self.rival_slots = sum(lease.batcher != batcher for lease in beat.leases)
        held = {lease.slot: lease.busy for lease in beat.leases if lease.batcher == batcher}
        idle = [slot for slot, busy in held.items() if not busy]
        self.free.clear()
        for slot in idle:
            self.offer_slot(slot)
        for flight in self.flights.values():
            if not held.get(flight.slot) and flight.sent_us + ARRIVES_US <= now_us:
                flight.missed += 1
                if flight.missed >= MISSED_BEATS:
                    flight.overdue_us = min(flight.overdue_us, now_us)
        coming = {flight.slot for flight in self.flights.values() if flight.overdue_us > now_us}
        self.abandoned = {
            slot.index: slot.generation
            for slot in idle
            if slot.generation == self.spent.get(slot.index) and slot not in coming
        }
        overdue = [flight for flight in self.flights.values() if flight.overdue_us <= now_us]
        ended = [flight for flight in overdue if flight.slot not in held]
        for flight in ended:
            del self.flights[flight.batch]
        self.begin(now_us)
        return ended

    def offer_slot(self, slot: Slot) -> None:
        """Messages overtake each other: only what is newer than all that was known counts."""
        if slot.generation > max(self.spent.get(slot.index, -1), self.free.get(slot.index, -1)):
            self.free[slot.index] = slot.generation

    def spend(self) -> Slot:
        index, generation = self.free.popitem()
        self.spent[index] = generation
        return Slot(index, generation)

    def take_back(self, flight: Flight) -> None:
        """The batch was not sent after all."""
        del self.flights[flight.batch]
        del self.spent[flight.slot.index]
        self.offer_slot(flight.slot)

    def lanes_of(self, model: ModelKey) -> int:
        return min(self.lanes, self.of_each.get(model, self.lanes))

    def begin(self, now_us: int) -> None:
        """A batch was sent, came back, or counts as lost: lanes take batches in the order in which they were sent, but
        a model that waits for a lane of its own holds up no other."""
        running: dict[ModelKey, int] = {}
        lanes = self.lanes
        for flight in self.flights.values():
            if not lanes:
                return
            model = flight.group.model
            taken = running.get(model, 0)
            if not flight.late and taken < self.lanes_of(model):
                running[model] = taken + 1
                lanes -= 1
                if flight.begun_us is None:
                    flight.begun_us = now_us

    def remaining_us(self, model: ModelKey, now_us: int) -> int:
        """Predicted time until a batch of the model that is sent there now begins: until a lane is free for it."""
        if self.idle(model):
            return 0
        free_us = _free_us(self._left_us(now_us), self.lanes)
        if (lanes := self.lanes_of(model)) < self.lanes:
            return max(free_us, _free_us(self._left_us(now_us, model), lanes))
        return free_us

    def busy_us(self, now_us: int) -> int:
        """Predicted time of a lane that all takes which was sent there."""
        return sum(self._left_us(now_us))

    def idle(self, model: ModelKey) -> bool:
        """Whether a batch of the model that is sent there now begins at once."""
        begun = [
            flight.group.model for flight in self.flights.values() if flight.begun_us is not None and not flight.late
        ]
        return len(begun) < self.lanes and begun.count(model) < self.lanes_of(model)

    def _left_us(self, now_us: int, model: ModelKey | None = None) -> list[int]:
        """Of each batch under way, of one model or at all, in the order in which they were sent."""
        return [
            flight.predicted_us if flight.begun_us is None else max(0, flight.begun_us + flight.predicted_us - now_us)
            for flight in self.flights.values()
            if not flight.late and (model is None or flight.group.model == model)
        ]

    def full(self) -> bool:
        """Whether all its slots are in use by this batcher."""
        if len(self.flights) < self.slots:
            return False
        return sum(not flight.late for flight in self.flights.values()) >= self.slots


def _free_us(left_us: list[int], lanes: int) -> int:
    """Until one of the lanes is free, each of which takes the next batch when it has done one."""
    if len(left_us) < lanes:
        return 0
    busy, waiting = left_us[:lanes], left_us[lanes:]
    heapify(busy)
    for us in waiting:
        heapreplace(busy, busy[0] + us)
    return busy[0]


def keys(refs: Iterable[ModelRef]) -> frozenset[ModelKey]:
    return frozenset(map(_key, refs))


def _key(ref: ModelRef) -> ModelKey:
    return ModelKey(ref.name, ref.version, ref.digest)


class Fleet(dict[str, Executor]):
    """The executors that are alive, by id."""

    def __init__(self) -> None:
        super().__init__()
        self.expected: dict[str, int] = {}
        """Executors that gave a slot before their first heartbeat was heard, and until when that is waited for."""

    def add(self, executor: Executor) -> None:
        self.expected.pop(executor.id, None)
        self[executor.id] = executor

    def give_up_expected(self, now_us: int) -> None:
        if self.expected:
            self.expected = {name: until_us for name, until_us in self.expected.items() if until_us > now_us}

    def hopeless(self, model: ModelKey) -> bool:
        """Whether nobody is left for it, nor about to come."""
        return not self.expected and not self.served(model)

    def serving(self, model: ModelKey) -> list[Executor]:
        return [executor for executor in self.values() if executor.up and model in executor.models]

    def served(self, model: ModelKey) -> bool:
        for executor in self.values():  # noqa: SIM110 - `any` takes twice as long, and this is asked all the time
            if executor.up and model in executor.models:
                return True
        return False

    def busy(self) -> bool:
        """Whether anything is under way."""
        for executor in self.values():  # noqa: SIM110
            if executor.flights:
                return True
        return False

    def offered(self, model: ModelKey) -> bool:
        for executor in self.values():  # noqa: SIM110
            if executor.up and model in executor.offers:
                return True
        return False

    def flight(self, executor: str, batch: int) -> Flight | None:
        return self[executor].flights.get(batch) if executor in self else None

    def flying(self, group: Group) -> bool:
        for executor in self.values():
            for flight in executor.flights.values():
                if flight.group is group:
                    return True
        return False
