"""The batcher's policy: who is taken in, who is refused, whose turn it is. Times are µs."""

import pytest

from narsil_stream.actors.forecast import MARGIN
from narsil_stream.schemas.errors import Fault
from narsil_stream.schemas.internal import Slot
from tests.actors.puppets import (
    BUDGET_US,
    MODEL,
    OTHER,
    S0,
    S1,
    Batcher,
    one_executor,
    ticket,
    two_executors,
)


def test_without_an_executor_requests_are_unavailable_at_once():
    """Callers would wait their whole budget for nobody."""
    batcher = Batcher()
    assert batcher.refuses(ticket()).fault is Fault.UNAVAILABLE
    batcher.hear("e1", S0, models=(OTHER,))
    refused = batcher.refuses(ticket())
    assert refused.fault is Fault.UNAVAILABLE
    assert refused.retry_after_us > 0


@pytest.mark.parametrize("large", [ticket(rows=9), ticket(size=1_001)])
def test_a_request_above_the_size_of_a_batch_is_too_large(large):
    """It could never be sent, and would sit in the queue until it expires."""
    assert one_executor().refuses(large).fault is Fault.TOO_LARGE


def test_the_queue_is_bounded_in_rows_and_in_bytes():
    """A bound in messages lets a few large ones fill the memory."""
    batcher = one_executor(queue_rows=10, queue_bytes=100)
    batcher.offer(ticket(rows=8))
    refused = batcher.refuses(ticket(rows=3))
    assert refused.fault is Fault.OVERLOADED
    assert refused.retry_after_us > 0
    assert not refused.by_deadline, "a later one would not have helped"
    batcher.offer(ticket(rows=1, size=90))
    assert batcher.refuses(ticket(rows=1, size=1)).fault is Fault.OVERLOADED
    assert (batcher.policy.rows, batcher.policy.bytes) == (9, 100)


def test_what_cannot_be_answered_in_time_is_refused_on_arrival():
    """It would take a place in a batch, and be answered too late all the same."""
    batcher = one_executor(S0)
    batcher.teach(rows=8, service_us=8_000)
    batcher.offer(ticket(rows=8))
    batcher.decide()
    batcher.offer(ticket(rows=8, deadline_us=19_000))
    answered_us = int(MARGIN * 16_000) + 8_000
    refused = batcher.refuses(ticket(rows=8, deadline_us=answered_us - 1_000))
    assert refused.fault is Fault.OVERLOADED
    assert refused.retry_after_us == 1_000
    assert refused.by_deadline
    batcher.offer(ticket(rows=8, deadline_us=answered_us))


def test_who_would_make_another_one_late_is_not_refused_for_its_own_deadline():
    """One that is due a little later goes behind that other one and has room: it must not be told the same."""
    batcher = one_executor(S0)
    batcher.teach(rows=8, service_us=8_000)
    batcher.offer(ticket(rows=8))
    batcher.decide()
    (before,) = batcher.offer(ticket(rows=8, deadline_us=19_000))
    refused = batcher.refuses(ticket(rows=8, deadline_us=18_100))
    assert (refused.fault, refused.by_deadline) == (Fault.OVERLOADED, False)
    batcher.offer(ticket(rows=8, deadline_us=before.deadline_us + 20_000))


def test_the_wait_is_predicted_from_how_fast_the_queue_moves():
    """Rival batchers and batches that are not full make it slower than passes and rows alone would say."""
    batcher = one_executor(S0)
    batcher.teach(rows=8, service_us=800)
    batcher.offer(*(ticket(rows=8, deadline_us=75_000) for _ in range(10)))
    for generation in range(1, 5):
        batcher.now += 8_000
        (sent,) = batcher.decide()
        batcher.answer(sent, service_us=800, grant=Slot(0, generation))
    assert batcher.policy.rows == 48
    assert batcher.policy.backlog_us(MODEL, batcher.now) == pytest.approx(48_000, abs=1)
    assert batcher.refuses(ticket(rows=8, deadline_us=batcher.now + 48_000)).fault is Fault.OVERLOADED


def test_how_slow_the_queue_once_was_does_not_count_when_it_is_empty():
    """A rival that has left would be held against everybody who comes later."""
    batcher = one_executor(S0)
    batcher.offer(*(ticket(rows=8) for _ in range(3)))
    for generation in range(1, 4):
        batcher.now += 90_000
        (sent,) = batcher.decide()
        batcher.answer(sent, service_us=800, grant=Slot(0, generation))
    batcher.policy.executors["e1"].free.clear()
    batcher.now += 1
    batcher.offer(ticket(rows=8, arrived_us=batcher.now))
    assert batcher.policy.backlog_us(MODEL, batcher.now) == 800


def test_only_what_is_served_before_it_counts_for_a_request():
    """A full queue of patient requests would shut out an urgent one that would go first anyway."""
    batcher = one_executor(S0)
    batcher.teach(rows=8, service_us=8_000)
    batcher.offer(ticket(rows=8))
    batcher.decide()
    batcher.offer(*(ticket(rows=8, priority=5) for _ in range(5)))
    batcher.offer(ticket(rows=8, priority=1, deadline_us=18_000))
    assert batcher.refuses(ticket(rows=8, priority=5, deadline_us=18_000)).fault is Fault.OVERLOADED


def test_work_under_way_counts_less_the_longer_it_runs():
    """A nearly finished batch would still refuse requests."""
    batcher = one_executor(S0, S1)
    batcher.teach(rows=8, service_us=8_000)
    batcher.offer(ticket(rows=8), ticket(rows=8))
    batcher.decide()
    assert batcher.policy.backlog_us(MODEL, 0) == 16_000
    assert batcher.policy.backlog_us(MODEL, 6_000) == 10_000


def test_two_executors_share_the_wait():
    """Half of the capacity would be refused."""
    batcher = two_executors()
    batcher.teach(rows=8, service_us=8_000)
    batcher.offer(*(ticket(rows=8) for _ in range(4)))
    assert batcher.policy.backlog_us(MODEL, 0) == 16_000


def test_one_slow_pass_does_not_shut_out_everybody_for_good():
    """Who predicts too long a pass refuses all, measures nothing new, and stays with its prediction forever."""
    batcher = one_executor()
    batcher.teach(rows=1, service_us=10 * BUDGET_US)
    batcher.offer(ticket())
    assert len(batcher.decide()) == 1
    assert batcher.refuses(ticket()).fault is Fault.OVERLOADED, "one at a time finds out"


# Ageing and tenants


def served_under_pressure(batcher: Batcher, rounds: int, **low: object) -> tuple[int, int]:
    """Rows of class 1 and of class 128 that are sent while there is always more of class 1 than fits."""
    urgent = less = 0
    for at in range(rounds):
        batcher.offer(
            *(ticket(arrived_us=batcher.now, deadline_us=batcher.now + BUDGET_US, priority=1) for _ in "12345678")
        )
        (sent,) = batcher.decide()
        urgent += sum(one.rows for one in sent.tickets if one.priority == 1)
        less += sum(one.rows for one in sent.tickets if one.priority == 128)
        batcher.answer(sent, grant=Slot(0, at + 1))
        batcher.now += 10_000
        batcher.hear("e1", Slot(0, at + 1), total=1)
    return urgent, less


@pytest.mark.parametrize(("ageing", "expected"), [(0.0, 0), (0.25, 40)])
def test_less_urgent_work_gets_its_share_once_it_has_aged(ageing: float, expected: int):
    """Strict priorities starve: without a share it would wait until its budget is gone."""
    batcher = one_executor(S0, ageing=ageing, queue_rows=10_000, queue_bytes=100_000)
    batcher.offer(*(ticket() for _ in range(100)))
    batcher.now = BUDGET_US // 2
    urgent, less = served_under_pressure(batcher, 20)
    assert urgent + less == 160
    assert abs(less - expected) <= 4


def test_work_that_has_not_aged_waits_for_more_urgent_work():
    """Priorities would mean little while there is time."""
    batcher = one_executor(S0, ageing=0.25, queue_rows=10_000, queue_bytes=100_000)
    batcher.offer(*(ticket() for _ in range(100)))
    assert served_under_pressure(batcher, 20) == (160, 0)


def test_a_tenant_that_overloads_the_queue_is_refused_before_others():
    """One caller's flood would be everybody's outage."""
    batcher = one_executor(S0, queue_rows=80)
    batcher.offer(ticket(tenant="modest"), *(ticket(tenant="greedy") for _ in range(69)))
    assert batcher.refuses(ticket(tenant="greedy")).fault is Fault.OVERLOADED
    batcher.offer(*(ticket(tenant="modest") for _ in range(10)))
    assert "queue is full" in batcher.refuses(ticket(tenant="modest")).detail


def test_after_a_refusal_for_overload_more_are_expected_for_a_moment():
    """Requests are then checked against the queue before their tensors are looked at; later that would cost twice."""
    batcher = one_executor(S0, queue_rows=8)
    assert not batcher.policy.overloaded(batcher.now)
    batcher.offer(ticket(rows=8))
    batcher.refuses(ticket())
    assert batcher.policy.overloaded(batcher.now)
    assert not batcher.policy.overloaded(batcher.now + 1_000_000)


def test_a_tenant_alone_may_fill_the_queue():
    """Room that nobody else wants is no use to anybody."""
    batcher = one_executor(S0, queue_rows=80)
    batcher.offer(*(ticket(tenant="only") for _ in range(80)))


def test_the_predicted_wait_of_a_modest_tenant_does_not_count_the_others_backlog():
    """It would be refused although its turn comes soon."""
    batcher = one_executor(S0, queue_rows=10_000, queue_bytes=100_000)
    batcher.teach(8, 8_000)
    batcher.offer(*(ticket(tenant="greedy") for _ in range(794)))
    assert batcher.refuses(ticket(tenant="greedy")).fault is Fault.OVERLOADED
    batcher.offer(ticket(tenant="modest", deadline_us=100_000))
