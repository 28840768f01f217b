"""Our counters and histograms are plain numbers: what they expose is what prometheus_client's would."""

from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Counter, Histogram

from narsil_stream.core.telemetry import SECONDS, Count, Spread, text


@given(st.lists(st.floats(0, 20) | st.sampled_from(SECONDS)))
def test_a_spread_says_what_a_histogram_says(seen: list[float]) -> None:
    """Dashboards and alerts read bucket bounds literally."""
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    spread = Spread("waits", "Waits", SECONDS, ours)
    histogram = Histogram("waits", "Waits", buckets=SECONDS, registry=theirs)
    for value in seen:
        spread.observe(value)
        histogram.observe(value)
    assert text(ours) == text(theirs)


@given(st.lists(st.integers(0, 1_000)))
def test_a_count_says_what_a_counter_says(amounts: list[int]) -> None:
    """The same name, with its suffix."""
    ours, theirs = CollectorRegistry(), CollectorRegistry()
    count, counter = Count("seen", "Seen", ours), Counter("seen", "Seen", registry=theirs)
    for amount in amounts:
        count.inc(amount)
        counter.inc(amount)
    assert text(ours) == text(theirs)
