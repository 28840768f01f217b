"""Leases: the total never grows, idle slots go to who needs them, and what is out of date is turned away."""

from narsil_stream.actors.leasing import HOLD_US, Ledger
from narsil_stream.schemas.internal import Batch, BatcherBeat, Demand, Grant, Slot

LEASE_US = 500_000
NOTHING = memoryview(b"")


def ledger(slots: int = 2) -> Ledger:
    return Ledger("e", slots, LEASE_US)


def beat(of: Ledger, batcher: str, rows: int = 0, slack_us: int = 0, now_us: int = 0, state: str = "up") -> None:
    of.beat(BatcherBeat(batcher, (), 0, rows, slack_us, state), now_us)


def asks(of: Ledger, batcher: str, rows: int = 1, slack_us: int = 1_000, now_us: int = 0, *returned: Slot) -> None:
    of.demand(Demand(batcher, rows, slack_us, returned), now_us)


def sends(of: Ledger, batcher: str, slot: Slot, rows_behind: int = 0, now_us: int = 0) -> bool:
    demand = Demand(batcher, rows_behind, 1_000)
    return of.accept(Batch(1, batcher, slot, "m", "1", "digest", 1, NOTHING, NOTHING, NOTHING, 1_000, demand), now_us)


def hands(of: Ledger) -> list[str]:
    return [place.holder for place in of.places]


def test_all_slots_go_to_the_only_batcher():
    """Slots in nobody's hand leave the device idle."""
    one = ledger(3)
    beat(one, "a")
    assert one.assign(0) == [Grant("e", Slot(index, 0)) for index in range(3)]
    assert one.assign(0) == []


def test_more_batchers_never_mean_more_slots():
    """Every batcher would bring its own queue to the device, and nobody could bound the wait there."""
    one = ledger(2)
    for name in "abcdef":
        beat(one, name, rows=5)
    assert len(one.assign(0)) == 2
    taken = [sends(one, place.holder, place.slot, rows_behind=5) for place in one.places]
    assert taken == [True, True]
    assert one.assign(0) == []
    assert one.busy() == 2


def test_slots_that_nobody_asks_for_are_spread():
    """A batcher without a slot costs its first request a round trip."""
    one = ledger(4)
    beat(one, "a")
    beat(one, "b")
    one.assign(0)
    assert sorted(hands(one)) == ["a", "a", "b", "b"]


def test_a_slot_goes_to_the_batcher_with_the_earliest_deadline():
    """Earliest deadline first would hold only inside each batcher."""
    one = ledger(1)
    asks(one, "patient", slack_us=9_000)
    asks(one, "pressed", slack_us=1_000)
    one.assign(0)
    assert hands(one) == ["pressed"]


def test_deadlines_count_from_when_they_were_told():
    """Who has been waiting for a while must not look as patient as on its first word."""
    one = ledger(1)
    asks(one, "early", slack_us=9_000, now_us=0)
    asks(one, "late", slack_us=5_000, now_us=8_000)
    one.assign(8_000)
    assert hands(one) == ["early"]


def test_a_slot_returns_to_who_had_it_while_nobody_else_asks():
    """As few batchers as possible feed an executor, so that batches stay full."""
    one = ledger(1)
    beat(one, "a")
    beat(one, "b")
    one.assign(0)
    (first,) = hands(one)
    assert sends(one, first, one.places[0].slot)
    one.finish(one.places[0].slot)
    assert one.assign(0) == [Grant("e", Slot(0, 1))]
    assert hands(one) == [first]


def test_an_idle_slot_moves_to_who_asks_for_it():
    """An executor would stand idle while work waits at another batcher."""
    one = ledger(1)
    beat(one, "idle")
    one.assign(0)
    asks(one, "busy")
    assert one.assign(0) == [Grant("e", Slot(0, 1))]
    assert hands(one) == ["busy"]
    assert not sends(one, "idle", Slot(0, 0)), "it has moved on"
    assert sends(one, "busy", Slot(0, 1))


def test_a_batcher_that_is_about_to_use_its_slot_keeps_it():
    """Slots that are taken away between grant and use turn batches away all the time."""
    one = ledger(1)
    asks(one, "a")
    one.assign(0)
    asks(one, "b", slack_us=1)
    assert one.assign(HOLD_US - 1) == []
    assert hands(one) == ["a"]


def test_a_slot_that_stays_unused_moves_on_although_its_batcher_once_had_work():
    """Its work went to another executor, or the grant was lost: the device would idle until its next heartbeat."""
    one = ledger(1)
    asks(one, "a")
    one.assign(0)
    asks(one, "b", now_us=HOLD_US)
    assert one.assign(HOLD_US) == [Grant("e", Slot(0, 1))]
    assert hands(one) == ["b"]


def test_who_has_a_slot_in_hand_gets_no_second_one_before_others_have_one():
    """One loud batcher would take the whole device."""
    one = ledger(2)
    asks(one, "loud", rows=1_000, slack_us=1)
    asks(one, "quiet", slack_us=9_000)
    one.assign(0)
    assert sorted(hands(one)) == ["loud", "quiet"]


def test_an_old_generation_is_turned_away():
    """A batch that was delayed on the way would run with a slot that another batcher holds now."""
    one = ledger(1)
    beat(one, "a")
    one.assign(0)
    asks(one, "a", 0, 0, 0, Slot(0, 0))
    one.assign(0)
    assert not sends(one, "a", Slot(0, 0))
    assert sends(one, "a", Slot(0, 1))


def test_a_slot_carries_one_batch_at_a_time():
    """A doubled message would be computed twice, and the device would hold more than its slots."""
    one = ledger(1)
    beat(one, "a")
    one.assign(0)
    assert sends(one, "a", Slot(0, 0))
    assert not sends(one, "a", Slot(0, 0))
    assert one.busy() == 1


def test_nobody_sends_with_another_ones_slot_or_with_one_that_does_not_exist():
    """Bytes from the network choose the index."""
    one = ledger(1)
    beat(one, "a")
    one.assign(0)
    assert not sends(one, "b", Slot(0, 0))
    assert not sends(one, "a", Slot(1, 0))
    assert not sends(one, "a", Slot(-1, 0))


def test_slots_of_a_silent_batcher_come_back():
    """Each crash of a batcher would cost the device a slot, until none is left."""
    one = ledger(1)
    beat(one, "dead")
    one.assign(0)
    for now_us in range(0, LEASE_US + 1, LEASE_US // 5):
        beat(one, "alive", now_us=now_us)
        one.expire(now_us)
    one.assign(LEASE_US)
    assert hands(one) == ["alive"]
    assert not sends(one, "dead", Slot(0, 0), now_us=LEASE_US)


def test_a_pause_of_our_own_is_not_taken_for_the_death_of_others():
    """After a stop-the-world pause, the heartbeats of everybody are still unread."""
    one = ledger(1)
    beat(one, "a")
    one.expire(0)
    one.assign(0)
    one.expire(10 * LEASE_US)
    assert hands(one) == ["a"]


def test_slots_of_a_batcher_that_says_goodbye_come_back_at_once():
    """A rolling restart would cost a lease of idle time for each batcher."""
    one = ledger(1)
    beat(one, "leaving")
    one.assign(0)
    beat(one, "other")
    beat(one, "leaving", state="gone")
    one.assign(0)
    assert hands(one) == ["other"]


def test_a_batch_of_a_batcher_that_died_keeps_its_slot_until_it_is_computed():
    """The device would get one batch more than it has slots."""
    one = ledger(1)
    beat(one, "a")
    one.assign(0)
    assert sends(one, "a", Slot(0, 0))
    beat(one, "a", state="gone")
    asks(one, "b")
    assert one.assign(0) == []
    one.finish(Slot(0, 0))
    assert one.assign(0) == [Grant("e", Slot(0, 1))]


def test_a_slot_that_is_given_back_unused_is_leased_again():
    """The batch was lost on the way: nobody would ever use this slot again."""
    one = ledger(1)
    beat(one, "a")
    one.assign(0)
    asks(one, "a", 1, 1_000, 0, Slot(0, 0))
    assert one.assign(0) == [Grant("e", Slot(0, 1))]


def test_a_slot_whose_batch_has_come_is_not_given_back():
    """A slow batch is taken for a lost one: its slot is in use."""
    one = ledger(1)
    beat(one, "a")
    one.assign(0)
    assert sends(one, "a", Slot(0, 0))
    asks(one, "a", 1, 1_000, 0, Slot(0, 0))
    assert one.assign(0) == []
    assert one.busy() == 1


def test_a_closed_executor_leases_nothing_and_finishes_what_it_has():
    """A leaving executor that still takes work never leaves; one that drops work loses it."""
    one = ledger(2)
    beat(one, "a")
    one.assign(0)
    assert sends(one, "a", Slot(0, 0))
    one.close()
    assert [lease.slot for lease in one.leases()] == [Slot(0, 0)], "only what runs"
    assert not sends(one, "a", Slot(1, 0))
    assert one.busy() == 1
    one.finish(Slot(0, 0))
    assert one.assign(0) == []
    assert (one.busy(), one.leases()) == (0, ())
