"""What a batcher makes of other batchers that use the same executors."""

from narsil_stream.schemas.errors import Fault
from narsil_stream.schemas.internal import Slot
from tests.actors.puppets import FLOOR_US, MODEL, Batcher, ticket

S0, S1 = Slot(0, 0), Slot(1, 0)


def beside_a_rival(rows: int, *slots: Slot) -> Batcher:
    batcher = Batcher()
    batcher.hear("e1", *slots, rival_rows=rows, rival_slots=(S1,))
    batcher.teach(rows=8, service_us=8_000)
    return batcher


def test_work_that_waits_at_other_batchers_counts_at_admission():
    """Each batcher would fill the executors up to the deadlines for itself: all together admit twice what is served in
    time, and whose turn comes is computed for callers who have left."""
    batcher = beside_a_rival(rows=80)
    assert batcher.refuses(ticket(rows=8, deadline_us=60_000)).fault is Fault.OVERLOADED
    batcher.offer(ticket(rows=8, deadline_us=120_000))


def test_of_the_work_elsewhere_only_the_part_counts_that_would_be_served_first():
    """A rival's patient requests would shut out urgent ones here, although executors take the urgent ones first."""
    batcher = beside_a_rival(rows=80)
    batcher.offer(*(ticket(rows=4) for _ in range(8)))
    batcher.offer(ticket(rows=4, deadline_us=60_000))
    assert batcher.refuses(ticket(rows=4, deadline_us=60_000, priority=255)).fault is Fault.OVERLOADED


def test_a_rival_that_has_nothing_left_is_forgotten_with_the_next_heartbeat():
    """Requests would be refused for work that is done."""
    batcher = beside_a_rival(rows=1_000)
    batcher.refuses(ticket())
    batcher.hear("e1", rival_rows=0)
    batcher.offer(ticket())


def test_a_batch_behind_that_of_a_rival_is_not_taken_for_lost():
    """A small batch behind a large one would be computed twice: under load, work for nobody."""
    batcher = Batcher()
    batcher.hear("e1", S0, rival_slots=(S1,))
    batcher.teach(rows=8, service_us=200_000)
    batcher.teach(rows=1, service_us=1_000)
    batcher.offer(ticket())
    batcher.decide()
    batcher.hear("e2", S0)
    assert batcher.decide(4 * FLOOR_US) == []
    assert batcher.decide(6 * FLOOR_US)[0].again


def test_the_wait_in_front_of_the_device_counts_once_requests_wait():
    """Admitted up to the last moment, they would expire while they are scored."""
    batcher = Batcher()
    batcher.hear("e1", S0)
    batcher.teach(rows=8, service_us=1_000)
    batcher.offer(ticket(rows=8))
    (sent,) = batcher.decide()
    batcher.now = 40_000
    batcher.answer(sent, service_us=1_000)
    batcher.offer(ticket(rows=1, arrived_us=40_000, deadline_us=60_000))
    assert batcher.refuses(ticket(rows=1, arrived_us=40_000, deadline_us=60_000)).fault is Fault.OVERLOADED
    assert batcher.policy.forecast.times.flight(MODEL) == 40_000
