"""Refusing at the door what batchers would refuse: how much under overload, and never without need."""

from hypothesis import given
from hypothesis import strategies as st

from narsil_stream.core.throttle import LASTS_US, MOST_FLOWS, Flow, Throttle, kind
from narsil_stream.schemas.errors import Fault, Refused

SECOND_US = 1_000_000


class Door:
    """Requests come evenly; batchers accept `capacity` a second of those that get through, and answer at once."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.now = 0
        self.flow = Flow(0)
        self.room = 0.0

    def load(self, rate: int, seconds: float) -> tuple[int, int, int]:
        """How many were accepted, refused by batchers, refused here."""
        accepted = refused = throttled = 0
        for _ in range(int(rate * seconds)):
            step_us = SECOND_US // rate
            self.now += step_us
            self.room = min(10.0, self.room + self.capacity * step_us / SECOND_US)
            try:
                self.flow.check(self.now)
            except Refused:
                throttled += 1
                continue
            if self.room >= 1:
                self.room -= 1
                accepted += 1
                self.flow.accepted(self.now)
            else:
                refused += 1
                self.flow.refused(5_000, self.now)
        return accepted, refused, throttled


def test_at_five_times_the_capacity_most_are_refused_here():
    """Each one that gets through to be refused costs the broker and a batcher as much as one that is scored."""
    door = Door(1_000)
    door.load(5_000, 1)
    accepted, refused, throttled = door.load(5_000, 2)
    assert throttled > 0.6 * 10_000
    assert throttled > 4 * refused
    assert accepted > 0.97 * 2 * door.capacity, "what can be served is served"


def test_when_the_load_falls_everybody_gets_through_within_a_second():
    """A throttle that holds on makes an outage out of a peak."""
    door = Door(1_000)
    door.load(5_000, 2)
    door.load(800, 1)
    assert door.load(800, 1) == (800, 0, 0)


@given(st.lists(st.tuples(st.integers(0, 100_000), st.booleans()), max_size=300))
def test_nobody_is_refused_here_while_batchers_refuse_less_than_a_third(steps: list[tuple[int, bool]]):
    """Callers whom a batcher would have served would be sent away."""
    flow, now = Flow(0), 0
    since = 3
    for pause_us, refuse in steps:
        now += pause_us
        flow.check(now)
        if refuse and since >= 3:
            flow.refused(1_000, now)
            since = 0
        else:
            flow.accepted(now)
            since += 1


@given(st.integers(1, 2_000), st.integers(0, 10 * SECOND_US))
def test_a_second_after_the_last_refusal_nobody_is_refused_here(refusals: int, more_us: int):
    """It can only be found out that batchers accept again if somebody gets through."""
    flow = Flow(0)
    for _ in range(refusals):
        flow.refused(5 * SECOND_US, 0)
    for _ in range(100):
        flow.check(LASTS_US + more_us)


def test_a_refusal_says_when_the_batcher_wanted_to_be_asked_again():
    """Whoever comes back at once is refused again."""
    flow = Flow(0)
    for _ in range(100):
        flow.refused(300_000, 0)
    raised = []
    for _ in range(10):
        try:
            flow.check(100_000)
        except Refused as refused:
            raised.append(refused)
    assert raised
    assert {(refused.fault, refused.retry_after_us) for refused in raised} == {(Fault.OVERLOADED, 200_000)}


def test_kinds_of_requests_are_told_apart():
    """One tenant's overload, or the refusal of requests with no time, would send all others away."""
    throttle = Throttle()
    base = kind("m", "", "a", 1, 1_000_000)
    others = (
        kind("n", "", "a", 1, 1_000_000),
        kind("m", "2", "a", 1, 1_000_000),
        kind("m", "", "b", 1, 1_000_000),
        kind("m", "", "a", 2, 1_000_000),
        kind("m", "", "a", 1, 9_000),
    )
    for other in others:
        assert throttle.flow(base, 0) is not throttle.flow(other, 0)
    assert throttle.flow(base, 0) is throttle.flow(kind("m", "", "a", 1, 1_000_001), 0)


def test_the_kinds_that_are_kept_are_bounded():
    """Names of tenants come from outside: they must not fill the memory."""
    throttle = Throttle()
    for number in range(3 * MOST_FLOWS):
        throttle.flow(kind("m", "", str(number), 1, 1_000), number)
    assert len(throttle._flows) <= MOST_FLOWS
