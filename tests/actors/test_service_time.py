"""Service times: what was measured predicts what comes."""

import pytest

from narsil_stream.actors.service_time import WEIGHT, ServiceTimes
from tests.actors.puppets import MODEL, OTHER


def learnt(**measured: int) -> ServiceTimes:
    times = ServiceTimes()
    for rows, service_us in measured.items():
        times.observe(MODEL, int(rows.removeprefix("rows_")), service_us)
    return times


def test_nothing_is_predicted_for_a_model_that_was_never_measured():
    """A made-up number would refuse the first requests, or time them out."""
    times = learnt(rows_8=100)
    assert times.predict(OTHER, 8) == 0
    assert times.us_per_row(OTHER) == 0.0


def test_a_batch_of_a_known_size_takes_as_long_as_before():
    """Deadlines and failover rest on it."""
    times = learnt(rows_8=100, rows_512=900)
    assert times.predict(MODEL, 8) == 100
    assert times.predict(MODEL, 512) == 900


def test_the_average_moves_towards_new_measurements():
    """A device that has slowed down would be taken for dead again and again."""
    times = learnt(rows_8=100)
    times.observe(MODEL, 8, 200)
    assert times.predict(MODEL, 8) == int(100 + WEIGHT * 100)
    for _ in range(50):
        times.observe(MODEL, 8, 200)
    assert times.predict(MODEL, 8) in (199, 200)


def test_a_size_never_seen_is_predicted_from_the_nearest_one():
    """Larger in proportion; smaller no shorter, since a launch costs what it costs."""
    times = learnt(rows_64=1_000)
    assert times.predict(MODEL, 640) == 10_000
    assert times.predict(MODEL, 1) == 1_000


@pytest.mark.parametrize("order", [(8, 512), (512, 8)])
def test_a_backlog_is_served_at_the_most_efficient_size(order: tuple[int, int]):
    """Under load batches are full: counting rows at the price of lone ones would refuse far too early."""
    times = ServiceTimes()
    for rows in order:
        times.observe(MODEL, rows, {8: 80, 512: 512}[rows])
    assert times.us_per_row(MODEL) == 1.0
