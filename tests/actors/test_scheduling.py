"""The batcher's policy, rule by rule. Times are µs of a clock that only the test moves."""

import pytest

from narsil_stream.actors.flights import ARRIVES_US, DEMAND_EVERY_US
from narsil_stream.actors.forecast import MARGIN
from narsil_stream.actors.queue import State
from narsil_stream.actors.retrying import MAX_BOUNCES
from narsil_stream.schemas.errors import Fault
from narsil_stream.schemas.internal import Slot
from tests.actors.puppets import BUDGET_US, FLOOR_US, LEASE_US, MODEL, OTHER, Batcher, ticket

S0, S1 = Slot(0, 0), Slot(1, 0)


def one_executor(*slots: Slot, **rules: object) -> Batcher:
    batcher = Batcher(**rules)
    batcher.hear("e1", *(slots or (S0, S1)))
    return batcher


def two_executors(**rules: object) -> Batcher:
    batcher = one_executor(S0, **rules)
    batcher.hear("e2", S0)
    return batcher


def silent(batcher: Batcher, *executors: str, busy: tuple[Slot, ...] = (S0,)) -> None:
    """Until its batch is overdue, while all executors beat."""
    for _ in range(10):
        for executor in executors:
            batcher.hear(executor, busy=busy) if executor == "e1" else batcher.hear(executor, S0)
        batcher.decide(batcher.now + LEASE_US // 10)


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


# Admission


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
    batcher.offer(ticket(rows=8, deadline_us=answered_us))


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


# Endings


def test_a_request_that_expires_while_waiting_is_answered_then():
    """Triton once told a 10 s timeout after 90 s, when the running batch had ended."""
    batcher = one_executor(S0)
    batcher.offer(ticket())
    batcher.decide()
    (late,) = batcher.offer(ticket(deadline_us=7_000))
    batcher.decide()
    assert batcher.policy.wake_us(0) == 7_000
    batcher.decide(7_000)
    assert batcher.dropped() == [(late, "DEADLINE_EXCEEDED")]
    assert (batcher.policy.rows, batcher.policy.bytes) == (0, 0)


def test_an_expired_request_is_not_computed():
    """Dead work fills the device just when it is short."""
    batcher = one_executor(S0)
    batcher.offer(ticket(deadline_us=7_000))
    batcher.now = 7_000
    assert batcher.decide() == []


def test_a_request_that_expires_in_flight_is_answered_then_and_its_scores_are_not():
    """Its caller would get an answer twice, or none until the device is done."""
    batcher = one_executor(S0)
    short, long = batcher.offer(ticket(deadline_us=7_000), ticket())
    (sent,) = batcher.decide()
    batcher.decide(7_000)
    assert batcher.dropped() == [(short, "DEADLINE_EXCEEDED")]
    assert short.state is State.DONE
    assert batcher.answer(sent) == [short, long], "rows in the order of the batch; who is done is passed over"
    assert long.state is State.IN_FLIGHT


def test_a_cancelled_request_is_not_computed():
    """Retry storms would fill the device with work for nobody."""
    batcher = one_executor()
    left, stays = batcher.offer(ticket(), ticket())
    batcher.policy.cancel(left)
    (sent,) = batcher.decide()
    assert sent.tickets == [stays]


def test_cancelling_in_flight_leaves_the_rows_of_the_others_in_place():
    """Scores would move up by one row: everybody gets a neighbour's."""
    batcher = one_executor()
    left, stays = batcher.offer(ticket(), ticket())
    (sent,) = batcher.decide()
    batcher.policy.cancel(left)
    assert batcher.answer(sent) == [left, stays]
    assert left.state is State.DONE


def test_nothing_is_left_when_all_are_answered_or_gone():
    """A batcher that never counts as idle never stops."""
    batcher = one_executor(S0, S1)
    a, b, c = batcher.offer(ticket(rows=8), ticket(rows=8), ticket(rows=8))
    batcher.decide()
    assert not batcher.policy.idle()
    for one in (a, b, c):
        batcher.policy.cancel(one)
    assert batcher.policy.idle(), "what is computed for nobody holds up nobody"


def test_at_the_end_every_open_request_is_told():
    """Callers would find out by their timeouts."""
    batcher = one_executor(S0)
    (flying,) = batcher.offer(ticket(rows=8))
    batcher.decide()
    (waiting,) = batcher.offer(ticket())
    drops = batcher.policy.abandon_all()
    assert {drop.ticket for drop in drops} == {flying, waiting}
    assert {drop.fault for drop in drops} == {Fault.UNAVAILABLE}
    assert batcher.policy.idle()


# Failover


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


# Failed batches


def test_a_poisonous_request_fails_alone():
    """One bad request would fail all that happened to travel with it."""
    batcher = one_executor(S0)
    tickets = batcher.offer(*(ticket() for _ in range(8)))
    poisonous, scored, failed = tickets[5], [], []
    batcher.decide()
    for generation in range(1, 20):
        for sent in batcher.dispatches:
            slot = Slot(0, generation)
            if poisonous in sent.tickets:
                batcher.fail(sent, grant=slot)
                failed += batcher.dropped()
            else:
                scored += batcher.answer(sent, grant=slot)
        batcher.decide()
    assert failed == [(poisonous, "INTERNAL")]
    assert sorted(t.id for t in scored) == [t.id for t in tickets if t is not poisonous]
    assert batcher.policy.retries == []


def test_a_fault_that_is_nobodys_poison_is_told_to_all():
    """Halving cannot help when the executor found the whole batch too late."""
    batcher = one_executor(S0)
    a, b = batcher.offer(ticket(), ticket())
    (sent,) = batcher.decide()
    batcher.fail(sent, "DEADLINE_EXCEEDED")
    assert set(batcher.dropped()) == {(a, "DEADLINE_EXCEEDED"), (b, "DEADLINE_EXCEEDED")}


def test_a_fault_of_a_newer_executor_is_internal():
    """A rolling update meets names that this version does not know."""
    batcher = one_executor(S0)
    (one,) = batcher.offer(ticket())
    (sent,) = batcher.decide()
    batcher.fail(sent, "MELTED")
    assert batcher.dropped() == [(one, "INTERNAL")]


def test_scores_that_do_not_fit_the_batch_are_a_failure():
    """Cut by rows, they would give everybody a wrong or an empty answer."""
    batcher = one_executor(S0)
    (one,) = batcher.offer(ticket(rows=2))
    (sent,) = batcher.decide()
    sent = type(sent)(**{name: getattr(sent, name) for name in sent.__struct_fields__} | {"rows": 1})
    assert batcher.answer(sent) == []
    assert batcher.dropped() == [(one, "INTERNAL")]


def test_a_batch_too_large_to_be_sent_goes_in_halves():
    """Joined, requests may need more bytes than each on its own; the batch would be tried in vain until it expires."""
    batcher = one_executor(S0)
    a, b = batcher.offer(ticket(), ticket())
    (sent,) = batcher.decide()
    assert batcher.policy.too_large(sent, "too large") == []
    assert batcher.policy.wake_us(0) == 0, "the slot is in hand again"
    (half,) = batcher.decide()
    assert len(half.tickets) == 1
    (drop,) = batcher.policy.too_large(half, "still too large")
    assert (drop.ticket, drop.fault) == (half.tickets[0], Fault.TOO_LARGE)
    (rest,) = batcher.decide()
    assert {half.tickets[0], rest.tickets[0]} == {a, b}


# Asking for slots


def test_an_executor_that_leaves_gets_nothing_new():
    """It would turn everything away, or never come to its end."""
    batcher = two_executors()
    (one,) = batcher.offer(ticket())
    batcher.hear("e1", S0, state="leaving")
    (sent,) = batcher.decide()
    assert (sent.executor, sent.tickets) == ("e2", [one])
    batcher.offer(ticket())
    assert batcher.decide() == []
    assert [plea.executor for plea in batcher.pleas] == ["e2"]


def test_an_executor_that_leaves_still_answers_what_it_has():
    """A rolling restart would fail requests, or compute them twice."""
    batcher = one_executor(S0)
    (one,) = batcher.offer(ticket())
    (sent,) = batcher.decide()
    batcher.hear("e1", busy=[S0], state="leaving")
    batcher.decide()
    assert batcher.drops == []
    assert batcher.answer(sent) == [one]


def test_waiting_work_asks_for_a_slot_and_keeps_asking():
    """Other batchers hold the slots: nobody moves one without being asked, and the question may be lost."""
    batcher = one_executor()
    batcher.hear("e1")
    batcher.offer(ticket(rows=3, deadline_us=300_000))
    batcher.decide()
    ((name, demand),) = [(plea.executor, plea.demand) for plea in batcher.pleas]
    assert (name, demand.batcher, demand.rows, demand.slack_us) == ("e1", "b", 3, 300_000)
    batcher.decide()
    assert batcher.pleas == [], "not on every turn"
    assert batcher.policy.wake_us(0) == DEMAND_EVERY_US
    batcher.decide(DEMAND_EVERY_US)
    assert len(batcher.pleas) == 1


def test_work_waits_for_an_executor_that_has_just_given_a_slot():
    """Its heartbeat comes right behind the slot, and says what it serves: to refuse the work now would be hasty."""
    batcher = one_executor(S0)
    batcher.offer(*(ticket() for _ in range(9)))
    (sent,) = batcher.decide()
    batcher.policy.grant("e2", S0, batcher.now)
    batcher.hear("e1", state="gone")
    batcher.decide()
    assert batcher.dropped() == []
    batcher.hear("e2", S0, S1)
    again, rest = batcher.decide()
    assert (again.tickets, rest.rows) == (sent.tickets, 1)


def test_work_does_not_wait_for_that_heartbeat_for_ever():
    """The executor may have died in between."""
    batcher = one_executor()
    batcher.hear("e1", total=1)
    batcher.offer(ticket())
    batcher.policy.grant("e2", S0, batcher.now)
    batcher.hear("e1", state="gone")
    batcher.decide()
    assert batcher.policy.wake_us(batcher.now) == LEASE_US
    batcher.decide(LEASE_US)
    assert [fault for _, fault in batcher.dropped()] == ["UNAVAILABLE"]


def test_work_that_nobody_has_heard_of_asks_at_once():
    """The last question was answered with a slot, which is used up: to wait for the next one's time is to idle."""
    batcher = Batcher()
    batcher.hear("e1", total=1)
    batcher.offer(ticket())
    batcher.decide()
    batcher.policy.grant("e1", S0, batcher.now)
    (sent,) = batcher.decide()
    batcher.answer(sent)
    batcher.now += DEMAND_EVERY_US // 10
    batcher.offer(ticket(rows=2))
    batcher.decide()
    assert [plea.demand.rows for plea in batcher.pleas] == [2]


def test_a_slot_for_work_that_has_gone_elsewhere_is_let_go():
    """Its executor believes that it is wanted here, and others wait for it."""
    batcher = two_executors()
    batcher.offer(*(ticket(rows=8) for _ in range(3)))
    first, second = batcher.decide()
    assert first.demand.rows, "it is told that work waits"
    batcher.answer(second, grant=Slot(0, 1))
    (third,) = batcher.decide()
    assert third.executor == second.executor
    batcher.answer(first, grant=Slot(0, 1))
    batcher.decide()
    assert [(plea.executor, plea.demand.rows) for plea in batcher.pleas] == [(first.executor, 0)]
    batcher.decide()
    assert batcher.pleas == [], "once"


def test_a_second_try_asks_for_a_slot_too():
    """Nothing waits in the queue, so nobody would ask, and the batch expires beside idle slots of others."""
    batcher = one_executor(S0)
    batcher.offer(ticket(rows=3))
    batcher.decide()
    batcher.hear("e2")
    batcher.hear("e1", state="gone")
    batcher.decide()
    assert [(plea.executor, plea.demand.rows) for plea in batcher.pleas] == [("e2", 3)]


def test_a_batch_tells_what_waits_behind_it():
    """The executor would give the slot away, and a question would have to follow each batch."""
    batcher = one_executor(S0)
    batcher.offer(*(ticket(rows=4) for _ in range(3)))
    (sent,) = batcher.decide()
    assert (sent.rows, sent.demand.rows) == (8, 4)


def test_who_has_all_slots_does_not_ask():
    """There is nothing left to give; under load every turn would send messages for nothing."""
    batcher = one_executor(S0, S1)
    batcher.offer(*(ticket(rows=8) for _ in range(3)))
    batcher.decide()
    assert batcher.pleas == []


def test_a_model_on_its_way_out_computes_what_waits_and_takes_no_more():
    """An unload under load would lose the queue, or never end."""
    batcher = one_executor(S0)
    batcher.offer(*(ticket(rows=8) for _ in range(2)))
    (first,) = batcher.decide()
    batcher.hear("e1", busy=(S0,), models=(), retiring=(MODEL,))
    assert batcher.refuses(ticket()).fault is Fault.UNAVAILABLE
    assert batcher.policy.finishing() == [MODEL]
    batcher.answer(first, grant=S1)
    (second,) = batcher.decide()
    assert not batcher.drops
    assert batcher.policy.finishing() == [MODEL]
    batcher.answer(second)
    assert batcher.policy.finishing() == []


def test_a_model_that_another_executor_offers_is_not_on_its_way_out():
    """Each executor would wait for the other one before it frees the memory."""
    batcher = one_executor(S0)
    batcher.offer(ticket())
    batcher.hear("e1", models=(), retiring=(MODEL,))
    batcher.hear("e2")
    batcher.offer(ticket())
    assert batcher.policy.finishing() == []


def test_new_weights_of_one_version_have_a_queue_of_their_own():
    """What was checked against the old ones must not reach the new ones."""
    new = MODEL._replace(digest="new")
    batcher = one_executor()
    batcher.hear("e1", models=(new,), retiring=(MODEL,))
    batcher.offer(ticket(model=new))
    assert batcher.refuses(ticket(model=MODEL)).fault is Fault.UNAVAILABLE
    batcher.hear("e1", S0, models=(new,), retiring=(MODEL,))
    (sent,) = batcher.decide()
    assert sent.model == new


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
