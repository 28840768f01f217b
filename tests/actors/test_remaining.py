"""What a batcher predicts of executors that compute several batches at once: when the next one would begin."""

from heapq import heappop, heappush

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narsil_stream.actors.flights import Executor, Flight, Group
from narsil_stream.actors.simulation.comparison import DEVICES
from narsil_stream.actors.simulation.load import Ours, Stretch, arrivals
from narsil_stream.schemas.internal import ExecutorBeat, Lease, ModelRef, Slot
from tests.actors.puppets import MODEL, OTHER, Batcher, ticket

LANES = st.integers(1, 4)
PAUSE_US = st.integers(0, 3_000)
PASS_US = st.integers(1, 2_000)
SENDINGS = st.lists(st.tuples(PAUSE_US, PASS_US), max_size=25)


class Device:
    """Batches as they would really go: each begins when a lane is free, in order. Ways take no time."""

    def __init__(self, lanes: int) -> None:
        self.known = Executor("e", 0, lanes=lanes)
        self._lanes = [0] * lanes
        self._ends: list[tuple[int, int]] = []
        self._sent = 0

    def send(self, now_us: int, pass_us: int) -> None:
        self._land(now_us)
        self._sent += 1
        starts_us = max(now_us, heappop(self._lanes))
        heappush(self._lanes, starts_us + pass_us)
        heappush(self._ends, (starts_us + pass_us, self._sent))
        self.known.flights[self._sent] = Flight(
            self._sent, Group(MODEL, ()), Slot(self._sent, 0), [], 1, now_us, pass_us, 0, 1 << 60
        )
        self.known.begin(now_us)

    def _land(self, now_us: int) -> None:
        while self._ends and self._ends[0][0] <= now_us:
            end_us, batch = heappop(self._ends)
            del self.known.flights[batch]
            self.known.begin(end_us)

    def look(self, now_us: int) -> tuple[int, int]:
        """µs until a batch would begin, and all that is to be computed, as it really is."""
        self._land(now_us)
        return max(0, self._lanes[0] - now_us), sum(max(0, end_us - now_us) for end_us in self._lanes)


@given(LANES, SENDINGS, PAUSE_US)
def test_when_times_are_as_predicted_it_is_known_when_the_next_batch_begins(
    lanes: int, sendings: list[tuple[int, int]], later_us: int
):
    """Batches would be cut too early or too late, and requests refused that can be answered."""
    device, now_us = Device(lanes), 0
    for pause_us, pass_us in sendings:
        now_us += pause_us
        device.send(now_us, pass_us)
    now_us += later_us
    begins_us, left_us = device.look(now_us)
    assert device.known.remaining_us(MODEL, now_us) == begins_us
    assert device.known.busy_us(now_us) == left_us
    assert (begins_us == 0) == device.known.idle(MODEL)


@given(LANES, SENDINGS, st.integers(1, 100_000))
def test_a_batch_that_takes_longer_than_predicted_counts_as_about_to_end(
    lanes: int, sendings: list[tuple[int, int]], late_us: int
):
    """Nothing that waits behind it gets shorter by its being late, and nothing takes negative time."""
    device = Device(lanes)
    for _, pass_us in sendings:
        device.send(0, pass_us)
    waiting_us = sum(pass_us for _, pass_us in sendings[lanes:])
    late_us += max((pass_us for _, pass_us in sendings), default=0)
    assert device.known.busy_us(late_us) == waiting_us
    assert 0 <= device.known.remaining_us(MODEL, late_us) <= waiting_us


def hear(batcher: Batcher, executor: str, slots: int, *lanes: int) -> None:
    """`lanes`: of the first model, and of another one."""
    leases = tuple(Lease("b", Slot(index, 0), False) for index in range(slots))
    models = tuple(ModelRef(*key) for key in (MODEL, OTHER)[: max(1, len(lanes))])
    batcher.policy.beat(ExecutorBeat(executor, models, slots, leases, lanes=lanes), batcher.now)


def test_an_executor_that_does_not_say_computes_in_all_but_one_of_its_slots():
    """One of an older version is taken as before."""
    batcher = Batcher()
    hear(batcher, "old", 3)
    hear(batcher, "new", 3, 1)
    assert {name: one.lanes for name, one in batcher.policy.executors.items()} == {"old": 2, "new": 1}


def test_a_second_lane_takes_what_waits_at_once():
    """It would be idle while one batch computes."""
    batcher = Batcher()
    hear(batcher, "e1", 3, 2)
    batcher.teach(1, 10_000)
    for expected in (1, 1, 0):
        batcher.offer(ticket())
        assert len(batcher.decide()) == expected, "the third one is cut when a lane is about to be free"
    assert batcher.policy.wake_us(0) == 10_000


def test_two_lanes_serve_a_backlog_in_half_the_time():
    """Requests that can be answered would be refused, at half of what the executor carries."""
    waits = []
    for lanes in (1, 2):
        batcher = Batcher()
        hear(batcher, "e1", lanes + 1, lanes)
        batcher.teach(8, 8_000)
        batcher.offer(*(ticket(rows=8) for _ in range(lanes + 1)))
        assert len(batcher.decide()) == lanes + 1
        batcher.offer(*(ticket(rows=8) for _ in range(4)))
        waits.append(batcher.policy.backlog_us(MODEL, 0))
    assert waits == [(2 + 4) * 8_000, (3 + 4) * 8_000 // 2]


def two_models() -> Batcher:
    """On an executor that computes two batches at once, of `MODEL` one."""
    batcher = Batcher()
    hear(batcher, "e1", 3, 1, 2)
    for model in (MODEL, OTHER):
        batcher.policy.forecast.times.observe(model, 1, 10_000)
    return batcher


def test_a_model_with_one_lane_waits_for_itself_and_not_for_others():
    """A lane that it cannot use is no room for it; one that it can use must not stand idle."""
    batcher = two_models()
    batcher.offer(ticket(model=OTHER))
    batcher.decide()
    batcher.offer(ticket())
    assert len(batcher.decide()) == 1, "beside the other model"
    batcher = two_models()
    batcher.offer(ticket())
    batcher.decide()
    batcher.offer(ticket())
    assert batcher.decide() == [], "there is a lane, but none for a second batch of it"
    batcher.offer(ticket(model=OTHER))
    assert [sent.model for sent in batcher.decide()] == [OTHER]


def test_the_wait_for_its_own_lane_is_no_overhead_of_the_way():
    """Requests that can make it would be called hopeless."""
    batcher = two_models()
    batcher.offer(*(ticket(rows=8) for _ in range(2)))
    first, second = batcher.decide()
    batcher.now = 10_100
    batcher.answer(first, 10_000)
    batcher.now = 20_100
    batcher.answer(second, 10_000)
    assert batcher.policy.forecast.times.overhead_us <= 100


def test_a_backlog_of_a_model_with_one_lane_takes_one_lane():
    """Twice as much would be admitted as can be served."""
    batcher = two_models()
    batcher.offer(*(ticket(rows=8) for _ in range(6)))
    waiting = len(batcher.decide())
    assert batcher.policy.backlog_us(MODEL, 0) >= (6 - waiting) * 80_000


def test_what_waits_behind_a_lost_batch_begins_when_that_counts_as_lost():
    """It would be taken for waiting until it lands, and what comes next be held back for it."""
    device = Device(1)
    device.send(0, 1_000)
    device.send(0, 1_000)
    lost, behind = device.known.flights.values()
    lost.late = True
    device.known.begin(500)
    assert behind.begun_us == 500
    assert device.known.remaining_us(MODEL, 500) == 1_000
    behind.late = True
    assert device.known.idle(MODEL)


@pytest.mark.parametrize("lanes", [2, 4])
def test_at_full_load_an_executor_with_lanes_answers_as_much_of_its_capacity_as_one_without(lanes: int):
    """Admission took lanes for one after the other: four of them answered three quarters of what they could."""
    device = DEVICES["straight"]
    came = arrivals(1, [Stretch(1.0, 1_000_000)], device, lanes)
    score = Ours(came, device, lanes=lanes).play()
    assert score.goodput(lanes, device) > 0.93
    assert score.missed == 0


# Near executors


def near(name: str) -> bool:
    return name == "own"


def test_of_two_idle_executors_the_one_in_the_same_process_is_asked():
    """The batch and its scores would cross the broker for nothing."""
    for order in (("own", "far"), ("far", "own")):
        batcher = Batcher(near=near)
        for name in order:
            hear(batcher, name, 2, 1)
        batcher.offer(ticket())
        (sent,) = batcher.decide()
        assert sent.executor == "own"


def test_a_near_executor_at_work_is_not_preferred_to_an_idle_one():
    """A hop takes microseconds, a forward pass milliseconds."""
    batcher = Batcher(near=near)
    for name in ("own", "far"):
        hear(batcher, name, 3, 2)
    batcher.offer(*(ticket(rows=8) for _ in range(3)))
    assert [sent.executor for sent in batcher.decide()] == ["own", "far", "own"]
