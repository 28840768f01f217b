"""Who may go before whom, checked batch by batch beside the policy: deadlines, classes, ageing and tenants."""

from collections.abc import Iterator
from heapq import heappop, heappush
from itertools import combinations
from typing import TYPE_CHECKING

from narsil_stream.actors.queue import ModelKey, Ticket

if TYPE_CHECKING:
    from narsil_stream.actors.simulation.batcher import Batcher


LEAST_URGENT = 255


class Turns:
    """One tenant's waiting tickets of one class."""

    __slots__ = ("count", "heap", "served")

    def __init__(self) -> None:
        self.heap: list[tuple[int, int]] = []
        """Deadlines and ids; those that have left come off when they come up."""
        self.count = 0
        self.served = 0.0
        """Rows by weight."""


class Fairness:
    """Of one batcher. `waiting`: what waits there now, by id."""

    def __init__(self, batcher: "Batcher", waiting: dict[int, Ticket]) -> None:
        self._batcher = batcher
        self._rules = batcher.world.rules
        self._waiting = waiting
        self._classes: dict[ModelKey, dict[int, dict[str, Turns]]] = {}
        self._leads: dict[tuple[ModelKey, int, str, str], tuple[float, float]] = {}
        """Of pairs of tenants that have both waited all the time since: by how much one was ahead, least and most."""
        self._debt = 0.0
        """Rows that aged work was given beyond its share."""
        self._starved = 0
        """Rows that were taken since aged work had its turn."""

    def joined(self, ticket: Ticket, deadline_us: int) -> None:
        turns = self._classes.setdefault(ticket.model, {}).setdefault(ticket.priority, {})
        own = turns.setdefault(ticket.tenant, Turns())
        own.count += 1
        heappush(own.heap, (deadline_us, ticket.id))

    def left(self, ticket: Ticket) -> None:
        own = self._classes[ticket.model][ticket.priority][ticket.tenant]
        own.count -= 1
        if not own.count:
            for key in [key for key in self._leads if key[1] == ticket.priority and ticket.tenant in key[2:]]:
                del self._leads[key]

    def serves(self, model: ModelKey, taken: list[Ticket]) -> None:
        """These are about to leave."""
        for priority, a, b, lead in self._pairs(model):
            self._leads.setdefault((model, priority, a, b), (lead, lead))
        for ticket in taken:
            own = self._classes[model][ticket.priority][ticket.tenant]
            own.served += ticket.rows / self._rules.weights.get(ticket.tenant, 1.0)

    def check(self, executor: str, model: ModelKey, taken: list[Ticket], now: int) -> None:
        """These have just left, in one batch."""
        rows = sum(ticket.rows for ticket in taken)
        aged = [ticket.rows for ticket in self._check_order(model, taken, now)]
        self._check_shares(model)
        share, most = self._rules.ageing, self._rules.max_rows
        beyond = self._debt + sum(aged) - max(aged, default=0)  # the last one may exceed it
        if aged and beyond > 3 * share * most:  # it may have saved up two batches' worth; this one's comes on top
            self._fail(f"takes aged work of {sum(aged)} rows that has had {self._debt:.0f} more than its share")
        self._debt = max(0.0, self._debt - share * rows) + sum(aged)
        self._check_starving(executor, taken, rows, now)

    def _check_order(self, model: ModelKey, taken: list[Ticket], now: int) -> list[Ticket]:
        """The earliest deadline of each tenant and class first; no class before a more urgent one, but for aged work,
        which it returns."""
        most_urgent_left: Ticket | None = None
        for priority in sorted(self._classes[model]):
            for tenant in self._classes[model][priority]:
                left = self._head(model, priority, tenant)
                if left is None:
                    continue
                for ticket in taken:
                    if (ticket.priority, ticket.tenant) == (priority, tenant) and left.deadline_us < ticket.deadline_us:
                        self._fail(f"takes {_name(ticket)} and leaves {_name(left)}, with an earlier deadline")
                most_urgent_left = most_urgent_left or left
        if most_urgent_left is None:
            return []
        early = [ticket for ticket in taken if ticket.priority > most_urgent_left.priority]
        for ticket in early:
            if not self._rules.ageing or not _aged(ticket, now):
                self._fail(f"takes {_name(ticket)} and leaves {_name(most_urgent_left)}, of a more urgent class")
        return early

    def _check_shares(self, model: ModelKey) -> None:
        """Of two tenants with work waiting in a class, neither gets ahead of its share by more than a request each."""
        weights, most = self._rules.weights, self._rules.max_rows
        for priority, a, b, lead in self._pairs(model):
            key = model, priority, a, b
            if key in self._leads:
                least, largest = self._leads[key]
                least, largest = self._leads[key] = min(least, lead), max(largest, lead)
                if largest - least > most / weights.get(a, 1.0) + most / weights.get(b, 1.0) + 1e-6:
                    self._fail(f"gives one of the tenants '{a}' and '{b}' more than its share")

    def _check_starving(self, executor: str, taken: list[Ticket], rows: int, now: int) -> None:
        """Aged work has its turn before more than its share allows has gone before it."""
        share, most = self._rules.ageing, self._rules.max_rows
        urgent = min(self._most_urgent(executor), *(ticket.priority for ticket in taken))
        if not share or self._batcher.policy.may_wait or any(ticket.priority > urgent for ticket in taken):
            self._starved = 0
            return
        if not self._starves(executor, urgent, now):
            self._starved = 0
            return
        self._starved += rows
        if self._starved > most / share + 2 * most:
            self._fail(f"has taken {self._starved} rows while aged work of a less urgent class waits")

    def _most_urgent(self, executor: str) -> int:
        """Class of what waits for this executor."""
        known = self._batcher.policy.executors[executor]
        classes = [
            priority
            for model in known.models
            for priority, turns in self._classes.get(model, {}).items()
            if any(own.count for own in turns.values())
        ]
        return min(classes, default=LEAST_URGENT)

    def _starves(self, executor: str, urgent: int, now: int) -> bool:
        """Whether a less urgent class waits, with all of its tenants' first tickets aged, that this executor serves."""
        known = self._batcher.policy.executors[executor]
        for model in known.models:
            for priority, turns in self._classes.get(model, {}).items():
                if priority > urgent:
                    heads = [head for name in turns if (head := self._head(model, priority, name)) is not None]
                    if heads and all(_aged(head, now) for head in heads):
                        return True
        return False

    def _head(self, model: ModelKey, priority: int, tenant: str) -> Ticket | None:
        heap = self._classes[model][priority][tenant].heap
        while heap and heap[0][1] not in self._waiting:
            heappop(heap)
        return self._waiting[heap[0][1]] if heap else None

    def _pairs(self, model: ModelKey) -> Iterator[tuple[int, str, str, float]]:
        """Tenants that wait in one class, and by how much the first is ahead."""
        for priority, turns in self._classes[model].items():
            if len(turns) > 1:
                waiting = sorted(name for name, own in turns.items() if own.count)
                for a, b in combinations(waiting, 2):
                    yield priority, a, b, turns[a].served - turns[b].served

    def _fail(self, what: str) -> None:
        self._batcher.world.referee.fail(f"{self._batcher.name} {what}")


def _aged(ticket: Ticket, now: int) -> bool:
    return 2 * now >= ticket.arrived_us + ticket.deadline_us


def _name(ticket: Ticket) -> str:
    return f"r{ticket.payload.request}"
