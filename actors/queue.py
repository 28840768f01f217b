"""The batcher's waiting room: earliest deadline first inside a priority class. Pure; times in monotonic µs."""

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Any, NamedTuple


class ModelKey(NamedTuple):
    name: str
    version: str


class State(enum.Enum):
    WAITING = "waiting"
    IN_FLIGHT = "in flight"
    DONE = "done"


@dataclass(slots=True, eq=False)
class Ticket:
    """One admitted request, as the policy sees it. What to score and whom to answer is `payload`, which it ignores."""

    id: int
    model: ModelKey
    rows: int
    bytes: int
    priority: int
    """1 is the most urgent."""
    arrived_us: int
    deadline_us: int
    payload: Any = None
    state: State = State.WAITING


@dataclass(slots=True, eq=False)
class Queue:
    """Tickets of one model. Those that left (cancelled, expired) stay in their heap until they come up."""

    classes: dict[int, list[tuple[int, int, Ticket]]] = field(default_factory=dict)
    rows: int = 0
    bytes: int = 0
    count: int = 0

    def push(self, ticket: Ticket) -> None:
        heappush(self.classes.setdefault(ticket.priority, []), (ticket.deadline_us, ticket.id, ticket))
        self.rows += ticket.rows
        self.bytes += ticket.bytes
        self.count += 1

    def forget(self, ticket: Ticket) -> None:
        """Takes a waiting ticket out of the account; the caller has changed or will change its state."""
        self.rows -= ticket.rows
        self.bytes -= ticket.bytes
        self.count -= 1

    def head(self) -> Ticket | None:
        """The most urgent waiting ticket."""
        for priority in sorted(self.classes):
            heap = self.classes[priority]
            while heap and heap[0][2].state is not State.WAITING:
                heappop(heap)
            if heap:
                return heap[0][2]
            del self.classes[priority]
        return None

    def pop(self) -> Ticket:
        """Takes out the ticket that `head` has just returned."""
        ticket = heappop(self.classes[min(self.classes)])[2]
        self.forget(ticket)
        return ticket

    def expired(self, now_us: int) -> Iterator[Ticket]:
        """Takes out each waiting ticket whose deadline has passed, in any class."""
        for heap in self.classes.values():
            while heap and (heap[0][0] <= now_us or heap[0][2].state is not State.WAITING):
                ticket = heappop(heap)[2]
                if ticket.state is State.WAITING:
                    self.forget(ticket)
                    yield ticket

    def earliest_deadline(self) -> int | None:
        """Over all classes; may be that of a ticket that has left."""
        return min((heap[0][0] for heap in self.classes.values() if heap), default=None)

    def rows_ahead(self, priority: int, deadline_us: int) -> int:
        """Rows that would be served before a ticket of this class and deadline. Walks the queue."""
        ahead = 0
        for of, heap in self.classes.items():
            if of < priority:
                ahead += sum(t.rows for _, _, t in heap if t.state is State.WAITING)
            elif of == priority:
                ahead += sum(t.rows for due, _, t in heap if due <= deadline_us and t.state is State.WAITING)
        return ahead

    def drain(self) -> Iterator[Ticket]:
        """Takes out every waiting ticket."""
        while self.head() is not None:
            yield self.pop()
