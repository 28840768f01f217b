"""Policies under a test's hand: a batcher's `Scheduler` with its clock, fed with what executors would say."""

from collections.abc import Callable, Iterable
from itertools import count

import pytest

from narsil_stream.actors.decisions import Decision, Dispatch, Drop, Plead, Rules
from narsil_stream.actors.queue import ModelKey, Ticket
from narsil_stream.actors.scheduling import Scheduler
from narsil_stream.schemas.errors import Refused
from narsil_stream.schemas.internal import ExecutorBeat, Lease, ModelRef, Result, Slot, Waiting

MODEL = ModelKey("m", "1", "digest")
OTHER = ModelKey("n", "1", "digest")
BUDGET_US = 1_000_000
LEASE_US = 500_000
FLOOR_US = 50_000
S0, S1 = Slot(0, 0), Slot(1, 0)
_ids = count(1)


def ticket(
    rows: int = 1,
    deadline_us: int = BUDGET_US,
    priority: int = 128,
    size: int = 10,
    arrived_us: int = 0,
    model: ModelKey = MODEL,
    tenant: str = "",
) -> Ticket:
    return Ticket(next(_ids), model, rows, size, priority, arrived_us, deadline_us, tenant=tenant)


class Batcher:
    """Decisions of the last `decide` or event are in `dispatches`, `drops` and `pleas`; `now` (µs) moves by hand."""

    def __init__(self, near: Callable[[str], bool] = lambda _: False, **rules: object) -> None:
        defaults = {
            "max_rows": 8,
            "max_bytes": 1_000,
            "queue_rows": 100,
            "queue_bytes": 10_000,
            "lease_us": LEASE_US,
            "failover_floor_us": FLOOR_US,
            "failover_factor": 4.0,
        }
        self.policy = Scheduler("b", Rules(**(defaults | rules)), near)  # type: ignore[arg-type]
        self.now = 0
        self.dispatches: list[Dispatch] = []
        self.drops: list[Drop] = []
        self.pleas: list[Plead] = []

    def hear(
        self,
        executor: str,
        *slots: Slot,
        busy: Iterable[Slot] = (),
        total: int = 2,
        state: str = "up",
        models: tuple[ModelKey, ...] = (MODEL,),
        retiring: tuple[ModelKey, ...] = (),
        rival_rows: int = 0,
        rival_slots: Iterable[Slot] = (),
    ) -> None:
        """A beat of an executor that leases `slots`, and `busy` ones, to this batcher, and others to a rival."""
        leases = [*(Lease("b", slot, False) for slot in slots), *(Lease("b", slot, True) for slot in busy)]
        leases += [Lease("rival", slot, True) for slot in rival_slots]
        waiting = (Waiting("rival", rival_rows), Waiting("b", self.policy.rows))
        refs, going = (tuple(ModelRef(*key) for key in keys) for keys in (models, retiring))
        beat = ExecutorBeat(executor, refs, total, tuple(leases), state, going, waiting=waiting)
        self._sort(self.policy.beat(beat, self.now))

    def offer(self, *tickets: Ticket) -> tuple[Ticket, ...]:
        for one in tickets:
            self.policy.offer(one, self.now)
        return tickets

    def refuses(self, one: Ticket) -> Refused:
        with pytest.raises(Refused) as refused:
            self.policy.offer(one, self.now)
        return refused.value

    def decide(self, now_us: int | None = None) -> list[Dispatch]:
        """As the shell does: several times in a lease."""
        end_us = self.now if now_us is None else now_us
        decisions = self.policy.decide(self.now)
        while self.now < end_us:
            self.now = min(end_us, self.now + LEASE_US // 5)
            decisions += self.policy.decide(self.now)
        self._sort(decisions)
        return self.dispatches

    def answer(self, sent: Dispatch, service_us: int = 1_000, grant: Slot | None = None) -> list[Ticket]:
        return self._result(
            Result(sent.batch, sent.executor, memoryview(bytes(4 * sent.rows)), service_us, grant=grant)
        )

    def fail(self, sent: Dispatch, fault: str = "INTERNAL", grant: Slot | None = None) -> None:
        self._result(Result(sent.batch, sent.executor, memoryview(b""), 0, fault, "it failed", grant))

    def bounce(self, sent: Dispatch) -> None:
        self._result(Result(sent.batch, sent.executor, memoryview(b""), 0))

    def teach(self, rows: int, service_us: int) -> None:
        self.policy.forecast.times.observe(MODEL, rows, service_us)

    def dropped(self) -> list[tuple[Ticket, str]]:
        return [(drop.ticket, drop.fault.name) for drop in self.drops]

    def _result(self, result: Result) -> list[Ticket]:
        tickets, decisions = self.policy.result(result, self.now)
        self._sort(decisions)
        return tickets

    def _sort(self, decisions: list[Decision]) -> None:
        self.dispatches = [decision for decision in decisions if isinstance(decision, Dispatch)]
        self.drops = [decision for decision in decisions if isinstance(decision, Drop)]
        self.pleas = [decision for decision in decisions if isinstance(decision, Plead)]


def one_executor(*slots: Slot, **rules: object) -> Batcher:
    batcher = Batcher(**rules)
    batcher.hear("e1", *(slots or (S0, S1)))
    return batcher


def two_executors(**rules: object) -> Batcher:
    batcher = one_executor(S0, **rules)
    batcher.hear("e2", S0)
    return batcher


def silent(batcher: Batcher, *executors: str, busy: tuple[Slot, ...] = (S0,)) -> None:
    """Until its batch is overdue, while all executors beat."""
    for _ in range(10):
        for executor in executors:
            batcher.hear(executor, busy=busy) if executor == "e1" else batcher.hear(executor, S0)
        batcher.decide(batcher.now + LEASE_US // 10)
