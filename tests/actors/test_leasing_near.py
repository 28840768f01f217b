"""Leases of executors that share a process with a batcher: batches cross the broker only where it has to be."""

from hypothesis import given
from hypothesis import strategies as st

from narsil_stream.actors.leasing import Ledger
from narsil_stream.schemas.internal import BatcherBeat, Demand

LEASE_US = 500_000


def beat(of: Ledger, batcher: str, rows: int = 0, *, paired: bool = True) -> None:
    of.beat(BatcherBeat(batcher, (), 0, rows, 1_000, paired=paired), 0)


def ledger(slots: int = 3) -> Ledger:
    return Ledger("e", slots, LEASE_US, near={"own"}.__contains__)


def hands(of: Ledger) -> list[str]:
    of.assign(0)
    return [place.holder for place in of.places]


def test_idle_slots_are_with_the_batcher_of_the_same_process() -> None:
    """Every batch would be encoded, sent over the broker and decoded, although an executor stands beside it."""
    one = ledger()
    for name in ("other", "own", "third"):
        beat(one, name)
    assert hands(one) == ["own"] * 3


def test_a_batcher_without_an_executor_of_its_own_shares_them() -> None:
    """Its first request would cost it a round trip, each time."""
    one = ledger(4)
    for name, paired in (("own", True), ("other", True), ("lonely", False)):
        beat(one, name, paired=paired)
    assert sorted(hands(one)) == ["lonely", "lonely", "own", "own"]


def test_work_elsewhere_gets_an_idle_slot_and_gives_it_back() -> None:
    """A device must not stand idle beside work, nor lose its own batcher for good."""
    one = ledger(1)
    beat(one, "own")
    beat(one, "other", rows=8)
    assert hands(one) == ["other"]
    one.demand(Demand("other", 0, 0), 0)
    assert hands(one) == ["own"]


def test_slots_come_home_when_the_own_batcher_appears() -> None:
    """Processes start in any order."""
    one = ledger()
    beat(one, "other", paired=False)
    assert hands(one) == ["other"] * 3
    beat(one, "own")
    beat(one, "other")
    assert hands(one) == ["own"] * 3


@given(
    st.dictionaries(st.sampled_from(["own", "a", "b", "c"]), st.tuples(st.booleans(), st.integers(0, 3)), min_size=1)
)
def test_no_slot_is_left_over_and_whoever_holds_one_is_known(heard: dict[str, tuple[bool, int]]) -> None:
    """Preferences must not make slots disappear."""
    one = ledger()
    for name, (paired, rows) in heard.items():
        beat(one, name, rows, paired=paired)
    assert set(hands(one)) <= set(heard)
    assert one.assign(0) == [], "nothing moves without a reason"
