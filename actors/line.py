"""One priority class of a queue: tenants take turns by weight, and inside a tenant the earliest deadline goes first.

Pure; times in monotonic µs. Turns are start-time fair queueing: each tenant has a tag, the rows that it was given
divided by its weight, and the lowest tag is next. Who comes back starts where the others are: nobody saves turns up.
"""

from bisect import insort
from collections import defaultdict
from collections.abc import Callable, Iterator
from heapq import heapify, heappop, heapreplace

from narsil_stream.actors.ticket import State, Ticket

STEP = 11
"""Deadlines are counted in steps of 2**11 µs, which is as exact as a predicted wait has to be."""
WEIGHT = 0.1
"""Of the newest batch in the moving mean of a tenant's part."""
ALONE, LEAST = 0.99, 0.01
"""A part above the one is all there is; none is below the other."""
MOST_TAGS = 128
"""Of tenants with nothing in the line; above that those that have no meaning any more are let go."""


class Lane:
    """The tickets of one tenant, sorted. Cancelled ones stay until they come up or outnumber the others.

    Tickets come nearly in the order of their deadlines and leave from the front, many at once: a plain list does both
    faster than a heap.
    """

    __slots__ = ("count", "due", "entries", "part", "tag", "weight", "work")

    def __init__(self, weight: float = 1.0, tag: float = 0.0) -> None:
        self.entries: list[tuple[int, int, Ticket]] = []
        self.count = 0
        self.work = 0
        self.due: defaultdict[int, int] = defaultdict(int)
        """Work by the step of its deadline."""
        self.weight = weight
        self.tag = tag
        self.part = 1.0
        """Of the rows that left the line while this tenant had more waiting, those that were its own; a moving mean."""

    def first(self) -> Ticket:
        """The waiting ticket with the earliest deadline; there is one."""
        entries = self.entries
        if entries[0][2].state is not State.WAITING:
            del entries[: next(at for at, entry in enumerate(entries) if entry[2].state is State.WAITING)]
        return entries[0][2]

    def add(self, ticket: Ticket) -> None:
        insort(self.entries, (ticket.deadline_us, ticket.id, ticket))
        self.count += 1
        self.work += ticket.work
        self.due[ticket.deadline_us >> STEP] += ticket.work

    def discount(self, ticket: Ticket) -> None:
        step = ticket.deadline_us >> STEP
        self.count -= 1
        self.work -= ticket.work
        self.due[step] -= ticket.work
        if not self.due[step]:
            del self.due[step]

    def take_while(self, fits: Callable[[Ticket], bool]) -> list[Ticket]:
        """Takes out waiting tickets, the earliest first, up to the first that does not fit."""
        taken: list[Ticket] = []
        passed = 0
        for _, _, ticket in self.entries:
            if ticket.state is State.WAITING:
                if not fits(ticket):
                    break
                taken.append(ticket)
                self.discount(ticket)
            passed += 1
        del self.entries[:passed]
        return taken

    def take_first(self) -> Ticket:
        ticket = self.first()
        self.discount(ticket)
        del self.entries[0]
        return ticket

    def compact(self) -> None:
        if len(self.entries) > 2 * self.count + 64:
            self.entries = [entry for entry in self.entries if entry[2].state is State.WAITING]

    def work_until(self, deadline_us: int) -> int:
        last = deadline_us >> STEP
        return sum(work for step, work in self.due.items() if step <= last)

    def after(self, deadline_us: int) -> Iterator[tuple[int, int]]:
        """How much later each later step is, and the work from there up to it, itself included."""
        work, last = 0, deadline_us >> STEP
        for step in sorted(step for step in self.due if step > last):
            work += self.due[step]
            yield (step << STEP) - deadline_us, work


class Line:
    """Lanes by tenant, each with one ticket at least."""

    __slots__ = ("_due_us", "_tags", "_virtual", "count", "lanes", "part", "work")

    def __init__(self) -> None:
        self.lanes: dict[str, Lane] = {}
        self.work = 0
        self.count = 0
        self.part = 1.0
        """Of the rows that left the queue while this class had more waiting, those that were its own; a moving mean."""
        self._virtual = 0.0
        """The tag of who was served last, before it was served."""
        self._tags: dict[str, float] = {}
        """Of tenants that have left with a tag above that: they come back with it."""
        self._due_us: int | None = None
        """The earliest deadline; None: not known."""

    def add(self, ticket: Ticket, weight: float) -> None:
        lane = self.lanes.get(ticket.tenant)
        if lane is None:
            tag = max(self._virtual, self._tags.pop(ticket.tenant, 0.0))
            lane = self.lanes[ticket.tenant] = Lane(weight, tag)
        lane.add(ticket)
        self.work += ticket.work
        self.count += 1
        if self._due_us is not None and ticket.deadline_us < self._due_us:
            self._due_us = ticket.deadline_us

    def cancel(self, ticket: Ticket) -> None:
        """It is done already."""
        lane = self.lanes[ticket.tenant]
        lane.discount(ticket)
        lane.compact()
        self._discount([ticket])
        self._part(ticket.tenant)

    def first(self) -> Ticket:
        """Whose turn it is."""
        lanes = self.lanes.values()
        lane = next(iter(lanes)) if len(lanes) == 1 else min(lanes, key=_turn)
        return lane.first()

    def earliest_deadline(self) -> int:
        if self._due_us is None:
            self._due_us = min([lane.first().deadline_us for lane in self.lanes.values()])
        return self._due_us

    def take_first(self) -> Ticket:
        """Takes out the ticket whose turn it is."""
        name = self.first().tenant
        lane = self.lanes[name]
        ticket = lane.take_first()
        if len(self.lanes) > 1:
            self._charge(lane, ticket)
        self._discount([ticket])
        self._part(name)
        return ticket

    def take_while(self, fits: Callable[[Ticket], bool]) -> list[Ticket]:
        """Takes out tickets turn by turn, up to the first that does not fit."""
        if len(self.lanes) == 1:
            ((name, lane),) = self.lanes.items()
            self._virtual = lane.tag  # alone it is charged nothing: there is nobody to be fair to
            taken = lane.take_while(fits)
            lane.part = learnt(lane.part, 1.0)
            self._part(name)
        else:
            taken = self._take_turns(fits)
            self._learn_parts(taken)
        self._discount(taken)
        return taken

    def take_all(self, out: Callable[[Ticket], bool]) -> list[Ticket]:
        """Takes out the earliest of each tenant for as long as they are `out`: nobody is served."""
        taken: list[Ticket] = []
        for name, lane in list(self.lanes.items()):
            taken += lane.take_while(out)
            self._part(name)
        self._discount(taken)
        return taken

    def work_ahead(self, ticket: Ticket, weight: float) -> int:
        """Work that would be served before a new ticket: of its tenant those with earlier deadlines, of the others what
        their turns allow meanwhile, or what they have been taking lately, as more of theirs will come."""
        lanes = self.lanes
        own = lanes.get(ticket.tenant)
        ahead = own.work_until(ticket.deadline_us) if own is not None else 0
        part = own.part if own is not None else 1.0
        if len(lanes) == (own is not None) and part > ALONE:
            return ahead
        turns = (ahead + ticket.work) / weight
        others = sum(min(lane.work, turns * lane.weight) for lane in lanes.values() if lane is not own)
        return ahead + int(max(others, ahead * (1 / part - 1)))

    def _take_turns(self, fits: Callable[[Ticket], bool]) -> list[Ticket]:
        taken: list[Ticket] = []
        turns = [(*_turn(lane), name) for name, lane in self.lanes.items()]
        heapify(turns)
        while turns:
            name = turns[0][-1]
            lane = self.lanes[name]
            if not fits(lane.first()):
                break
            ticket = lane.take_first()
            taken.append(ticket)
            self._charge(lane, ticket)
            if lane.count:
                heapreplace(turns, (*_turn(lane), name))
            else:
                heappop(turns)
                self._part(name)
        return taken

    def _learn_parts(self, taken: list[Ticket]) -> None:
        rows = dict.fromkeys(self.lanes, 0)
        total = 0
        for ticket in taken:
            total += ticket.rows
            if ticket.tenant in rows:
                rows[ticket.tenant] += ticket.rows
        if total:
            for name, own in rows.items():
                self.lanes[name].part = learnt(self.lanes[name].part, own / total)

    def _charge(self, lane: Lane, ticket: Ticket) -> None:
        self._virtual = max(self._virtual, lane.tag)
        lane.tag += ticket.rows / lane.weight

    def _part(self, name: str) -> None:
        """A tenant leaves if nothing of it is left."""
        lane = self.lanes[name]
        if lane.count:
            return
        del self.lanes[name]
        if lane.tag > self._virtual:
            self._tags[name] = lane.tag
        if len(self._tags) > MOST_TAGS:
            self._tags = {of: tag for of, tag in self._tags.items() if tag > self._virtual}

    def _discount(self, tickets: list[Ticket]) -> None:
        self.count -= len(tickets)
        for ticket in tickets:
            self.work -= ticket.work
        self._due_us = None


def learnt(part: float, newest: float) -> float:
    """The moving mean, which is never 0: what has no part at present may have one soon."""
    return max(LEAST, part + WEIGHT * (newest - part))


def _turn(lane: Lane) -> tuple[float, int, int]:
    """The lowest is next; among equals the earliest deadline."""
    ticket = lane.first()
    return lane.tag, ticket.deadline_us, ticket.id
