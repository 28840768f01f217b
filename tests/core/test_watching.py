"""What `narsil top` makes of the reports of all processes."""

from math import inf, isnan

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from prometheus_client import CollectorRegistry

from narsil_stream.core.telemetry import SECONDS, RequestMetrics, text
from narsil_stream.core.watching import GONE_US, SILENT_US, Watch, quantile, reading
from narsil_stream.schemas.internal import Report

SECOND_US = 1_000_000


def report(metrics: str, kind: str = "batcher", actor: str = "batcher-1", state: str = "up") -> Report:
    return Report(kind, actor, 17, state, "", metrics)


class Gateway:
    """The metrics of one that answers."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = RequestMetrics(self._registry)

    def answer(self, times: int, rows: int, seconds: float) -> None:
        for _ in range(times):
            self.requests.offered.inc()
            self.requests.answered(rows, seconds)

    def report(self) -> Report:
        return report(text(self._registry), "gateway", "gateway-1")


def test_rates_and_times_are_those_between_the_two_newest_reports():
    """Totals since the start would hide what happens now."""
    gateway, watch = Gateway(), Watch()
    gateway.answer(1_000, rows=5, seconds=9.0)
    watch.add(reading(gateway.report(), 0))
    assert not watch.ready()
    gateway.answer(50, rows=100, seconds=0.0011)
    gateway.requests.offered.inc()
    gateway.requests.refused("OVERLOADED")
    watch.add(reading(gateway.report(), 2 * SECOND_US))
    (row,) = watch.rows(2 * SECOND_US)
    assert watch.ready()
    assert (row.requests_per_s, row.rows_per_s, row.refused_per_s, row.failed_per_s) == (25.5, 2_500, 0.5, 0)
    assert 1 < row.p50_ms < row.p99_ms <= 2
    assert (row.p50_ms, row.p99_ms) == watch.front(2 * SECOND_US)


def test_one_report_gives_no_rates_and_what_an_actor_has_not_is_not_zero():
    """A zero would read as "nothing comes in"."""
    watch = Watch()
    watch.add(reading(report("narsil_queue_rows 12.0\n"), 0))
    (row,) = watch.rows(0)
    assert row.queue_rows == 12
    assert isnan(row.requests_per_s) and isnan(row.slots) and isnan(row.p99_ms)


def test_who_stops_reporting_is_silent_and_then_gone():
    """A frozen process must be seen at once; yesterday's need not be."""
    watch = Watch()
    watch.add(reading(report("narsil_queue_rows 12.0\n"), 0))
    assert [row.state for row in watch.rows(SILENT_US)] == ["up"]
    (silent,) = watch.rows(SILENT_US + 1)
    assert silent.state == "silent" and isnan(silent.queue_rows)
    assert watch.rows(GONE_US) == []


def test_who_says_goodbye_is_not_shown_as_silent():
    """A rolling restart is no alarm."""
    watch = Watch()
    watch.add(reading(report(""), 0))
    watch.add(reading(report("", state="stopped"), 1))
    assert watch.rows(2) == []


def test_rows_come_in_the_order_of_a_requests_path():
    """A table that jumps cannot be read."""
    watch = Watch()
    for kind in ("executor", "batcher", "gateway"):
        watch.add(reading(report("", kind, f"{kind}-2"), 0))
        watch.add(reading(report("", kind, f"{kind}-1"), 0))
    assert [row.actor for row in watch.rows(0)] == [
        "gateway-1", "gateway-2", "batcher-1", "batcher-2", "executor-1", "executor-2",
    ]  # fmt: skip


@pytest.mark.parametrize("metrics", ['narsil_rows_total{a="', "narsil_rows_total one\n"])
def test_what_is_no_exposition_is_told_from_one(metrics: str):
    """The command leaves that process out, and shows the others."""
    with pytest.raises(ValueError, match="Prometheus"):
        reading(replace(report(""), metrics=metrics), 0)


@given(st.lists(st.sampled_from(SECONDS), min_size=1, max_size=200), st.sampled_from([0.5, 0.9, 0.99]))
def test_a_quantile_lies_in_the_bucket_of_the_true_one(observed: list[float], q: float):
    """What the histogram cannot tell apart may be off by a bucket's width, and by no more."""
    bounds = (*SECONDS, inf)
    buckets = {bound: float(sum(value <= bound for value in observed)) for bound in bounds}
    true = sorted(observed)[max(0, -(-len(observed) * q // 1).__int__() - 1)]
    below = max((bound for bound in (0.0, *SECONDS) if bound < true), default=0.0)
    assert below <= quantile(buckets, q) <= true


def test_nothing_observed_has_no_quantile():
    """0 ms would be a wonder."""
    assert isnan(quantile({}, 0.5))
    assert isnan(quantile({0.1: 0.0, inf: 0.0}, 0.5))
