"""Row cap and linger follow a target: rule by rule, and under simulated loads."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from prometheus_client import CollectorRegistry

from narsil_stream.actors.adaptive import WINDOW_US, Controller, Spread
from narsil_stream.actors.batcher_metrics import BatcherMetrics
from narsil_stream.actors.scheduling import Scheduler
from narsil_stream.actors.service_time import TRUSTED
from narsil_stream.actors.simulation.comparison import KNEE, SLO_US
from narsil_stream.actors.simulation.load import MAX_ROWS, RULES, Device, Ours, Score, Stretch, arrivals
from narsil_stream.core.actor import Mailbox

LINEAR = {"launch": Device(3_000, 3), "usual": Device(1_000, 5), "rows": Device(100, 6)}


def windows(controller: Controller, count: int, rows: int, service_us: int, wait_us: int, more: bool = True) -> None:
    """So many windows of batches like this one, on one executor without a pause."""
    now_us = getattr(controller, "test_clock", 0)
    for _ in range(count):
        for _ in range(250):
            cut_us = now_us
            now_us += max(service_us, WINDOW_US // 250)
            controller.cut(more_waits=more)
            controller.answered([cut_us - wait_us], rows, cut_us, service_us, cut_us + service_us)
        controller.adjust(1, now_us)
    controller.test_clock = now_us  # type: ignore[attr-defined]


def settled(controller: Controller) -> tuple[int, int]:
    return controller.cap_rows, controller.linger_us


# Rule by rule


def test_without_a_target_all_stays_as_configured():
    """0 means off: who has tuned by hand keeps what he chose."""
    controller = Controller(0, 512, 300)
    windows(controller, 20, rows=512, service_us=90_000, wait_us=900_000)
    assert settled(controller) == (512, 300)
    assert controller.steps == []


def test_a_long_wait_on_a_straight_device_leaves_the_cap_where_it_is():
    """Smaller batches would make an overload worse: latency is a bad sign of congestion once you batch."""
    controller = Controller(20_000, 512, 0)
    for rows in (64, 128, 256, 512):
        windows(controller, 1, rows, service_us=1_000 + 5 * rows, wait_us=90_000)
    windows(controller, 30, 512, service_us=1_000 + 5 * 512, wait_us=90_000)
    assert settled(controller) == (512, 0)


def test_a_size_that_nobody_has_tried_is_tried_for_a_few_batches():
    """Only what was measured can be known to be faster; a longer trial would cost what it saves."""
    controller = Controller(20_000, 512, 0)
    cut = []
    for now_us in range(0, 10_000_000, 4_000):
        rows = controller.cap_rows
        cut.append(rows)
        controller.cut(more_waits=True)
        controller.answered([now_us - 90_000] * 10, rows, now_us, 1_000 + 5 * rows, now_us + 3_500)
        controller.adjust(1, now_us + 3_500)
    assert cut.count(256) == TRUSTED
    assert cut.count(512) == len(cut) - TRUSTED
    assert controller.steps == []


def test_a_device_that_slows_down_beyond_a_size_gets_that_size():
    """Full batches would halve the throughput just when it is needed."""
    controller = Controller(20_000, MAX_ROWS, 0)
    for _ in range(40):
        rows = controller.cap_rows
        windows(controller, 1, rows, service_us=KNEE.pass_us(rows), wait_us=90_000)
    assert 0.6 * KNEE.knee_rows <= controller.cap_rows <= 1.4 * KNEE.knee_rows


def test_far_below_the_target_a_linger_fills_batches_and_goes_when_the_target_is_near():
    """It costs latency, so that it may only take what the target leaves."""
    controller = Controller(20_000, 512, 0)
    windows(controller, 30, rows=16, service_us=1_000, wait_us=0, more=False)
    assert 0 < controller.linger_us <= 20_000 // 8
    windows(controller, 60, rows=16, service_us=1_000, wait_us=18_000, more=False)
    assert controller.linger_us == 0


def test_a_linger_that_was_configured_is_the_least():
    """The operator's choice is a floor, not a first guess."""
    controller = Controller(20_000, 512, 700)
    windows(controller, 30, rows=16, service_us=1_000, wait_us=90_000, more=False)
    assert controller.linger_us == 700


def test_idle_executors_get_no_linger():
    """Callers would wait for company that does not come."""
    controller = Controller(20_000, 512, 0)
    windows(controller, 30, rows=1, service_us=100, wait_us=0, more=False)
    assert controller.linger_us == 0


def test_a_new_target_starts_from_the_configuration():
    """Live control changes it while the old one's tuning is in force."""
    controller = Controller(20_000, 512, 0)
    windows(controller, 30, rows=16, service_us=1_000, wait_us=0, more=False)
    controller.follow(30_000, 256, 100)
    assert (controller.slo_us, *settled(controller)) == (30_000, 256, 100)


@settings(deadline=None, max_examples=30)
@given(
    st.lists(
        st.tuples(st.integers(1, 512), st.integers(1, 50_000), st.integers(0, 200_000), st.booleans()), max_size=12
    )
)
def test_both_knobs_stay_inside_their_bounds_whatever_comes(measured):
    """A cap of 0 serves nobody; one above the maximum does not fit into memory."""
    controller = Controller(20_000, 512, 50)
    for rows, service_us, wait_us, more in measured:
        windows(controller, 1, rows, service_us, wait_us, more)
        assert 1 <= controller.cap_rows <= 512
        assert 50 <= controller.linger_us <= 20_000 // 8


@given(st.lists(st.integers(0, 10**9), min_size=1), st.sampled_from([0.5, 0.9, 0.99]))
def test_a_spreads_quantiles_are_right_to_a_sixteenth(values: list[int], share: float):
    """The target is compared with them."""
    spread = Spread()
    for value in values:
        spread.add(value)
    exact = sorted(values)[min(len(values) - 1, int(share * len(values)))]
    assert exact <= spread.quantile(share) <= exact + exact // 16 + 1


def test_what_it_does_is_in_the_metrics():
    """An operator sees that batches are smaller than configured, and why."""
    registry = CollectorRegistry()
    policy = Scheduler("b", replace(RULES, slo_us=SLO_US))
    BatcherMetrics(registry, policy, Mailbox(1))
    windows(policy.tuner, 30, rows=16, service_us=1_000, wait_us=0, more=False)
    assert registry.get_sample_value("narsil_batch_slo_seconds") == SLO_US / 1e6
    assert registry.get_sample_value("narsil_batch_cap_rows") == MAX_ROWS
    assert registry.get_sample_value("narsil_batch_linger_seconds") == policy.tuner.linger_us / 1e6 > 0
    assert registry.get_sample_value("narsil_batch_p99_seconds") == pytest.approx(0.001, rel=0.1)
    assert "target 20000 us" in policy.tuner.steps[0].why


# Under simulated loads


def played(device: Device, slo_us: int, *stretches: Stretch, seed: int = 7) -> tuple[Score, Ours]:
    ours = Ours(arrivals(seed, stretches, device, 1), device, rules=replace(RULES, slo_us=slo_us))
    return ours.play(), ours


def inside(score: Score) -> float:
    """Of all that was asked, answered inside the target."""
    return sum(us <= SLO_US for us in score.waits_us) / score.offered


@pytest.mark.parametrize("load", [0.2, 0.6, 0.9, 2.0])
@pytest.mark.parametrize("device", LINEAR)
def test_with_a_target_it_is_never_worse_than_the_default(device: str, load: float):
    """Low, medium, high, overload: who turns it on must not have to find out where it hurts."""
    for_us = 1_000_000 if load > 1 else 1_500_000
    default, _ = played(LINEAR[device], 0, Stretch(load, for_us))
    tuned, ours = played(LINEAR[device], SLO_US, Stretch(load, for_us))
    assert tuned.good_rows >= 0.97 * default.good_rows
    assert inside(tuned) >= inside(default) - 0.01
    assert tuned.missed <= default.missed + 0.002 * default.offered
    assert default.quantile(0.99) > SLO_US or tuned.quantile(0.99) <= SLO_US
    knobs = Counter((step.knob, step.direction) for step in ours.steps)
    assert min(knobs["cap", "up"], knobs["cap", "down"]) <= 1, "it does not swing"
    assert knobs.total() <= 8


@pytest.mark.parametrize("load", [0.6, 0.9, 2.0])
def test_on_a_device_that_slows_down_it_is_much_better_than_the_default(load: float):
    """Nobody has to know the best size beforehand, which differs by model and device."""
    default, _ = played(KNEE, 0, Stretch(load, 3_000_000))
    tuned, ours = played(KNEE, SLO_US, Stretch(load, 3_000_000))
    assert tuned.good_rows >= 1.15 * default.good_rows
    assert len(ours.steps) <= 8


def test_after_a_spike_the_p99_is_back_inside_the_target_within_a_second():
    """A backlog that drains slowly outlasts its cause."""
    calm, spike = Stretch(0.4, 1_500_000), Stretch(1.2, 2_000_000)
    score, _ = played(LINEAR["usual"], SLO_US, calm, spike, calm)
    over_us = calm.for_us + spike.for_us + 1_000_000
    after = sorted(us for us, at in zip(score.waits_us, score.answered_us, strict=True) if at > over_us)
    assert after[int(0.99 * len(after))] <= SLO_US
    assert score.missed <= 0.003 * (score.offered - score.refused)
