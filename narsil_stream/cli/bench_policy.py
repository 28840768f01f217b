"""A scheduler and a batcher by themselves beside a fixed loop: parts of `narsil bench gate`.

Processor time of this thread, in turns. The loop does what a scheduler's code does, with no code of ours in it: what
changes their ratio is a change of ours, whatever the machine and its Python.
"""

import asyncio
import gc
import heapq
import time
from collections.abc import Callable, Mapping
from itertools import count

from narsil_stream.actors.decisions import Dispatch, Rules
from narsil_stream.actors.queue import ModelKey, Ticket
from narsil_stream.actors.scheduling import Scheduler
from narsil_stream.cli import bench_batcher
from narsil_stream.schemas.internal import ExecutorBeat, Lease, ModelRef, Result, Slot

ROUNDS = 9
LOOPS = 100_000
CYCLES = 100
IN_FLIGHT, ROWS, SLOTS = 64, 100, 2
BUDGET_US, SERVICE_US = 1_000_000, 1_000
MODEL = ModelKey("m", "1", "digest")
RULES = Rules(
    max_rows=1_600,
    max_bytes=8 << 20,
    queue_rows=100_000,
    queue_bytes=64 << 20,
    lease_us=10_000_000,
    failover_floor_us=50_000,
    failover_factor=4.0,
)


class _Item:
    __slots__ = ("due", "number")

    def __init__(self, number: int, due: int) -> None:
        self.number = number
        self.due = due

    def late(self, now: int) -> bool:
        return self.due < now


def fixed_loop(loops: int = LOOPS) -> float:
    """Seconds for each turn of a loop that makes objects, calls methods and keeps a heap and a dictionary."""
    heap: list[tuple[int, int, _Item]] = []
    known: dict[int, _Item] = {}
    late = 0
    started = time.thread_time()
    for number in range(loops):
        item = _Item(number, number * 7 % 1_000)
        known[number] = item
        heapq.heappush(heap, (item.due, number, item))
        if len(heap) > IN_FLIGHT:
            _, old, item = heapq.heappop(heap)
            late += item.late(number)
            del known[old]
    return (time.thread_time() - started) / loops


def scheduled(cycles: int = CYCLES) -> float:
    """Seconds for each ticket that is offered, cut into a batch, sent, scored and answered: `IN_FLIGHT` at a time."""
    ids, generations = count(1), count(1)
    policy = Scheduler("b", RULES)
    now = 0
    slots = [Slot(index, next(generations)) for index in range(SLOTS)]
    leases = tuple(Lease("b", slot, False) for slot in slots)
    policy.beat(ExecutorBeat("e", (ModelRef(*MODEL),), SLOTS, leases), now)
    scores = memoryview(bytes(4 * RULES.max_rows))
    started = time.thread_time()
    for _ in range(cycles):
        for _ in range(IN_FLIGHT):
            policy.offer(Ticket(next(ids), MODEL, ROWS, 15_600, 128, now, now + BUDGET_US), now)
        answered = 0
        while answered < IN_FLIGHT:
            sent = [one for one in policy.decide(now) if isinstance(one, Dispatch)]
            policy.wake_us(now)
            now += SERVICE_US
            for one in sent:
                grant = Slot(one.slot.index, next(generations))
                tickets, _ = policy.result(
                    Result(one.batch, one.executor, scores[: 4 * one.rows], SERVICE_US, grant=grant), now
                )
                answered += len(tickets)
            if not sent:
                raise AssertionError("the scheduler sent nothing while tickets waited")
    return (time.thread_time() - started) / cycles / IN_FLIGHT


def scheduler(rounds: int = ROUNDS) -> Mapping[str, list[float]]:
    return {"scheduler": _ratios(scheduled, rounds)}


def batcher(rounds: int = ROUNDS) -> Mapping[str, list[float]]:
    return {"batcher": _ratios(lambda: asyncio.run(bench_batcher.measured("bundle", ROWS)) / 1e6, rounds)}


def _ratios(ours: Callable[[], float], rounds: int) -> list[float]:
    """How many of ours are done while the loop turns once. The loop runs before and after: clocks change speed."""
    ours()  # warm
    found = []
    for _ in range(rounds):
        gc.collect()
        before = fixed_loop()
        each = ours()
        found.append((before + fixed_loop()) / 2 / each)
    return found
