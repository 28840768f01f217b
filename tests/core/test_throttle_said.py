"""What a batcher said to one is told to others without asking: only to those for whom it holds, and not for long."""

from hypothesis import example, given
from hypothesis import strategies as st

from narsil_stream.core.throttle import HOLDS_US, MOST_SAID, Asked, Flow
from narsil_stream.schemas.errors import Fault, Refused

US = st.integers(0, 300_000)
NBYTES = st.integers(0, 1_000)


def told(flow: Flow, now_us: int, asked: Asked, batcher: str = "b") -> Refused | None:
    """What the door says, if it lets nobody through to this batcher."""
    try:
        flow.check_said(asked, lambda: batcher, now_us)
    except Refused as refused:
        return refused
    return None


def test_who_comes_right_behind_a_refused_request_is_told_when_there_is_room():
    """It would cross the broker twice to hear the same."""
    flow = Flow(0)
    flow.said("b", Asked(500_000, 800), 20_000, 1_000)
    refused = told(flow, 6_000, Asked(505_000, 800))
    assert refused is not None
    assert (refused.fault, refused.retry_after_us) == (Fault.OVERLOADED, 15_000)


@given(US, US, US, NBYTES, US, NBYTES)
@example(10_000, 5_000, 0, 8, 10_000, 8)
@example(10_000, 5_000, HOLDS_US - 1, 8, 12_000, 8)
def test_it_holds_for_whoever_asks_for_no_less_is_due_no_earlier_and_could_not_have_been_met(
    deadline_us: int, retry_us: int, later_us: int, nbytes: int, other_us: int, other_nbytes: int
):
    """Callers whom a batcher would have served would be sent away."""
    flow = Flow(0)
    flow.said("b", Asked(deadline_us, nbytes), retry_us, 0)
    refused = told(flow, later_us, Asked(other_us, other_nbytes))
    holds = later_us < min(retry_us, HOLDS_US) and other_nbytes >= nbytes
    assert (refused is not None) == (holds and deadline_us <= other_us < deadline_us + retry_us)


@given(st.lists(st.tuples(st.integers(1, 20_000), st.integers(0, 60_000), NBYTES), min_size=1, max_size=30))
def test_of_many_refusals_only_such_as_were_given_are_repeated(refusals: list[tuple[int, int, int]]):
    """What is kept of them may forget, but not invent."""
    flow, now, given_ = Flow(0, few=1_000), 0, []
    for pause_us, retry_us, nbytes in refusals:
        now += pause_us
        asked = Asked(now + 400_000, nbytes)
        if told(flow, now, asked) is not None:
            assert any(
                one.deadline_us <= asked.deadline_us < one.deadline_us + wait_us
                and one.nbytes <= nbytes
                and now < since_us + min(wait_us, HOLDS_US)
                for one, wait_us, since_us in given_
            )
        else:
            flow.said("b", asked, retry_us, now)
            given_.append((asked, retry_us, now))


def test_a_smaller_request_gets_through_and_what_it_is_told_counts_from_then_on():
    """Room for little is not shut by a refusal of much."""
    flow = Flow(0)
    flow.said("b", Asked(500_000, 800), 30_000, 0)
    assert told(flow, 1_000, Asked(501_000, 100)) is None
    flow.said("b", Asked(501_000, 100), 10_000, 2_000)
    assert told(flow, 3_000, Asked(503_000, 100)) is not None


def test_what_one_batcher_said_does_not_hold_for_another():
    """An idle one would get nothing as long as a full one is asked now and then."""
    flow = Flow(0)
    flow.said("full", Asked(500_000, 1), 40_000, 0)
    assert told(flow, 1, Asked(500_000, 1), "idle") is None
    assert told(flow, 1, Asked(500_000, 1), "full") is not None
    assert told(flow, 1, Asked(500_000, 1), "") is None, "nobody is there: the caller is told so"


def test_refusals_that_are_repeated_do_not_make_others_more_likely():
    """One real refusal would count as hundreds, and go on refusing when it holds no longer."""
    flow = Flow(0)
    flow.refused(40_000, 0)
    flow.said("b", Asked(500_000, 1), 40_000, 0)
    for now in range(1, 101):
        assert told(flow, now, Asked(500_000, 1)) is not None
    assert flow.requests == 1
    flow.check(101)


def test_who_is_kept_is_bounded():
    """Batchers come and go under new names for as long as the process lives."""
    flow = Flow(0)
    for number in range(3 * MOST_SAID):
        flow.said(f"b{number}", Asked(500_000, 1), 40_000, number)
    assert len(flow._said) <= MOST_SAID
