"""The batcher's policy: executors that die, are silent, or no longer hold the slot. Times are µs."""

from narsil_stream.actors.flights import ARRIVES_US, DEMAND_EVERY_US
from narsil_stream.actors.queue import State
from narsil_stream.actors.retrying import MAX_BOUNCES
from narsil_stream.schemas.internal import Slot
from tests.actors.puppets import FLOOR_US, LEASE_US, S0, S1, Batcher, one_executor, ticket, two_executors


def test_a_batch_of_a_lost_executor_goes_to_another_one():
    """One dead process would fail all that it held."""
    batcher = two_executors()
    tickets = batcher.offer(ticket(), ticket())
    (sent,) = batcher.decide()
    other = {"e1": "e2", "e2": "e1"}[sent.executor]
    batcher.hear(sent.executor, state="gone")
    (again,) = batcher.decide()
    assert (again.executor, again.again) == (other, True)
    assert set(again.tickets) == set(tickets)


def test_an_executor_that_is_silent_for_a_lease_is_lost():
    """Nobody says goodbye in a crash."""
    batcher = one_executor(S0)
    (one,) = batcher.offer(ticket())
    batcher.decide()
    batcher.decide(LEASE_US - 1)
    assert "e1" in batcher.policy.executors
    batcher.decide(LEASE_US)
    assert batcher.policy.executors == {}
    assert batcher.dropped() == [(one, "UNAVAILABLE")]


def test_a_pause_of_our_own_is_not_taken_for_the_death_of_others():
    """After a stop-the-world pause all executors would be given up, with their heartbeats unread."""
    batcher = one_executor(S0)
    batcher.decide()
    batcher.now = 10 * LEASE_US
    batcher.decide()
    assert "e1" in batcher.policy.executors


def test_a_batch_is_never_sent_a_third_time():
    """A request that kills executors would take down all of them, one after the other."""
    batcher = Batcher()
    for name in ("e1", "e2", "e3"):
        batcher.hear(name, S0)
    (killer,) = batcher.offer(ticket())
    (first,) = batcher.decide()
    batcher.hear(first.executor, state="gone")
    (second,) = batcher.decide()
    batcher.hear(second.executor, state="gone")
    assert batcher.dropped() == [(killer, "UNAVAILABLE")]
    assert batcher.decide() == []


def test_with_no_executor_left_all_are_unavailable_at_once():
    """Callers would wait their whole budget although there is nobody to wait for."""
    batcher = one_executor(S0)
    (flying,) = batcher.offer(ticket(rows=8))
    batcher.decide()
    (waiting,) = batcher.offer(ticket())
    batcher.hear("e1", state="gone")
    assert batcher.dropped() == [(flying, "UNAVAILABLE")]
    batcher.decide()
    assert batcher.dropped() == [(waiting, "UNAVAILABLE")]
    assert batcher.drops[0].retry_after_us > 0


def test_a_silent_executors_batch_goes_to_another_one_and_the_first_answer_counts():
    """A frozen process would hold its requests until their budgets end."""
    batcher = two_executors()
    (one,) = batcher.offer(ticket())
    batcher.teach(rows=1, service_us=100)
    (sent,) = batcher.decide()
    assert batcher.policy.wake_us(0) == FLOOR_US
    (again,) = batcher.decide(FLOOR_US)
    assert again.executor != sent.executor
    assert batcher.answer(again) == [one]
    one.state = State.DONE
    assert batcher.answer(sent) == [], "the late one is ignored"


def test_patience_is_a_multiple_of_the_predicted_time():
    """Large batches would always be computed twice."""
    batcher = two_executors()
    batcher.teach(rows=8, service_us=100_000)
    batcher.offer(ticket(rows=8))
    batcher.decide()
    assert batcher.decide(399_999) == []
    assert len(batcher.decide(400_000)) == 1


def test_the_first_batch_of_a_model_has_a_lease_of_time():
    """Nothing was measured yet, and first passes are slow."""
    batcher = two_executors()
    batcher.offer(ticket())
    batcher.decide()
    batcher.hear("e1", busy=[S0])
    assert batcher.decide(4 * LEASE_US // 5) == []


def test_the_late_answer_of_a_batch_that_shrank_keeps_its_rows():
    """The second sending leaves out who has left; the first one's scores would go to the wrong requests."""
    batcher = two_executors()
    batcher.teach(rows=3, service_us=100)
    a, b, c = batcher.offer(ticket(), ticket(), ticket())
    (sent,) = batcher.decide()
    batcher.policy.cancel(b)
    (again,) = batcher.decide(FLOOR_US)
    assert (set(again.tickets), again.rows) == ({a, c}, 2)
    assert batcher.answer(sent) == [a, b, c]


def test_an_executor_that_comes_later_takes_over_from_a_silent_one():
    """The replacement of a stuck executor would stand beside it while requests expire."""
    batcher = one_executor(S0)
    batcher.teach(rows=1, service_us=100)
    batcher.offer(ticket())
    batcher.decide()
    assert batcher.decide(FLOOR_US) == []
    batcher.hear("e2", S0)
    (again,) = batcher.decide()
    assert again.executor == "e2"


def test_a_batch_that_everybody_failed_once_goes_to_whom_is_left():
    """It would wait for its deadline beside a free executor."""
    batcher = two_executors()
    batcher.offer(ticket())
    (sent,) = batcher.decide()
    batcher.hear(sent.executor, state="gone")
    other = ({"e1", "e2"} - {sent.executor}).pop()
    batcher.policy.executors[other].free.clear()
    assert batcher.decide() == []
    batcher.hear(sent.executor, Slot(0, 5))
    batcher.hear(other, state="gone")
    (again,) = batcher.decide()
    assert again.executor == sent.executor


def test_the_faster_of_two_answers_to_a_failed_batch_counts():
    """A fault from one executor would fail requests that another one is about to answer."""
    batcher = two_executors()
    batcher.teach(rows=1, service_us=100)
    (one,) = batcher.offer(ticket())
    (sent,) = batcher.decide()
    (again,) = batcher.decide(FLOOR_US)
    batcher.fail(sent)
    assert batcher.drops == []
    assert batcher.answer(again) == [one]


# Void slots


def test_a_batch_with_a_void_slot_goes_again_without_counting_as_a_try():
    """Leases move all the time: two unlucky moves would fail a batch that never ran."""
    batcher = one_executor(S0)
    batcher.offer(ticket())
    for generation in range(1, 4):
        (sent,) = batcher.decide()
        assert not sent.again
        batcher.bounce(sent)
        assert batcher.decide() == [], "the slot in hand is known to be void"
        batcher.hear("e1", Slot(0, generation))
    (sent,) = batcher.decide()
    batcher.hear("e2", S0)
    batcher.hear("e1", state="gone")
    assert len(batcher.decide()) == 1, "its first try has just been lost"


def test_a_batch_does_not_bounce_forever():
    """An executor that leases slots and turns every batch away would keep both sides busy until the deadline."""
    batcher = one_executor(S0)
    (one,) = batcher.offer(ticket())
    for generation in range(MAX_BOUNCES + 1):
        batcher.hear("e1", Slot(0, generation))
        (sent,) = batcher.decide()
        batcher.bounce(sent)
    assert batcher.dropped() == [(one, "UNAVAILABLE")]


def test_a_grant_that_was_overtaken_is_ignored():
    """Two messages that change places would put a void slot into the batcher's hand."""
    batcher = one_executor(Slot(0, 7))
    batcher.policy.grant("e1", Slot(0, 6), batcher.now)
    batcher.offer(ticket())
    (sent,) = batcher.decide()
    assert sent.slot == Slot(0, 7)
    batcher.policy.grant("e1", Slot(0, 7), batcher.now)
    batcher.hear("e1", Slot(0, 7))
    batcher.offer(ticket())
    assert batcher.decide() == [], "a slot is used once"


def test_the_slot_of_a_lost_batch_comes_back_and_the_work_is_done_again():
    """The executor keeps the slot for a batch that never comes; both would wait for each other."""
    batcher = one_executor(S0)
    batcher.teach(rows=1, service_us=100)
    (one,) = batcher.offer(ticket())
    batcher.decide()
    batcher.hear("e1", S0)
    batcher.decide()
    assert batcher.pleas == [], "it may be on its way"
    batcher.decide(FLOOR_US)
    batcher.hear("e1", S0)
    batcher.decide()
    assert [plea.demand.returned for plea in batcher.pleas] == [(S0,)]
    batcher.policy.grant("e1", Slot(0, 1), batcher.now)
    batcher.hear("e1", Slot(0, 1))
    (again,) = batcher.decide()
    assert (again.tickets, again.demand.returned) == ([one], ())


def test_a_slot_is_given_back_until_the_executor_has_heard_it():
    """The message that gives it back can be lost like the batch."""
    batcher = one_executor(S0)
    batcher.teach(rows=1, service_us=100)
    batcher.offer(ticket())
    batcher.decide(FLOOR_US)
    for _ in range(3):
        batcher.hear("e1", S0)
        batcher.decide()
        assert [plea.demand.returned for plea in batcher.pleas] == [(S0,)]
        batcher.now += DEMAND_EVERY_US


def test_a_batch_whose_result_was_lost_is_done_again():
    """The slot has moved on to another batcher: without a word, the flight would stay in the books for good."""
    batcher = one_executor(S0)
    batcher.teach(rows=1, service_us=100)
    (one,) = batcher.offer(ticket())
    batcher.decide(FLOOR_US)
    batcher.hear("e1", total=1)
    batcher.decide()
    (plea,) = batcher.pleas
    assert plea.demand.rows == 1, "it asks for another slot"
    batcher.policy.grant("e1", Slot(0, 2), batcher.now)
    (again,) = batcher.decide()
    assert again.tickets == [one]
    batcher.answer(again)
    assert batcher.policy.executors["e1"].flights == {}


def test_a_slow_batch_is_not_taken_for_a_lost_one():
    """Its slot is busy: sending it to the same executor again makes it slower still."""
    batcher = one_executor(S0, S1)
    batcher.teach(rows=1, service_us=100)
    (one,) = batcher.offer(ticket())
    (sent,) = batcher.decide()
    batcher.decide(FLOOR_US)
    batcher.hear("e1", busy=[sent.slot])
    assert batcher.decide() == []
    assert batcher.answer(sent) == [one]


def test_a_lost_batch_is_noticed_by_the_second_heartbeat_however_long_it_was_predicted_to_take():
    """Its executor would be idle for four times the slowest pass that it ever had."""
    batcher = one_executor(S0)
    batcher.teach(rows=1, service_us=10 * FLOOR_US)
    (one,) = batcher.offer(ticket())
    batcher.decide()
    batcher.hear("e1", S0)
    batcher.hear("e1", S0)
    batcher.decide()
    assert batcher.pleas == [], "heartbeats that came at once say nothing: it is on its way"
    batcher.now += ARRIVES_US
    batcher.hear("e1", S0)
    batcher.hear("e1", S0)
    batcher.decide()
    assert [plea.demand.returned for plea in batcher.pleas] == [(S0,)]
    batcher.hear("e1", Slot(0, 1))
    (again,) = batcher.decide()
    assert again.tickets == [one]


def test_a_lost_result_is_noticed_by_the_second_heartbeat_however_long_it_was_predicted_to_take():
    """Until then the batcher would take the executor for busy, and refuse requests for that."""
    batcher = one_executor(S0)
    batcher.teach(rows=1, service_us=10 * FLOOR_US)
    (one,) = batcher.offer(ticket())
    batcher.decide(ARRIVES_US)
    batcher.hear("e1", Slot(0, 1))
    assert batcher.decide() == [], "the result may come a moment after"
    batcher.hear("e1", Slot(0, 1))
    (again,) = batcher.decide()
    assert again.tickets == [one]
