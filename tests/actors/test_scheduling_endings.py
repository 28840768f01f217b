"""The batcher's policy: requests that expire, are cancelled or fail end once. Times are µs."""

from narsil_stream.actors.queue import State
from narsil_stream.schemas.errors import Fault
from narsil_stream.schemas.internal import Slot
from tests.actors.puppets import S0, S1, one_executor, ticket


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
