"""What every process reports each second, as rates and times: the numbers behind `narsil top`. No I/O, no clock."""

from collections.abc import Iterable
from math import inf, isnan, nan

from msgspec import Struct
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

from narsil_stream.schemas.internal import Report

SILENT_US = 3_500_000
"""Reports come each second; who misses three is shown as silent."""
GONE_US = 15_000_000
"""Who is silent for this long is no longer shown."""
DOWN = ("gone", "stopped")

Buckets = dict[float, float]
"""Of a histogram: how many were at most this long, seconds; cumulative."""


class Reading(Struct, frozen=True):
    """One report of one actor, at one time."""

    at_us: int
    kind: str
    actor: str
    pid: int
    state: str
    detail: str
    totals: dict[str, float]
    """Counters and gauges; "name{value of its only label}" for those with one."""
    histograms: dict[str, Buckets]


class Row(Struct, frozen=True, kw_only=True):
    """One actor between its two newest reports. NaN: it has no such thing, or has not said it twice yet."""

    kind: str
    actor: str
    pid: int
    state: str
    """up, draining, down ..., or silent."""
    detail: str
    requests_per_s: float = nan
    """Requests taken in; of an executor, batches computed."""
    rows_per_s: float = nan
    p50_ms: float = nan
    p99_ms: float = nan
    """From arrival to answer; of an executor, of one forward pass. As exact as the histogram's buckets are."""
    queue_rows: float = nan
    queue_p99_ms: float = nan
    slots: float = nan
    """Batches an executor takes at once; of a batcher, those that it sent or may send now."""
    slots_busy: float = nan
    refused_per_s: float = nan
    """Turned away on arrival, of any kind."""
    failed_per_s: float = nan
    """Accepted, then expired or failed."""
    cpu_percent: float = nan
    """Of one core; of the process, shown with its first actor."""
    memory_mib: float = nan


def reading(report: Report, at_us: int) -> Reading:
    """Raises ValueError for what is not Prometheus's text."""
    totals: dict[str, float] = {}
    histograms: dict[str, Buckets] = {}
    for family in _families(report.metrics):
        for sample in family.samples:
            if sample.name.endswith("_bucket"):
                histograms.setdefault(family.name, {})[float(sample.labels["le"])] = sample.value
            elif len(sample.labels) <= 1:
                label = "".join(f"{{{value}}}" for value in sample.labels.values())
                totals[sample.name + label] = sample.value
    return Reading(at_us, report.kind, report.actor, report.pid, report.state, report.detail, totals, histograms)


def _families(metrics: str) -> list[Metric]:
    try:
        return list(text_string_to_metric_families(metrics))
    except Exception as error:  # the parser raises what it stumbles over
        raise ValueError(f"no metrics in Prometheus's form: {error}") from None


class Watch:
    """The two newest readings of each actor."""

    def __init__(self) -> None:
        self._seen: dict[str, tuple[Reading | None, Reading]] = {}

    def add(self, new: Reading) -> None:
        _, before = self._seen.get(new.actor, (None, None))
        if new.state in DOWN:
            self._seen.pop(new.actor, None)
        elif before is None or new.at_us > before.at_us:
            self._seen[new.actor] = before, new

    def rows(self, now_us: int) -> list[Row]:
        """In the order of a request's path. Who was silent for `GONE_US` is forgotten."""
        self._seen = {actor: pair for actor, pair in self._seen.items() if now_us - pair[1].at_us < GONE_US}
        rows = [_row(before, new, now_us) for before, new in self._seen.values()]
        order = {"gateway": 0, "batcher": 1, "executor": 2}
        return sorted(rows, key=lambda row: (order.get(row.kind, 3), row.actor))

    def ready(self) -> bool:
        """Whether there are rates: everybody has reported twice."""
        return bool(self._seen) and all(before is not None for before, _ in self._seen.values())

    def front(self, now_us: int) -> tuple[float, float]:
        """Median and 99th percentile, ms, as the callers of all gateways have them; without gateways, of batchers."""
        for kind in ("gateway", "batcher"):
            fresh = [
                _grown(before, new, "narsil_request_seconds")
                for before, new in self._seen.values()
                if new.kind == kind and now_us - new.at_us < SILENT_US
            ]
            if any(fresh):
                together = _summed(fresh)
                return quantile(together, 0.5) * 1e3, quantile(together, 0.99) * 1e3
        return nan, nan


def quantile(buckets: Buckets, q: float) -> float:
    """Seconds, interpolated inside its bucket as Prometheus's `histogram_quantile` does; NaN: nothing was observed."""
    bounds = sorted(buckets)
    total = buckets[bounds[-1]] if bounds else 0
    if not total:
        return nan
    below, lower = 0.0, 0.0
    for bound in bounds:
        if buckets[bound] >= q * total:
            if bound == inf:
                return lower
            inside = buckets[bound] - below
            return lower + (bound - lower) * ((q * total - below) / inside if inside else 1.0)
        below, lower = buckets[bound], bound
    return lower


def total(values: Iterable[float]) -> float:
    """The sum of those that are known; NaN if none is."""
    known = [value for value in values if not isnan(value)]
    return sum(known) if known else nan


def _row(before: Reading | None, new: Reading, now_us: int) -> Row:
    silent = now_us - new.at_us > SILENT_US
    known = Row(
        kind=new.kind, actor=new.actor, pid=new.pid, state="silent" if silent else new.state, detail=new.detail
    )  # fmt: skip
    if silent:
        return known
    return _executor(known, before, new) if new.kind == "executor" else _taker(known, before, new)


def _taker(known: Row, before: Reading | None, new: Reading) -> Row:
    """Of who takes requests: gateways and batchers."""
    seconds = _grown(before, new, "narsil_request_seconds")
    free, flying = _get(new, "narsil_credits"), _get(new, "narsil_in_flight")
    return _with(
        known, before, new,
        requests_per_s=_rate(before, new, "narsil_requests_offered_total"),
        rows_per_s=_rate(before, new, "narsil_rows_total"),
        p50_ms=quantile(seconds, 0.5) * 1e3,
        p99_ms=quantile(seconds, 0.99) * 1e3,
        queue_rows=_get(new, "narsil_queue_rows"),
        queue_p99_ms=quantile(_grown(before, new, "narsil_queue_wait_seconds"), 0.99) * 1e3,
        slots=free + flying,
        slots_busy=flying,
        refused_per_s=_rate(before, new, "narsil_requests_total{refused}"),
        failed_per_s=total(_rate(before, new, f"narsil_requests_total{{{how}}}") for how in ("expired", "failed")),
    )  # fmt: skip


def _executor(known: Row, before: Reading | None, new: Reading) -> Row:
    seconds = _grown(before, new, "narsil_compute_seconds")
    return _with(
        known, before, new,
        requests_per_s=_rate(before, new, "narsil_batches_total{computed}"),
        rows_per_s=_rate(before, new, "narsil_rows_total"),
        p50_ms=quantile(seconds, 0.5) * 1e3,
        p99_ms=quantile(seconds, 0.99) * 1e3,
        slots=_get(new, "narsil_slots"),
        slots_busy=_get(new, "narsil_slots_busy"),
        refused_per_s=_rate(before, new, "narsil_batches_total{turned away}"),
        failed_per_s=_rate(before, new, "narsil_batches_total{failed}"),
    )  # fmt: skip


def _with(known: Row, before: Reading | None, new: Reading, **values: float) -> Row:
    """A row with what its process says of itself."""
    return Row(
        kind=known.kind, actor=known.actor, pid=known.pid, state=known.state, detail=known.detail,
        cpu_percent=_rate(before, new, "process_cpu_seconds_total") * 100,
        memory_mib=_get(new, "process_resident_memory_bytes") / 2**20,
        **values,
    )  # fmt: skip


def _get(new: Reading, name: str) -> float:
    return new.totals.get(name, nan)


def _rate(before: Reading | None, new: Reading, name: str) -> float:
    """Per second. A counter with labels is not there until it has counted once."""
    if before is None:
        return nan
    family = name.partition("{")[0]
    if name not in new.totals and not any(known.startswith(family) for known in new.totals):
        return nan
    return (new.totals.get(name, 0) - before.totals.get(name, 0)) / (new.at_us - before.at_us) * 1e6


def _grown(before: Reading | None, new: Reading, name: str) -> Buckets:
    """What a histogram saw between two readings."""
    if before is None:
        return {}
    old = before.histograms.get(name, {})
    return {bound: count - old.get(bound, 0) for bound, count in new.histograms.get(name, {}).items()}


def _summed(histograms: Iterable[Buckets]) -> Buckets:
    together: Buckets = {}
    for buckets in histograms:
        for bound, count in buckets.items():
            together[bound] = together.get(bound, 0) + count
    return together
