"""Who gets how much when there is not enough: the batcher's policy for some seconds, with an executor that takes a
fixed time for each batch. Nothing here depends on this machine's speed."""

from collections import Counter
from heapq import heapify, heappop, heappush
from typing import NamedTuple

from narsil_stream.actors.decisions import Dispatch
from narsil_stream.actors.queue import State, Ticket
from narsil_stream.schemas.errors import Refused
from narsil_stream.schemas.internal import Slot
from tests.actors.puppets import Batcher, ticket

PASS_US = 20_000
ROWS = 4
CAPACITY = ROWS * 1_000_000 // PASS_US
"""Rows a second."""
BUDGET_US = 300_000
LEARNING_US = 2_000_000
"""Ends before that do not count."""
SECONDS = 6


class Stream(NamedTuple):
    """Requests of one row, evenly."""

    tenant: str
    rate: int
    priority: int = 128


class Service:
    """A batcher with an executor of two slots that computes one batch after the other."""

    def __init__(self, **rules: object) -> None:
        bounds = {"queue_rows": 100_000, "queue_bytes": 10**9, "lease_us": 10**9}
        self.batcher = Batcher(max_rows=ROWS, **bounds, **rules)
        self.batcher.hear("e1", Slot(0, 0), Slot(1, 0))
        self.ends: Counter[tuple[str, int, str]] = Counter()
        """By tenant, priority and how."""
        self._free_us = 0

    def run(self, *streams: Stream) -> Counter[tuple[str, int, str]]:
        batcher = self.batcher
        events: list[tuple[int, int, Stream | Dispatch]] = [
            (at * 1_000_000 // stream.rate, which, stream)
            for which, stream in enumerate(streams)
            for at in range(stream.rate * SECONDS)
        ]
        heapify(events)
        while events:
            now, _, what = heappop(events)
            while (wake_us := batcher.policy.wake_us(batcher.now)) is not None and wake_us < now:
                batcher.now = max(batcher.now, wake_us)
                self._decide(events)
            batcher.now = now
            if isinstance(what, Stream):
                self._ask(what)
            else:
                self._answer(what)
            self._decide(events)
        return self.ends

    def _ask(self, stream: Stream) -> None:
        now = self.batcher.now
        one = ticket(tenant=stream.tenant, priority=stream.priority, arrived_us=now, deadline_us=now + BUDGET_US)
        try:
            self.batcher.offer(one)
        except Refused as refused:
            self._end(one, refused.fault.name)

    def _answer(self, sent: Dispatch) -> None:
        for one in self.batcher.answer(sent, PASS_US, grant=Slot(sent.slot.index, sent.slot.generation + 1)):
            if one.state is not State.DONE:
                one.state = State.DONE
                self._end(one, "scored")

    def _decide(self, events: list[tuple[int, int, Stream | Dispatch]]) -> None:
        for sent in self.batcher.decide():
            self._free_us = max(self._free_us, self.batcher.now) + PASS_US
            heappush(events, (self._free_us, -sent.batch, sent))
        for one, how in self.batcher.dropped():
            self._end(one, how)

    def _end(self, one: Ticket, how: str) -> None:
        if one.arrived_us >= LEARNING_US:
            self.ends[one.tenant, one.priority, how] += 1


def test_at_five_times_the_capacity_all_of_it_is_used_and_nothing_admitted_is_late():
    """Work that is admitted and not answered in time is done for nothing."""
    ends = Service().run(Stream("", 5 * CAPACITY))
    assert ends["", 128, "scored"] > 0.95 * CAPACITY * (SECONDS - 2)
    assert ends["", 128, "DEADLINE_EXCEEDED"] == 0


def test_a_greedy_tenant_gets_what_a_modest_one_leaves_and_is_the_one_refused():
    """One caller's flood is its own problem, and what it is admitted with is answered in time."""
    ends = Service().run(Stream("greedy", 4 * CAPACITY), Stream("modest", CAPACITY // 4))
    assert ends["modest", 128, "scored"] == CAPACITY // 4 * (SECONDS - 2)
    assert ends["greedy", 128, "scored"] > 0.95 * 3 / 4 * CAPACITY * (SECONDS - 2)
    assert ends["greedy", 128, "DEADLINE_EXCEEDED"] == 0


def test_two_tenants_that_both_ask_for_too_much_get_the_same():
    """However much more the one asks for."""
    ends = Service().run(Stream("a", 4 * CAPACITY), Stream("b", CAPACITY))
    a, b = ends["a", 128, "scored"], ends["b", 128, "scored"]
    assert abs(a - b) < 0.05 * (a + b)
    assert a + b > 0.95 * CAPACITY * (SECONDS - 2)


def test_weights_divide_what_there_is():
    """Three parts are three times one part."""
    ends = Service(weights={"gold": 3.0}).run(Stream("gold", 2 * CAPACITY), Stream("free", 2 * CAPACITY))
    gold, free = ends["gold", 128, "scored"], ends["free", 128, "scored"]
    assert 2.7 < gold / free < 3.3


def test_less_urgent_requests_get_what_urgent_ones_leave_and_the_others_are_refused_at_once():
    """The wait counts urgent requests that have not come yet: without that, most were admitted to expire."""
    ends = Service(ageing=0.1).run(Stream("", CAPACITY * 3 // 4, 1), Stream("", CAPACITY * 3 // 2))
    assert ends["", 1, "scored"] == CAPACITY * 3 // 4 * (SECONDS - 2)
    assert ends["", 128, "scored"] > 0.9 / 4 * CAPACITY * (SECONDS - 2)
    assert ends["", 128, "DEADLINE_EXCEEDED"] <= 0.003 * ends["", 128, "scored"]


def test_urgent_requests_alone_are_too_many_and_less_urgent_ones_still_get_their_share():
    """They would starve for as long as the overload lasts."""
    ends = Service(ageing=0.1).run(Stream("", 2 * CAPACITY, 1), Stream("", 2 * CAPACITY))
    urgent, less = ends["", 1, "scored"], ends["", 128, "scored"]
    assert 0.05 < less / (urgent + less) < 0.12, "admission is careful: not all of the share is used"
    assert urgent + less > 0.95 * CAPACITY * (SECONDS - 2)
