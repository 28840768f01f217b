"""The batcher's policy: what goes into a batch, and when it leaves. Times are µs."""

from narsil_stream.schemas.internal import Slot
from tests.actors.puppets import BUDGET_US, MODEL, OTHER, S0, S1, Batcher, one_executor, ticket

# Batches


def test_a_free_executor_never_waits_for_company():
    """A lone request would pay for traffic that is not there."""
    batcher = one_executor()
    (one,) = batcher.offer(ticket())
    (sent,) = batcher.decide()
    assert (sent.tickets, sent.slot.generation, sent.executor) == ([one], 0, "e1")


def test_requests_of_one_turn_share_a_batch():
    """Each would cost a forward pass of its own."""
    batcher = one_executor()
    tickets = batcher.offer(*(ticket() for _ in range(5)))
    (sent,) = batcher.decide()
    assert sent.tickets == list(tickets)
    assert (sent.rows, sent.budget_us) == (5, BUDGET_US)


def test_batches_grow_while_all_slots_are_busy():
    """Under load full batches are what the throughput comes from."""
    batcher = one_executor(S0)
    batcher.offer(ticket())
    (first,) = batcher.decide()
    batcher.offer(*(ticket() for _ in range(4)))
    assert batcher.decide() == []
    batcher.answer(first, grant=Slot(0, 1))
    (second,) = batcher.decide()
    assert second.rows == 4


def test_each_free_slot_takes_a_batch_at_once():
    """A second slot keeps the device busy while the first batch is copied back."""
    batcher = one_executor(S0, S1)
    batcher.offer(*(ticket() for _ in range(20)))
    assert [sent.rows for sent in batcher.decide()] == [8, 8]
    assert batcher.policy.rows == 4


def test_the_executor_with_the_least_under_way_comes_first():
    """Two batches on one device while another idles take twice as long."""
    batcher = Batcher()
    batcher.hear("e1", S0, S1)
    batcher.hear("e2", S0, S1)
    batcher.offer(*(ticket(rows=8) for _ in range(2)))
    assert {sent.executor for sent in batcher.decide()} == {"e1", "e2"}


def test_the_earliest_deadline_goes_first_inside_a_priority():
    """The order of arrival would let patient requests push urgent ones past their budget."""
    batcher = one_executor(S0, max_rows=1)
    _, soon, urgent = batcher.offer(ticket(deadline_us=900_000), ticket(), ticket(priority=1))
    soon.deadline_us = 900_001
    (sent,) = batcher.decide()
    assert sent.tickets == [urgent]


def test_the_most_urgent_model_goes_first():
    """Two models on one device: the one that happened to come first would starve the other."""
    batcher = Batcher()
    batcher.hear("e1", S0, models=(MODEL, OTHER))
    _, soon = batcher.offer(ticket(deadline_us=900_000), ticket(deadline_us=800_000, model=OTHER))
    (sent,) = batcher.decide()
    assert (sent.model, sent.tickets) == (OTHER, [soon])


def test_a_batch_holds_one_model_only():
    """Rows of another model would be scored with the wrong weights."""
    batcher = Batcher()
    batcher.hear("e1", S0, S1, models=(MODEL, OTHER))
    batcher.offer(ticket(), ticket(model=OTHER))
    assert [len(sent.tickets) for sent in batcher.decide()] == [1, 1]


def test_an_executor_gets_only_the_models_that_it_serves():
    """It would turn the batch away until the budget is gone."""
    batcher = Batcher()
    batcher.hear("e1", S0, models=(OTHER,))
    batcher.hear("e2", models=(MODEL,))
    batcher.offer(ticket())
    assert batcher.decide() == []


def test_in_worker_mode_each_request_is_a_batch():
    """No coalescing means no neighbour: that is what the mode is chosen for."""
    batcher = one_executor(S0, S1, coalesce=False, linger_us=5_000)
    batcher.offer(ticket(), ticket(), ticket())
    assert [len(sent.tickets) for sent in batcher.decide()] == [1, 1]


# Linger


def test_a_linger_waits_for_company_and_no_longer():
    """The option would do nothing, or cost more than it says."""
    batcher = one_executor(S0, linger_us=5_000)
    batcher.offer(ticket())
    assert batcher.decide() == []
    assert batcher.policy.wake_us(0) == 5_000
    assert len(batcher.decide(5_000)) == 1


def test_a_full_batch_does_not_linger():
    """No company could join it."""
    batcher = one_executor(S0, linger_us=5_000)
    batcher.offer(ticket(rows=4), ticket(rows=4))
    assert len(batcher.decide()) == 1


def test_more_urgent_newcomers_do_not_prolong_the_linger():
    """Each would start it anew: under steady traffic the first request never leaves."""
    batcher = one_executor(S0, linger_us=5_000)
    (old,) = batcher.offer(ticket())
    batcher.now = 4_000
    batcher.offer(ticket(deadline_us=500_000, arrived_us=4_000))
    (sent,) = batcher.decide(5_000)
    assert old in sent.tickets


def test_a_linger_ends_in_time_for_the_deadline():
    """A request would expire beside an idle executor."""
    batcher = one_executor(S0, linger_us=50_000)
    batcher.teach(rows=1, service_us=2_000)
    batcher.offer(ticket(deadline_us=10_000))
    assert batcher.policy.wake_us(0) == 8_000
    assert len(batcher.decide(8_000)) == 1


def test_a_lingering_model_does_not_hold_back_another():
    """A free executor would wait although a batch is ready."""
    batcher = Batcher(linger_us=5_000)
    batcher.hear("e1", S0, models=(MODEL, OTHER))
    batcher.offer(ticket(deadline_us=100_000), ticket(rows=8, model=OTHER))
    (sent,) = batcher.decide()
    assert sent.model == OTHER
