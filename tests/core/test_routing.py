"""The requester's policy, rule by rule. Times are µs of a clock that only the test moves."""

from narsil_stream.core.routing import GRACE_US, MAX_SENDS, Pending, Router
from narsil_stream.schemas.errors import Fault
from narsil_stream.schemas.internal import BatcherBeat, ModelRef

MODEL = ModelRef("m", "1", "digest")
LEASE_MS = 500


class Links:
    connected = True

    def is_local(self, subject: str) -> bool:
        return False


def router(*batchers: str) -> Router[Pending]:
    made: Router[Pending] = Router(Links(), 0)
    for batcher in batchers:
        hear(made, batcher)
    return made


def hear(asker: Router[Pending], batcher: str, now_us: int = 0, wait_us: int = 0, state: str = "up") -> list[Pending]:
    beat = BatcherBeat(batcher, (MODEL,), wait_us, state=state, lease_ms=LEASE_MS)
    return [pending for pending, _ in asker.beat(beat, now_us)]


def ask(asker: Router[Pending], deadline_us: int = 1_000_000) -> Pending:
    pending = Pending(asker.slot(), "m", "", deadline_us, 40)
    asker.add(pending)
    return pending


def sent(asker: Router[Pending]) -> dict[str, list[int]]:
    return {batcher: [pending.slot for pending in bundle] for batcher, bundle in asker.outgoing()}


def test_a_request_whose_batcher_says_goodbye_goes_to_another_one():
    """It would wait for an answer that nobody will give."""
    asker = router("b1", "b2")
    one = ask(asker)
    (first,) = sent(asker)
    assert hear(asker, first, state="gone") == []
    assert sent(asker) == {one.batcher: [one.slot]} != {first: [one.slot]}
    assert (one.sends, asker.resent) == (2, 1)


def test_a_request_that_kills_its_batchers_is_not_sent_for_ever():
    """It could be the reason."""
    asker = router(*(f"b{n}" for n in range(MAX_SENDS + 1)))
    one = ask(asker)
    for _ in range(MAX_SENDS - 1):
        assert asker.lose(one.batcher) == []
    ((failed, refused),) = asker.lose(one.batcher)
    assert (failed, refused.fault) == (one, Fault.UNAVAILABLE)
    assert asker.pending == {}


def test_a_batcher_is_silent_after_a_lease_and_not_for_our_own_pause():
    """Its heartbeats wait to be read when this process is the one that stood still."""
    asker = router("b1")
    lease_us = LEASE_MS * 1_000
    assert asker.silent(10 * lease_us) == []
    for step in range(1, 5):
        asker.silent(10 * lease_us + step * lease_us // 4)
    assert asker.silent(11 * lease_us + lease_us // 4) == ["b1"]


def test_the_first_answer_counts_and_others_are_late():
    """A request that was sent twice is answered twice."""
    asker = router("b1")
    one = ask(asker)
    assert asker.answered(one.slot, "b1") is one
    assert asker.answered(one.slot, "b1") is None
    assert asker.late == 1


def test_an_error_of_a_batcher_that_was_given_up_does_not_end_a_request():
    """Cut off, it takes all executors for dead, and says so to everybody once it is heard again."""
    asker = router("b1", "b2")
    one = ask(asker)
    first = one.batcher
    asker.lose(first)
    hear(asker, first)
    assert asker.answered(one.slot, first, "UNAVAILABLE") is None
    assert asker.answered(one.slot, one.batcher, "OVERLOADED") is one


def test_scores_of_a_batcher_that_was_given_up_are_as_good_as_any():
    """It was only slow; its answer saves the wait for the other one's."""
    asker = router("b1", "b2")
    one = ask(asker)
    first = one.batcher
    asker.lose(first)
    assert asker.answered(one.slot, first) is one


def test_what_one_batcher_cannot_serve_and_another_can_is_asked_there():
    """It may be the only one that does not hear the executors."""
    asker = router("b1", "b2")
    one = ask(asker)
    (first,) = sent(asker)
    assert asker.answered(one.slot, first, "UNAVAILABLE") is None
    assert sent(asker) == {one.batcher: [one.slot]} != {first: [one.slot]}
    assert asker.peers[first].open == set()
    for _ in range(MAX_SENDS - 2):
        assert asker.answered(one.slot, one.batcher, "UNAVAILABLE") is None
    assert asker.answered(one.slot, one.batcher, "UNAVAILABLE") is one, "not for ever"


def test_what_no_other_batcher_serves_is_unavailable_at_once():
    """Asking around would only take time."""
    asker = router("b1")
    one = ask(asker)
    asker.beat(BatcherBeat("b2", (), 0, lease_ms=LEASE_MS), 0)
    assert asker.answered(one.slot, "b1", "UNAVAILABLE") is one


def test_a_request_without_an_answer_ends_after_its_budget_and_the_grace():
    """Whatever its batcher does."""
    asker = router("b1")
    one, two = ask(asker, 200), ask(asker, 100)
    assert asker.wake_us() == 100 + GRACE_US
    assert asker.expired(100 + GRACE_US - 1) == []
    assert [pending for pending, _ in asker.expired(100 + GRACE_US)] == [two]
    asker.end(one)
    assert asker.wake_us() is None


def test_what_was_withdrawn_before_it_left_is_not_sent():
    """Nobody would read its answer."""
    asker = router("b1")
    one, two = ask(asker), ask(asker)
    assert asker.end(one)
    assert not asker.end(one)
    assert sent(asker) == {"b1": [two.slot]}
