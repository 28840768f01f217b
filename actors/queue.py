"""The batcher's waiting room: earliest deadline first inside a priority class. Pure; times in monotonic µs."""

import enum
import sys
from bisect import insort
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

STEP = 11
"""Deadlines are counted in steps of 2**11 µs, which is as exact as a predicted wait has to be."""


class ModelKey(NamedTuple):
    """One model's weights. What was checked against some weights is never computed with others of the same version."""

    name: str
    version: str
    digest: str


class State(enum.Enum):
    WAITING = "waiting"
    IN_FLIGHT = "in flight"
    DONE = "done"


@dataclass(slots=True, eq=False)
class Ticket:
    """One admitted request, as the policy sees it. What to score and whom to answer is `payload`, which it ignores."""

    id: int
    """Grows with each ticket of a batcher."""
    model: ModelKey
    rows: int
    bytes: int
    priority: int
    """1 is the most urgent."""
    arrived_us: int
    deadline_us: int
    payload: Any = None
    state: State = State.WAITING
    work: int = 0
    """In rows, for predicted times: more than `rows` where bags hold more ids than one. 0: as many as `rows`."""

    def __post_init__(self) -> None:
        self.work = self.work or self.rows


@dataclass(slots=True, eq=False)
class Line:
    """The tickets of one priority, sorted. Cancelled ones stay until they come up or outnumber the others.

    Tickets come nearly in the order of their deadlines and leave from the front, many at once: a plain list does both
    faster than a heap.
    """

    entries: list[tuple[int, int, Ticket]] = field(default_factory=list)
    count: int = 0
    work: int = 0
    due: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    """Work by the step of its deadline."""

    def first(self) -> Ticket:
        """The most urgent waiting ticket; there is one."""
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
        """Takes out waiting tickets, the most urgent first, up to the first that does not fit."""
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

    def compact(self) -> None:
        if len(self.entries) > 2 * self.count + 64:
            self.entries = [entry for entry in self.entries if entry[2].state is State.WAITING]

    def work_until(self, deadline_us: int) -> int:
        last = deadline_us >> STEP
        return sum(work for step, work in self.due.items() if step <= last)

    def after(self, deadline_us: int) -> Iterator[tuple[int, int]]:
        work, last = 0, deadline_us >> STEP
        for step in sorted(step for step in self.due if step > last):
            work += self.due[step]
            yield (step << STEP) - deadline_us, work


@dataclass(slots=True, eq=False)
class Queue:
    """Tickets of one model, by priority; each line has at least one."""

    lines: dict[int, Line] = field(default_factory=dict)
    rows: int = 0
    bytes: int = 0
    count: int = 0
    since_us: int = 0
    """Not later than the arrival of any ticket in it."""

    def push(self, ticket: Ticket) -> None:
        line = self.lines.get(ticket.priority)
        if line is None:
            line = self.lines[ticket.priority] = Line()
        if not self.count:
            self.since_us = ticket.arrived_us
        line.add(ticket)
        self.rows += ticket.rows
        self.bytes += ticket.bytes
        self.count += 1

    def cancel(self, ticket: Ticket) -> None:
        """The caller of a waiting ticket has left."""
        ticket.state = State.DONE
        line = self.lines[ticket.priority]
        line.discount(ticket)
        line.compact()
        self._discount(ticket.priority, ticket.rows, ticket.bytes, 1)

    def head(self) -> Ticket | None:
        """The most urgent waiting ticket."""
        return self.lines[min(self.lines)].first() if self.lines else None

    def cut(
        self, max_rows: int, max_bytes: int, coalesce: bool = True, in_time: Callable[[int], int] | None = None
    ) -> list[Ticket]:
        """Takes out the next batch: the most urgent ticket, and those behind it until the first that does not fit.

        `in_time`: how much work still meets a deadline. The earliest one of the batch bounds it.
        """
        rows = size = work = 0
        due_us = most = sys.maxsize
        full = False

        def fits(ticket: Ticket) -> bool:
            nonlocal rows, size, work, due_us, most, full
            if in_time is not None and ticket.deadline_us < due_us:
                due_us, most = ticket.deadline_us, in_time(ticket.deadline_us)
            if rows and (
                not coalesce
                or rows + ticket.rows > max_rows
                or size + ticket.bytes > max_bytes
                or work + ticket.work > most
            ):
                full = True
                return False
            rows += ticket.rows
            size += ticket.bytes
            work += ticket.work
            return True

        tickets: list[Ticket] = []
        for priority in sorted(self.lines):
            tickets += self._take(priority, fits)
            if full:
                break
        for ticket in tickets:
            ticket.state = State.IN_FLIGHT
        return tickets

    def expired(self, now_us: int) -> list[Ticket]:
        """Takes out each waiting ticket whose deadline has passed, in any line."""
        return self._take_all(lambda ticket: ticket.deadline_us <= now_us)

    def drain(self) -> list[Ticket]:
        """Takes out every waiting ticket, the most urgent first."""
        return self._take_all(lambda _: True)

    def earliest_deadline(self) -> int | None:
        """Over all lines."""
        return min((line.first().deadline_us for line in self.lines.values()), default=None)

    @property
    def work(self) -> int:
        return sum(line.work for line in self.lines.values())

    def work_ahead(self, priority: int, deadline_us: int) -> int:
        """Work that would be served before a ticket of this priority and deadline, to the step."""
        return sum(
            line.work if of < priority else line.work_until(deadline_us)
            for of, line in self.lines.items()
            if of <= priority
        )

    def behind(self, priority: int, deadline_us: int) -> Iterator[tuple[int, int]]:
        """Tickets of this priority with later deadlines: how much later, to the step, and the work from there up to
        them, themselves included."""
        line = self.lines.get(priority)
        return line.after(deadline_us) if line else iter(())

    def _take_all(self, fits: Callable[[Ticket], bool]) -> list[Ticket]:
        return [ticket for priority in sorted(self.lines) for ticket in self._take(priority, fits)]

    def _take(self, priority: int, fits: Callable[[Ticket], bool]) -> list[Ticket]:
        line = self.lines[priority]
        tickets = line.take_while(fits)
        if tickets:
            self._discount(priority, sum(t.rows for t in tickets), sum(t.bytes for t in tickets), len(tickets))
        return tickets

    def _discount(self, priority: int, rows: int, size: int, count: int) -> None:
        if not self.lines[priority].count:
            del self.lines[priority]
        self.rows -= rows
        self.bytes -= size
        self.count -= count
