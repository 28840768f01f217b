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
    assert asker.answered(one.slot) is one
    assert asker.answered(one.slot) is None
    assert asker.late == 1


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
