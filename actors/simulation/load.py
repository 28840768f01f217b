"""One batcher and its executors under an open-loop load, without faults: for figures of how well a policy does.

A device computes one batch at a time, or one in each of its lanes, and takes a known time for it: simulated, not
measured. Arrivals are Poisson, sizes heavy-tailed, budgets mixed. Ours is the real `Scheduler` behind a bus; rivals
(`rivals`) sit on the device.
"""

import random
from collections import deque
from collections.abc import Iterable, Sequence
from functools import cache
from heapq import heappop, heappush, heapreplace
from itertools import count
from typing import Any, NamedTuple, Protocol

from msgspec import Struct

from narsil_stream.actors.adaptive import Step
from narsil_stream.actors.decisions import Decision, Dispatch, Drop, Rules
from narsil_stream.actors.queue import ModelKey, State, Ticket
from narsil_stream.actors.scheduling import FLOAT_BYTES, Scheduler
from narsil_stream.schemas.errors import Refused
from narsil_stream.schemas.internal import ExecutorBeat, Lease, ModelRef, Result, Slot

MODEL = ModelKey("m", "1", "digest")
MAX_ROWS = 1_024
BUS_US = 100
BUDGETS_US = (20_000, 50_000, 100_000)
MEDIAN_ROWS, SIGMA = 30, 1.2
"""Of the log-normal sizes, cut off at `MAX_ROWS`: the mean is about 60 rows, one request in a hundred has over 480."""
RULES = Rules(
    max_rows=MAX_ROWS,
    max_bytes=1 << 30,
    queue_rows=65_536,
    queue_bytes=1 << 30,
    lease_us=1 << 50,
    failover_floor_us=50_000,
    failover_factor=4.0,
)


class Device(NamedTuple):
    """µs of a pass: a fixed part, and so much for each row; beyond `knee_rows` `knee` times as much."""

    fixed_us: float = 1_000
    row_us: float = 5.0
    knee_rows: int = MAX_ROWS
    knee: float = 1.0

    def pass_us(self, rows: int) -> int:
        return int(self.fixed_us + self.row_us * (rows + (self.knee - 1) * max(0, rows - self.knee_rows)))

    @property
    def rows_per_us(self) -> float:
        """At the most efficient batch: 100 % of the load for one executor."""
        return max(rows / self.pass_us(rows) for rows in (MAX_ROWS, self.knee_rows))


class Arrival(NamedTuple):
    number: int
    at_us: int
    rows: int
    budget_us: int

    @property
    def deadline_us(self) -> int:
        return self.at_us + self.budget_us


class Stretch(NamedTuple):
    """So much of the executors' capacity is asked for, for so long."""

    load: float
    for_us: int


def arrivals(seed: int, stretches: Iterable[Stretch], device: Device, executors: int) -> list[Arrival]:
    rng = random.Random(seed)
    came: list[Arrival] = []
    at_us = start_us = 0.0
    for stretch in stretches:
        every_us = between_us(stretch.load, device, executors)
        start_us += stretch.for_us
        while (at_us := at_us + rng.expovariate(1 / every_us)) < start_us:
            came.append(Arrival(len(came), int(at_us), _size(rng), rng.choice(BUDGETS_US)))
        at_us = start_us
    return came


def between_us(load: float, device: Device, executors: int = 1) -> float:
    """Mean time from one request to the next at this load."""
    return _mean_rows() / (load * executors * device.rows_per_us)


@cache
def _mean_rows() -> float:
    rng = random.Random(0)
    return sum(_size(rng) for _ in range(50_000)) / 50_000


def _size(rng: random.Random) -> int:
    return min(MAX_ROWS, max(1, int(rng.lognormvariate(0, SIGMA) * MEDIAN_ROWS)))


class Score(Struct):
    """How a run went. Rows count, since they are what a device's capacity is made of."""

    offered_rows: int = 0
    good_rows: int = 0
    """Answered inside their budgets, until the last request came."""
    offered: int = 0
    timely: int = 0
    refused: int = 0
    """At once, on arrival."""
    missed: int = 0
    """Admitted, and answered too late or with an error."""
    batches: int = 0
    rows: int = 0
    busy_us: int = 0
    """Of all executors."""
    lasted_us: int = 0
    waits_us: list[int] = []
    """From arrival to a timely answer, in order of the answers."""
    answered_us: list[int] = []
    """When each of them came."""

    def quantile(self, share: float) -> int:
        """µs until an answer, of those that came in time; 0: none did."""
        ranked = sorted(self.waits_us)
        return ranked[min(len(ranked) - 1, int(share * len(ranked)))] if ranked else 0

    def goodput(self, executors: int, device: Device) -> float:
        """Rows answered in time, as a part of the executors' capacity."""
        return self.good_rows / (self.lasted_us * executors * device.rows_per_us)


class Run:
    """The clock, the devices and the score of one run."""

    def __init__(self, came: Sequence[Arrival], device: Device, executors: int, lanes: int = 1) -> None:
        self.now = 0
        self.came = came
        self.device = device
        self.free_us = [[0] * lanes for _ in range(executors)]
        """When each lane of each device has done all that it has; heaps."""
        self.score = Score(lasted_us=came[-1].at_us, waits_us=[], answered_us=[])
        for arrival in came:
            self.score.offered += 1
            self.score.offered_rows += arrival.rows
        self._due: list[tuple[int, int, Any]] = []
        self._order = count()

    def at(self, when_us: int, what: Any) -> None:
        heappush(self._due, (when_us, next(self._order), what))

    def next_us(self) -> int | None:
        return self._due[0][0] if self._due else None

    def pop(self) -> Any:
        self.now, _, what = heappop(self._due)
        return what

    def compute(self, executor: int, rows: int) -> int:
        """When the device is done with it. Its time counts as busy until the last request comes."""
        start_us = max(self.now, self.free_us[executor][0])
        took_us = self.device.pass_us(rows)
        heapreplace(self.free_us[executor], start_us + took_us)
        self.score.batches += 1
        self.score.rows += rows
        self.score.busy_us += max(0, min(start_us + took_us, self.score.lasted_us) - start_us)
        return start_us + took_us

    def ended(self, arrival: Arrival, scored: bool) -> None:
        """Answered now."""
        score = self.score
        if scored and self.now <= arrival.deadline_us:
            score.timely += 1
            score.good_rows += arrival.rows if self.now <= score.lasted_us else 0
            score.waits_us.append(self.now - arrival.at_us)
            score.answered_us.append(self.now)
        else:
            score.missed += 1


class _Sent(NamedTuple):
    """A batch that arrives at its executor."""

    dispatch: Dispatch


class _Done(NamedTuple):
    """A result that arrives at the batcher."""

    result: Result


class _Wake(NamedTuple):
    due_us: int


class Ours:
    """The real policy. Batches and results are `BUS_US` on their way, and each executor gives all its slots to the one
    batcher."""

    def __init__(
        self, came: Sequence[Arrival], device: Device, executors: int = 1, rules: Rules = RULES, lanes: int = 1
    ) -> None:
        self.run = Run(came, device, executors, lanes)
        self.policy = Scheduler("b", rules)
        self.steps: list[Step] = []
        for index in range(executors):
            leases = tuple(Lease("b", Slot(slot, 0), False) for slot in range(lanes + 1))
            self.policy.beat(ExecutorBeat(f"e{index}", (ModelRef(*MODEL),), lanes + 1, leases, lanes=(lanes,)), 0)
        self._woken_us: int | None = None

    def play(self) -> Score:
        run, waiting = self.run, deque(self.run.came)
        while waiting or run.next_us() is not None:
            due_us = run.next_us()
            if waiting and (due_us is None or waiting[0].at_us <= due_us):
                arrival = waiting.popleft()
                run.now = arrival.at_us
                self._offer(arrival)
            else:
                what = run.pop()
                self._take(what)
                if isinstance(what, _Sent):
                    continue
            self._decide()
        return run.score

    def _offer(self, arrival: Arrival) -> None:
        now = self.run.now
        ticket = Ticket(arrival.number, MODEL, arrival.rows, 0, 128, now, arrival.deadline_us, arrival)
        try:
            self.policy.offer(ticket, now)
        except Refused:
            self.run.score.refused += 1

    def _take(self, what: _Sent | _Done | _Wake) -> None:
        run = self.run
        if isinstance(what, _Sent):
            sent = what.dispatch
            done_us = run.compute(int(sent.executor[1:]), sent.rows)
            slot = Slot(sent.slot.index, sent.slot.generation + 1)
            scores = memoryview(bytes(FLOAT_BYTES * sent.rows))
            result = Result(sent.batch, sent.executor, scores, run.device.pass_us(sent.rows), grant=slot)
            run.at(done_us + BUS_US, _Done(result))
        elif isinstance(what, _Done):
            tickets, decisions = self.policy.result(what.result, run.now)
            self._act(decisions)
            for ticket in tickets:
                if ticket.state is not State.DONE:
                    ticket.state = State.DONE
                    run.ended(ticket.payload, scored=True)
        elif what.due_us == self._woken_us:
            self._woken_us = None

    def _decide(self) -> None:
        run, policy = self.run, self.policy
        self._act(policy.decide(run.now))
        if policy.tuner.steps:
            self.steps += policy.tuner.steps
            policy.tuner.steps.clear()
        wake_us = policy.wake_us(run.now) if run.next_us() is not None or policy.rows else None
        if wake_us is not None and wake_us < RULES.lease_us and (self._woken_us is None or wake_us < self._woken_us):
            self._woken_us = max(wake_us, run.now + 1)
            run.at(self._woken_us, _Wake(self._woken_us))

    def _act(self, decisions: Iterable[Decision]) -> None:
        for decision in decisions:
            if isinstance(decision, Dispatch):
                self.run.at(self.run.now + BUS_US, _Sent(decision))
            elif isinstance(decision, Drop):
                self.run.ended(decision.ticket.payload, scored=False)


class Rival(Protocol):
    """A policy that cuts batches for a device that is free. Requests whose budget is over are not computed."""

    def offer(self, arrival: Arrival) -> bool:
        """Whether it is admitted."""

    def cut(self, now_us: int) -> tuple[list[Arrival], list[Arrival], int | None]:
        """The batch, empty: none yet; what has expired meanwhile; when to ask again without an event."""


def play(rival: Rival, came: Sequence[Arrival], device: Device, executors: int = 1) -> Score:
    """`rival` under this load: without a bus, its results are there when the device is done."""
    run = Run(came, device, executors)
    waiting = deque(came)
    idle = list(range(executors))
    while waiting or run.next_us() is not None:
        due_us = run.next_us()
        if waiting and (due_us is None or waiting[0].at_us <= due_us):
            arrival = waiting.popleft()
            run.now = arrival.at_us
            if not rival.offer(arrival):
                run.score.refused += 1
        else:
            batch, executor = run.pop()
            for arrival in batch:
                run.ended(arrival, scored=True)
            if executor is not None:
                idle.append(executor)
        while idle:
            batch, expired, again_us = rival.cut(run.now)
            for arrival in expired:
                run.ended(arrival, scored=False)
            if not batch:
                if again_us is not None:
                    run.at(max(again_us, run.now + 1), ((), None))
                break
            executor = idle.pop()
            run.at(run.compute(executor, sum(arrival.rows for arrival in batch)), (batch, executor))
    return run.score
