"""Policy errors that can be planted, to see that the referee finds them. Each is a patch of the real policy's class."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from narsil_stream.actors.ageing import Ageing
from narsil_stream.actors.cutting import Cutting
from narsil_stream.actors.decisions import Decision, Rules
from narsil_stream.actors.flights import Executor, Group
from narsil_stream.actors.leasing import Ledger, Place
from narsil_stream.actors.line import Lane, Line
from narsil_stream.actors.pleading import Pleading
from narsil_stream.actors.queue import ModelKey, Queue, State, Ticket
from narsil_stream.actors.retrying import Retries
from narsil_stream.actors.scheduling import FLOAT_BYTES, Scheduler
from narsil_stream.core.routing import Router
from narsil_stream.core.throttle import Flow
from narsil_stream.schemas.errors import Fault, Refused
from narsil_stream.schemas.internal import Batch, Result, Slot


class Mutation(NamedTuple):
    name: str
    what: str
    owner: type
    attribute: str
    make: Callable[[Any], Callable[..., Any]]
    """From the right method, the wrong one."""
    shows_from: int = 0
    """A seed from which on it is found soon. It is found from 0 on, too, but some errors take rare runs to show."""


def _fifo(add: Callable[..., None]) -> Callable[..., None]:
    def wrong(self: Lane, ticket: Ticket) -> None:
        add(self, ticket)
        self.entries.sort(key=lambda entry: entry[1])

    return wrong


def _reversed_classes(cut: Callable[..., list[Ticket]]) -> Callable[..., list[Ticket]]:
    def reverse(queue: Queue) -> None:
        queue.lines = {-priority: line for priority, line in queue.lines.items()}

    def wrong(self: Queue, *limits: Any) -> list[Ticket]:
        reverse(self)
        tickets = cut(self, *limits)
        reverse(self)
        return tickets

    return wrong


def _lost_credit(_: Any) -> Callable[..., None]:
    def wrong(self: Executor, slot: Slot) -> None:
        if slot.generation > max(self.spent.get(slot.index, -1), self.free.get(slot.index, -1)) and slot.generation % 5:
            self.free[slot.index] = slot.generation

    return wrong


def _never_expires(_: Any) -> Callable[..., Iterator[Decision]]:
    def wrong(self: Scheduler, now_us: int) -> Iterator[Decision]:
        return iter(())

    return wrong


def _late_drop(offer: Callable[..., None]) -> Callable[..., None]:
    def wrong(self: Scheduler, ticket: Ticket, now_us: int) -> None:
        ticket.deadline_us += 5_000
        offer(self, ticket, now_us)

    return wrong


def _double_dispatch(dispatches: Callable[..., Iterator[Decision]]) -> Callable[..., Iterator[Decision]]:
    def wrong(self: Scheduler, now_us: int) -> Iterator[Decision]:
        for decision in dispatches(self, now_us):
            yield decision
            others = [one for one in self.executors.values() if one.up and one.free]
            flight = self.executors.flight(decision.executor, decision.batch)  # type: ignore[union-attr]
            if others and flight is not None and flight.group.model in others[0].models:
                yield self._dispatch(others[0], flight.group, now_us)

    return wrong


def _beyond_total(accept: Callable[..., bool]) -> Callable[..., bool]:
    def wrong(self: Ledger, batch: Batch, now_us: int) -> bool:
        return accept(self, batch, now_us) or self.open

    return wrong


def _same_generation(_: Any) -> Callable[..., None]:
    def wrong(self: Ledger, place: Place) -> None:
        place.holder = ""

    return wrong


def _keeps_leases(_: Any) -> Callable[..., None]:
    def wrong(self: Ledger, now_us: int) -> None:
        pass

    return wrong


def _answers_twice(result: Callable[..., Any]) -> Callable[..., Any]:
    def wrong(self: Scheduler, message: Result, now_us: int) -> tuple[list[Ticket], list[Decision]]:
        flight = self.executors.flight(message.executor, message.batch)
        again = flight is not None and flight.group.done and message.scores.nbytes == FLOAT_BYTES * flight.rows
        tickets, decisions = result(self, message, now_us)
        if flight is not None and again:
            tickets = flight.tickets
            for ticket in tickets:
                ticket.state = State.IN_FLIGHT
        return tickets, decisions

    return wrong


def _no_resend(_: Any) -> Callable[..., list[Decision]]:
    def wrong(self: Scheduler, executor: Executor) -> list[Decision]:
        del self.executors[executor.id]
        return []

    return wrong


def _idle_executor(pleads: Callable[..., bool]) -> Callable[..., bool]:
    def wrong(self: Pleading, executor: Executor) -> bool:
        return pleads(self, executor) and bool(executor.abandoned)

    return wrong


def _waits_for_company(ripe_us: Callable[..., int]) -> Callable[..., int]:
    def wrong(self: Cutting, model: ModelKey, queue: Queue, rules: Rules) -> int:
        return max(ripe_us(self, model, queue, rules), queue.since_us + 1_000)

    return wrong


def _unbounded_queue(offer: Callable[..., None]) -> Callable[..., None]:
    def wrong(self: Scheduler, ticket: Ticket, now_us: int) -> None:
        self.queues.setdefault(ticket.model, Queue(self.tenants)).push(ticket)

    return wrong


def _tries_for_ever(_: Any) -> Callable[..., Any]:
    def wrong(self: Retries, group: Group) -> list[Decision]:
        if not group.done and group not in self and not self._executors.flying(group):
            self.append(group)
        return []

    return wrong


def _silent_loss(_: Any) -> Callable[..., Any]:
    def wrong(self: Router[Any], batcher: str) -> list[Any]:
        self.peers.pop(batcher, None)
        return []

    return wrong


def _nothing(_: Any) -> Callable[..., None]:
    def wrong(*_: Any) -> None:
        pass

    return wrong


def _always_ages(earn: Callable[..., None]) -> Callable[..., None]:
    def wrong(self: Ageing, rows: int, aged_waits: bool) -> None:
        earn(self, 100 * rows, aged_waits)

    return wrong


def _throttles_all(check: Callable[..., None]) -> Callable[..., None]:
    def wrong(self: Flow, now_us: int, *asked: Any) -> None:
        if int(self.requests) % 3 == 1:
            raise Refused(Fault.OVERLOADED, "enough", 1_000)
        check(self, now_us, *asked)

    return wrong


MUTATIONS = (
    Mutation("fifo", "first come, first served inside a class, whatever the deadline", Lane, "add", _fifo),
    Mutation("class-inversion", "the least urgent class goes first", Queue, "cut", _reversed_classes),
    Mutation("lost-credit", "each fifth slot that an executor gives is dropped", Executor, "offer_slot", _lost_credit),
    Mutation("late-drop", "expired requests are dropped 5 ms late", Scheduler, "offer", _late_drop),
    Mutation("no-admission", "every request is admitted", Scheduler, "offer", _unbounded_queue),
    Mutation("dead-executor", "a silent executor is never given up", Scheduler, "_lost_executors", _never_expires),
    Mutation("double-dispatch", "a batch goes to two executors at once", Scheduler, "_dispatches", _double_dispatch),
    Mutation("no-resend", "batches at a lost executor are forgotten", Scheduler, "_lose", _no_resend),
    Mutation("endless-resend", "a batch is tried again without end", Retries, "again", _tries_for_ever),
    Mutation("answer-twice", "the second result of a batch is answered, too", Scheduler, "result", _answers_twice),
    Mutation("idle-executor", "nobody asks for slots that others hold", Pleading, "pleads", _idle_executor),
    Mutation("company", "a free executor waits 1 ms for a fuller batch", Cutting, "ripe_us", _waits_for_company),
    Mutation("beyond-total", "an executor takes batches on void slots", Ledger, "accept", _beyond_total),
    Mutation("same-generation", "a slot changes hands under its old number", Ledger, "_free", _same_generation),
    Mutation("kept-lease", "a silent batcher keeps its slots", Ledger, "expire", _keeps_leases),
    Mutation("no-ageing", "aged work of a less urgent class gets nothing", Ageing, "earn", _nothing, 260),
    Mutation("only-ageing", "aged work goes before more urgent work, always", Ageing, "earn", _always_ages),
    Mutation("greedy-tenant", "tenants take no turns: the earliest deadline goes first", Line, "_charge", _nothing),
    Mutation("eager-throttle", "gateways refuse what batchers would accept", Flow, "check", _throttles_all),
    Mutation("lost-request", "a gateway forgets what a lost batcher had", Router, "lose", _silent_loss),
)
BY_NAME = {mutation.name: mutation for mutation in MUTATIONS}


@contextmanager
def planted(name: str) -> Iterator[None]:
    """The error is in this process's policy while the block runs. Empty: none. Raises KeyError."""
    if not name:
        yield
        return
    mutation = BY_NAME[name]
    right = getattr(mutation.owner, mutation.attribute)
    setattr(mutation.owner, mutation.attribute, mutation.make(right))
    try:
        yield
    finally:
        setattr(mutation.owner, mutation.attribute, right)
