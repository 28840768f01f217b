"""The batcher's waiting room for one model: priority classes, each with its tenants. Pure; times in monotonic µs."""

import sys
from collections.abc import Callable, Iterable, Iterator

from narsil_stream.actors.line import ALONE, Line, learnt
from narsil_stream.actors.tenants import Tenants
from narsil_stream.actors.ticket import ModelKey, State, Ticket

__all__ = ["ModelKey", "Queue", "State", "Ticket"]


class Queue:
    """Lines by priority; each has at least one ticket. `tenants` counts what waits here too."""

    __slots__ = ("bytes", "count", "lines", "rows", "since_us", "tenants", "work")

    def __init__(self, tenants: Tenants | None = None) -> None:
        self.tenants = tenants or Tenants({})
        self.lines: dict[int, Line] = {}
        self.rows = 0
        self.work = 0
        self.bytes = 0
        self.count = 0
        self.since_us = 0
        """Not later than the arrival of any ticket in it."""

    def push(self, ticket: Ticket) -> None:
        line = self.lines.get(ticket.priority)
        if line is None:
            line = self.lines[ticket.priority] = Line()
        if not self.count:
            self.since_us = ticket.arrived_us
        line.add(ticket, self.tenants.weight(ticket.tenant))
        self.rows += ticket.rows
        self.work += ticket.work
        self.bytes += ticket.bytes
        self.count += 1
        self.tenants.add(ticket.tenant, ticket.rows, ticket.bytes)

    def cancel(self, ticket: Ticket) -> None:
        """The caller of a waiting ticket has left."""
        ticket.state = State.DONE
        self.lines[ticket.priority].cancel(ticket)
        self._discount(ticket.priority, [ticket])

    def head(self) -> Ticket | None:
        """Whose turn it is."""
        return self.lines[min(self.lines)].first() if self.lines else None

    def aged(self, than: int, now_us: int) -> Ticket | None:
        """Of those less urgent than this class whose turn it is in theirs: the one with the earliest deadline, if half
        of its budget has run out."""
        heads = [head for of, line in self.lines.items() if of > than and (head := line.first()).aged(now_us)]
        return min(heads, key=_deadline, default=None)

    def cut(
        self,
        max_rows: int,
        max_bytes: int,
        coalesce: bool = True,
        aged: Iterable[Ticket] = (),
        in_time: Callable[[int], int] | None = None,
    ) -> list[Ticket]:
        """Takes out the next batch: the most urgent ticket, and those behind it until the first that does not fit.

        `aged`: what goes before them, each as `aged` gives it at that time.
        `in_time`: how much work still meets a deadline. The earliest one of the batch bounds it.
        """
        rows = size = work = 0
        due_us = most = sys.maxsize
        full = False

        def fits(ticket: Ticket) -> bool:
            nonlocal rows, size, work, due_us, most, full
            bound = in_time(ticket.deadline_us) if in_time is not None and ticket.deadline_us < due_us else most
            if rows and (
                not coalesce
                or rows + ticket.rows > max_rows
                or size + ticket.bytes > max_bytes
                or work + ticket.work > bound
            ):
                full = True
                return False
            rows += ticket.rows
            size += ticket.bytes
            work += ticket.work
            due_us, most = min(due_us, ticket.deadline_us), bound
            return True

        tickets: list[Ticket] = []
        for ticket in aged:
            if not fits(ticket):
                break
            tickets.append(self.lines[ticket.priority].take_first())
            self._discount(ticket.priority, tickets[-1:])
        full = full and not coalesce
        for priority in sorted(self.lines):
            taken = self.lines[priority].take_while(fits)
            self._discount(priority, taken)
            tickets += taken
            if full:
                break
        for ticket in tickets:
            ticket.state = State.IN_FLIGHT
        self._learn_parts(tickets)
        return tickets

    def expired(self, now_us: int) -> list[Ticket]:
        """Takes out each waiting ticket whose deadline has passed, in any line."""
        return self._take_all(lambda ticket: ticket.deadline_us <= now_us)

    def drain(self) -> list[Ticket]:
        """Takes out every waiting ticket, the most urgent classes first."""
        return self._take_all(lambda _: True)

    def earliest_deadline(self) -> int | None:
        """Over all lines."""
        earliest_us = None
        for line in self.lines.values():
            due_us = line.earliest_deadline()
            if earliest_us is None or due_us < earliest_us:
                earliest_us = due_us
        return earliest_us

    def shared(self) -> bool:
        """Whether several tenants or classes come: who waits last may then be overtaken by who has not come yet."""
        if len(self.tenants.waiting) > 1 or len(self.lines) > 1:
            return True
        return any(line.part < ALONE for line in self.lines.values())

    def work_ahead(self, ticket: Ticket) -> int:
        """Work that would be served before a new ticket, by class and turn; deadlines count to the step.

        Of more urgent classes those that wait, or as many as they have been taking lately, as more of theirs will come.
        """
        ahead = 0
        awaited = 0.0
        for of, line in self.lines.items():
            if of < ticket.priority:
                ahead += line.work
            elif of == ticket.priority:
                own = line.work_ahead(ticket, self.tenants.weight(ticket.tenant))
                ahead += own
                awaited = own / line.part
        return max(ahead, int(awaited))

    def work_aged_ahead(self, ticket: Ticket) -> int:
        """Work that would be served before a new ticket out of what is kept for aged work: by turn in its own class,
        and by deadline in the other ones."""
        ahead = 0
        for of, line in self.lines.items():
            if of == ticket.priority:
                ahead += line.work_ahead(ticket, self.tenants.weight(ticket.tenant))
            elif of > min(self.lines):
                ahead += sum(lane.work_until(ticket.deadline_us) for lane in line.lanes.values())
        return ahead

    def behind(self, ticket: Ticket) -> Iterator[tuple[int, int]]:
        """Those of its class and tenant with later deadlines than a new ticket: how much later, to the step, and the
        work from there up to them, themselves included."""
        line = self.lines.get(ticket.priority)
        lane = line.lanes.get(ticket.tenant) if line is not None else None
        return lane.after(ticket.deadline_us) if lane is not None else iter(())

    def reweigh(self) -> None:
        """The weights of tenants have changed."""
        for line in self.lines.values():
            for name, lane in line.lanes.items():
                lane.weight = self.tenants.weight(name)

    def _learn_parts(self, tickets: list[Ticket]) -> None:
        """What part of the batch each class had that still waits."""
        lines = self.lines
        if not tickets or not lines:
            return
        if len(lines) == 1 and len({tickets[0].priority, tickets[-1].priority, *lines}) == 1:
            for line in lines.values():
                line.part = learnt(line.part, 1.0)
            return
        total = sum(ticket.rows for ticket in tickets)
        for of, line in lines.items():
            own = sum(ticket.rows for ticket in tickets if ticket.priority == of)
            line.part = learnt(line.part, own / total)

    def _take_all(self, out: Callable[[Ticket], bool]) -> list[Ticket]:
        tickets: list[Ticket] = []
        for priority in sorted(self.lines):
            taken = self.lines[priority].take_all(out)
            self._discount(priority, taken)
            tickets += taken
        return tickets

    def _discount(self, priority: int, tickets: list[Ticket]) -> None:
        if not self.lines[priority].count:
            del self.lines[priority]
        self.count -= len(tickets)
        for ticket in tickets:
            self.rows -= ticket.rows
            self.work -= ticket.work
            self.bytes -= ticket.bytes
            self.tenants.remove(ticket.tenant, ticket.rows, ticket.bytes)


def _deadline(ticket: Ticket) -> tuple[int, int]:
    return ticket.deadline_us, ticket.id
