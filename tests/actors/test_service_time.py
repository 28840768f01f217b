"""Service times: what was measured predicts what comes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from narsil_stream.actors.service_time import FRESH_US, TRUSTED, Curve, Pace, ServiceTimes, work_of
from tests.actors.puppets import MODEL, OTHER

LARGEST = 4_096
measurements = st.lists(st.tuples(st.integers(1, LARGEST), st.integers(0, 10_000_000)), min_size=1, max_size=40)


def learnt(*measured: tuple[int, int], times: int = 1) -> ServiceTimes:
    """From (work, µs), each so many times."""
    service = ServiceTimes()
    for work, us in measured:
        for _ in range(times):
            service.observe(MODEL, work, us)
    return service


def affine(work: int, fixed: int = 1_000, row: int = 5) -> int:
    return fixed + row * work


def test_nothing_is_predicted_for_a_model_that_was_never_measured():
    """A made-up number would refuse the first requests, or time them out."""
    times = learnt((8, 100))
    assert times.predict(OTHER, 8) == 0
    assert times.us_per_row(OTHER) == 0.0
    assert times.most(OTHER, 1, 99) == 99
    assert not times.hopeless(OTHER, 8, 0, 0)


def test_a_batch_of_a_known_size_takes_as_long_as_before():
    """Deadlines and failover rest on it."""
    times = learnt((8, 100), (512, 900))
    assert times.predict(MODEL, 8) == 100
    assert times.predict(MODEL, 512) == 900


def test_a_size_never_seen_is_predicted_from_the_nearest_one():
    """Larger in proportion; smaller no shorter, since a launch costs what it costs."""
    times = learnt((64, 1_000))
    assert times.predict(MODEL, 640) == 10_000
    assert times.predict(MODEL, 1) == 1_000


def test_a_size_between_two_known_ones_lies_on_the_line_between_them():
    """A cold start would take every batch for the next larger one, and refuse what it could serve."""
    times = learnt((64, affine(64)), (2_048, affine(2_048)))
    for work in (100, 300, 1_000):
        assert times.predict(MODEL, work) == pytest.approx(affine(work), abs=1)
    assert times.predict(MODEL, 4_000) == pytest.approx(affine(4_000), rel=0.01), "beyond them it goes on"


@pytest.mark.parametrize("order", [(8, 512), (512, 8)])
def test_a_backlog_is_served_at_the_most_efficient_size(order: tuple[int, int]):
    """Under load batches are full: counting rows at the price of lone ones would refuse far too early."""
    times = learnt(*((rows, {8: 80, 512: 512}[rows]) for rows in order))
    assert times.us_per_row(MODEL) == 1.0


def test_ids_count_as_work_where_bags_hold_many():
    """A row with twenty ids in each bag costs as much as twenty, and would be predicted like one."""
    assert work_of(rows=8, ids=8 * 26, tables=26) == 8
    assert work_of(rows=8, ids=8 * 26 * 20, tables=26) == 160
    assert work_of(rows=8, ids=0, tables=26) == 8
    assert work_of(rows=8, ids=27, tables=1) == 27


# Outliers and shifts


@given(st.integers(1, LARGEST), st.integers(100, 100_000), st.integers(TRUSTED, 20), st.integers(2, 1_000))
def test_one_measurement_that_is_far_off_moves_nothing(work: int, us: int, before: int, times_too_long: int):
    """A pause of the process would have every request refused for as long as its echo lasts."""
    times = learnt((work, us), times=before)
    times.observe(MODEL, work, us * times_too_long)
    assert times.predict(MODEL, work) == us
    times.observe(MODEL, work, 0)
    assert times.predict(MODEL, work) == us


def test_the_first_pass_of_all_may_be_far_off():
    """Warm-up is: what comes second counts."""
    times = learnt((64, 1_000_000), (64, 1_000))
    assert times.predict(MODEL, 64) == 1_000


@given(st.integers(2, 1_000))
def test_the_first_pass_of_a_size_is_held_to_what_its_neighbours_allow(times_too_long: int):
    """It has no measurements of its own that outvote it, and larger sizes would be refused in its name."""
    times = learnt((64, affine(64)), (2_048, affine(2_048)), times=TRUSTED)
    times.observe(MODEL, 512, affine(512) * times_too_long)
    assert times.predict(MODEL, 512) <= min(affine(2_048), affine(64) * 512 // 64)
    assert times.predict(MODEL, 64) == affine(64)
    assert times.predict(MODEL, 2_048) == affine(2_048)


@given(st.sampled_from([0.1, 0.5, 3.0, 50.0]), st.integers(TRUSTED, 20))
def test_another_speed_of_the_device_is_learnt_from_three_passes(factor: float, before: int):
    """One that has slowed down would be taken for dead again and again, one that has recovered left idle."""
    times = learnt((64, 1_000), times=before)
    for _ in range(TRUSTED):
        times.observe(MODEL, 64, int(1_000 * factor))
    assert times.predict(MODEL, 64) == int(1_000 * factor)


# For any measurements


@given(measurements)
def test_more_work_never_takes_less_time(measured: list[tuple[int, int]]):
    """A batch would be cut larger to be faster."""
    times = learnt(*measured)
    predicted = [times.predict(MODEL, work) for work in range(1, 2 * LARGEST, 97)]
    assert predicted == sorted(predicted)
    least = [times.at_least(MODEL, work) for work in range(1, 2 * LARGEST, 97)]
    assert least == sorted(least)
    assert all(low <= high for low, high in zip(least, predicted, strict=True))


@given(measurements, st.integers(0, 20_000_000), st.integers(1, 2 * LARGEST))
def test_the_most_that_fits_into_a_time_fits_and_one_more_does_not(measured, within_us, limit):
    """A batch would be late by its own rows, or smaller than it need be."""
    times = learnt(*measured)
    most = times.most(MODEL, within_us, limit)
    assert 0 <= most <= limit
    assert not most or times.predict(MODEL, most) <= within_us
    assert most == limit or times.predict(MODEL, most + 1) > within_us


@given(measurements)
def test_predictions_stay_between_the_extremes_that_were_measured(measured: list[tuple[int, int]]):
    """Neither neighbours nor the order of measurements may invent times: requests would be refused for a wait that
    nobody has."""
    curve = Curve()
    for work, us in measured:
        curve.observe(work, us, 0)
    sizes = [work for work, _ in measured]
    inside = range(min(sizes), max(sizes) + 1, 53)
    slowest = max(us for _, us in measured)
    assert all(curve.predict(work) <= slowest * max(1, work / min(sizes)) + 1 for work in inside)


# Proof


def test_a_request_is_hopeless_only_by_recent_and_repeated_measurement():
    """One slow pass, or the memory of a slow device, would shut it out for good: nothing new would be measured."""
    times = ServiceTimes()
    for now_us in range(TRUSTED):
        assert not times.hopeless(MODEL, 64, 500, now_us)
        times.observe(MODEL, 64, 1_000, now_us)
    assert times.hopeless(MODEL, 64, 999, FRESH_US)
    assert not times.hopeless(MODEL, 64, 1_000, FRESH_US)
    assert not times.hopeless(MODEL, 64, 999, FRESH_US + TRUSTED)


def test_a_small_request_is_not_hopeless_because_large_ones_are_slow():
    """Before a small one was measured, all that is known is that it is no slower."""
    times = learnt((4_096, 40_000), times=TRUSTED)
    assert not times.hopeless(MODEL, 8, 5_000, 0)


def test_a_pause_of_the_process_is_no_pace_of_the_queue():
    """For tens of batches after a pause, requests would be refused as if every batch took that long."""
    pace = Pace()
    for at in range(1, 101):
        pace.cut(100, 0, 1_000 * at)
    usual = pace.us_per_row
    pace.cut(100, 0, 60_000_000)
    assert pace.us_per_row < 5 * usual
    for at in range(1, 11):
        pace.cut(100, 0, 60_000_000 + 1_000 * at)
    assert pace.us_per_row == pytest.approx(usual, rel=0.5)
