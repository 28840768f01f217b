"""What a batch takes along, when it leaves, and who has no chance: by predicted times."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from narsil_stream.actors.service_time import TRUSTED
from narsil_stream.schemas.errors import Fault
from narsil_stream.schemas.internal import Slot
from tests.actors.puppets import MODEL, OTHER, Batcher, ticket

S0, S1 = Slot(0, 0), Slot(1, 0)
FIXED_US, ROW_US = 1_000, 100


def taught(*slots: Slot, **rules: object) -> Batcher:
    """One executor, whose passes take `FIXED_US` and `ROW_US` for each row."""
    batcher = Batcher(**({"max_rows": 64, "queue_rows": 1_000} | rules))
    batcher.hear("e1", *(slots or (S0,)))
    for rows in (1, 2, 4, 8, 16, 32, 64):
        for _ in range(TRUSTED):
            batcher.teach(rows, pass_us(rows))
    return batcher


def pass_us(rows: int) -> int:
    return FIXED_US + ROW_US * rows


def test_a_batch_is_cut_so_that_its_earliest_deadline_is_met():
    """Company would make the first one late: a smaller batch is faster."""
    batcher = taught()
    batcher.offer(ticket(rows=4, deadline_us=pass_us(20)), *(ticket(rows=8) for _ in range(4)))
    (sent,) = batcher.decide()
    assert [one.rows for one in sent.tickets] == [4, 8, 8]


def test_a_batch_behind_another_one_counts_what_that_takes():
    """Its deadline does not wait for the device to be free."""
    batcher = taught(S0, S1)
    batcher.offer(ticket(rows=64))
    batcher.decide()
    batcher.offer(ticket(rows=8, deadline_us=2 * pass_us(64)), ticket(rows=64))
    batcher.now = pass_us(64)
    (sent,) = batcher.decide()
    assert [one.rows for one in sent.tickets] == [8]


@given(st.lists(st.tuples(st.integers(1, 32), st.integers(1_200, 30_000)), min_size=1, max_size=30))
def test_whoever_is_sent_is_predicted_to_be_in_time_unless_he_goes_alone(wishes: list[tuple[int, int]]):
    """Admission, order and cut together keep what admission has promised."""
    batcher = taught()
    for rows, deadline_us in wishes:
        one = ticket(rows=rows, deadline_us=deadline_us)
        try:
            batcher.policy.offer(one, 0)
        except Exception as refused:
            assert getattr(refused, "fault", None) in (Fault.OVERLOADED, Fault.DEADLINE_EXCEEDED)
    for sent in batcher.decide():
        due_us = min(one.deadline_us for one in sent.tickets)
        assert len(sent.tickets) == 1 or pass_us(sent.rows) <= due_us + 1


@given(st.integers(1, 64), st.integers(1, 20_000))
def test_who_cannot_make_it_even_alone_is_refused_and_who_can_is_not(rows: int, budget_us: int):
    """A device that is free would compute for nobody, or stand idle although it could help."""
    batcher = taught()
    one = ticket(rows=rows, deadline_us=budget_us)
    needs_us = batcher.policy.forecast.times.at_least(MODEL, rows)
    if needs_us > budget_us:
        assert batcher.refuses(one).fault is Fault.DEADLINE_EXCEEDED
    else:
        batcher.offer(one)
        (sent,) = batcher.decide()
        assert sent.tickets == [one]


def test_who_cannot_make_it_any_more_is_told_at_once():
    """Triton told so when the running batch had ended; the caller could long have asked somebody else."""
    batcher = taught()
    batcher.offer(ticket(rows=64))
    batcher.decide()
    (late,) = batcher.offer(ticket(rows=1, deadline_us=pass_us(64) * 2))
    batcher.policy.executors["e1"].flights.clear()
    hopeless_us = late.deadline_us - pass_us(1) + 1
    assert batcher.policy.wake_us(0) is not None and batcher.policy.wake_us(0) <= hopeless_us
    batcher.decide(hopeless_us)
    assert batcher.dropped() == [(late, "DEADLINE_EXCEEDED")]


def test_a_newcomer_does_not_push_out_whoever_was_admitted_before():
    """By deadlines it goes first; the promise to those behind it would be broken, and their waiting lost."""
    batcher = taught()
    batcher.offer(ticket(rows=64))
    batcher.decide()
    batcher.offer(*(ticket(rows=64, deadline_us=80_000) for _ in range(7)))
    assert batcher.refuses(ticket(rows=64, deadline_us=60_000)).fault is Fault.OVERLOADED
    batcher.offer(ticket(rows=64, deadline_us=60_000, priority=1))


def test_a_cold_start_does_not_refuse_for_the_sake_of_batches_that_are_not_there():
    """Full batches are not measured yet, and in proportion to a lone row they would take seconds."""
    batcher = Batcher(max_rows=4_096, queue_rows=65_536, max_bytes=1_000_000, queue_bytes=1_000_000)
    batcher.hear("e1", S0)
    batcher.teach(1, 1_000)
    batcher.offer(ticket())
    batcher.decide()
    batcher.offer(*(ticket() for _ in range(40)))
    batcher.offer(ticket(deadline_us=60_000))


# When it leaves


def test_a_batch_for_a_busy_executor_leaves_just_in_time():
    """Cut at once it would wait there, and who comes meanwhile would wait for one pass more."""
    batcher = taught(S0, S1)
    batcher.offer(ticket(rows=64))
    batcher.decide()
    (early,) = batcher.offer(ticket())
    assert batcher.decide() == []
    due_us = batcher.policy.wake_us(0)
    assert due_us == pass_us(64)
    batcher.now = due_us - 1
    (later,) = batcher.offer(ticket(arrived_us=due_us - 1))
    batcher.now = due_us
    (sent,) = batcher.decide()
    assert sent.tickets == [early, later]


def test_a_full_batch_leaves_at_once_for_a_busy_executor():
    """Nobody could join it, and the device would stand still until it is there."""
    batcher = taught(S0, S1)
    batcher.offer(*(ticket(rows=64) for _ in range(2)))
    assert [sent.rows for sent in batcher.decide()] == [64, 64]


def test_an_executor_that_computes_several_at_once_gets_the_second_batch_at_once():
    """Its other lanes are idle."""
    batcher = Batcher(max_rows=64, queue_rows=1_000)
    batcher.hear("e1", S0, S1, Slot(2, 0), total=3)
    batcher.teach(1, 1_000)
    batcher.offer(ticket())
    batcher.decide()
    batcher.offer(ticket())
    assert len(batcher.decide()) == 1


# Consolidation


def fleet(**rules: object) -> Batcher:
    batcher = taught(S0, S1, **({"consolidate": True} | rules))
    batcher.hear("e2", S0, S1)
    return batcher


def test_with_consolidation_an_idle_executor_is_spared_while_a_busy_one_can_do_it():
    """Two half-empty batches cost two launches."""
    batcher = fleet()
    batcher.offer(ticket(rows=8))
    assert [sent.executor for sent in batcher.decide()] == ["e1"]
    batcher.offer(ticket(rows=8))
    assert batcher.decide() == []
    batcher.decide(pass_us(8))
    assert [sent.executor for sent in batcher.dispatches] == ["e1"]


@pytest.mark.parametrize("rows, deadline_us", [(8, 4_000), (64, 1_000_000)])
def test_with_consolidation_an_idle_executor_is_used_for_deadlines_and_full_batches(rows: int, deadline_us: int):
    """Sparing it must cost nobody his deadline, and no throughput."""
    batcher = fleet()
    batcher.offer(ticket(rows=8))
    batcher.decide()
    batcher.offer(ticket(rows=rows, deadline_us=deadline_us))
    assert [sent.executor for sent in batcher.decide()] == ["e2"]


def test_without_consolidation_every_idle_executor_is_used():
    """That it is off by default means that nobody waits beside an idle device."""
    batcher = fleet(consolidate=False)
    batcher.offer(ticket(rows=8))
    batcher.decide()
    batcher.offer(ticket(rows=8))
    assert [sent.executor for sent in batcher.decide()] == ["e2"]


# Several models, and rules that change


def test_a_full_batch_of_less_urgent_work_does_not_leave_before_more_urgent_work_of_another_model():
    """What is held back for company would be overtaken by whatever is held back for nothing."""
    batcher = Batcher(max_rows=64, queue_rows=1_000)
    batcher.hear("e1", S0, S1, models=(MODEL, OTHER))
    batcher.offer(ticket(rows=64))
    batcher.decide()
    (urgent,) = batcher.offer(ticket(priority=1))
    batcher.offer(ticket(rows=64, model=OTHER))
    (sent,) = batcher.decide()
    assert sent.tickets == [urgent]


def test_new_rules_are_in_force_at_once():
    """`narsil tune` would say that it is done, and nothing would change."""
    batcher = taught()
    batcher.offer(*(ticket(tenant=name) for name in "ab"))
    policy = batcher.policy
    policy.rules = replace(policy.rules, max_rows=8, linger_us=300, slo_us=20_000, ageing=0.5, weights={"a": 3.0})
    lanes = policy.queues[MODEL].lines[128].lanes
    assert (lanes["a"].weight, lanes["b"].weight) == (3.0, 1.0)
    assert (policy.ageing.share, policy.tenants.share("a")) == (0.5, 0.75)
    assert (policy.tuner.cap_rows, policy.tuner.linger_us, policy.tuner.slo_us) == (8, 300, 20_000)
