"""The time in front of a device is what is not known otherwise: one's own batches there are counted as such."""

from narsil_stream.actors.simulation.comparison import DEVICES, FIXED
from narsil_stream.actors.simulation.load import Ours, Stretch, arrivals, play
from narsil_stream.actors.simulation.rivals import FixedTimeout
from narsil_stream.schemas.internal import Slot
from tests.actors.puppets import MODEL, Batcher, ticket

PASS_US = 8_000


def busy(rival: bool) -> Batcher:
    """One batch comes back after 8 ms, the one behind it after 16. `rival`: another batcher has slots, too."""
    batcher = Batcher()
    slots = (Slot(0, 0), Slot(1, 0))
    batcher.hear("e1", *slots, total=3 if rival else 2, rival_slots=[Slot(2, 0)] if rival else ())
    batcher.teach(8, PASS_US)
    batcher.offer(ticket(rows=8), ticket(rows=8))
    first, second = batcher.decide()
    batcher.now = PASS_US
    batcher.answer(first, PASS_US)
    batcher.now = 2 * PASS_US
    batcher.answer(second, PASS_US)
    return batcher


def test_the_wait_for_ones_own_batches_is_not_in_the_time_to_a_result():
    """It was added to itself: urgent requests were refused that would have been answered in time."""
    assert busy(rival=False).policy.forecast.times.flight(MODEL) == PASS_US


def test_where_others_send_too_the_whole_time_to_a_result_counts():
    """Their batches in front of the device are seen in nothing else; what is admitted would be late."""
    assert busy(rival=True).policy.forecast.times.flight(MODEL) > PASS_US


def test_at_nine_tenths_of_the_capacity_ours_answers_at_least_as_much_as_the_best_fixed_setting():
    """Below saturation nobody should have to look for a time-out and a queue length."""
    device = DEVICES["straight"]
    came = arrivals(1, [Stretch(0.9, 3_000_000)], device, 1)
    ours = Ours(came, device).play()
    best = max(
        play(FixedTimeout(*setting), came, device).goodput(1, device) for _, setting in FIXED if setting[0] == 1_024
    )
    assert ours.goodput(1, device) > best
    assert ours.missed == 0
