"""Metrics of one process: a registry for it and one for each actor, no multiprocess mode."""

import asyncio
import gc
import math
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, Gauge, Histogram, Metric, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from narsil_stream.schemas.errors import Fault, named

disable_created_metrics()  # type: ignore[no-untyped-call]

SECONDS = (50e-6, 100e-6, 200e-6, 500e-6, 1e-3, 2e-3, 5e-3, 10e-3, 20e-3, 50e-3, 0.1, 0.2, 0.5, 1, 2, 5, 10)
ROWS = tuple(2**i for i in range(15))
LAG_EVERY = 0.1


class Telemetry:
    """What every process reports of itself."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._lag = Histogram(
            "narsil_event_loop_lag_seconds",
            "How late the event loop ran a timer",
            buckets=SECONDS,
            registry=self.registry,
        )
        self._gc_pause = Histogram(
            "narsil_gc_pause_seconds", "Pauses of the garbage collector", buckets=SECONDS, registry=self.registry
        )
        self._gc_started = 0.0
        self._tick: asyncio.TimerHandle | None = None

    def start(self) -> None:
        gc.callbacks.append(self._on_gc)
        self._schedule()

    def stop(self) -> None:
        if self._on_gc in gc.callbacks:
            gc.callbacks.remove(self._on_gc)
        if self._tick is not None:
            self._tick.cancel()

    def _schedule(self) -> None:
        loop = asyncio.get_running_loop()
        due = loop.time() + LAG_EVERY
        self._tick = loop.call_at(due, self._on_tick, due)

    def _on_tick(self, due: float) -> None:
        self._lag.observe(max(0.0, asyncio.get_running_loop().time() - due))
        self._schedule()

    def _on_gc(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._gc_started = time.perf_counter()
        else:
            self._gc_pause.observe(time.perf_counter() - self._gc_started)


def text(registry: CollectorRegistry) -> str:
    """Prometheus text exposition."""
    return generate_latest(registry).decode()


def gauges(registry: CollectorRegistry, **read: tuple[str, Callable[[], float]]) -> None:
    """Gauges that are read when somebody asks: name=(help text, function)."""
    for name, (help_text, function) in read.items():
        Gauge(name, help_text, registry=registry).set_function(function)


def settle_gc() -> None:
    """After warm-up: what lives now lives for good, so collections need not look at it again; and they come rarely."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


class Count(Collector):
    """A counter that belongs to one event loop: without prometheus_client's lock, a fifth of the time."""

    def __init__(self, name: str, help_text: str, registry: CollectorRegistry, label: str = "") -> None:
        """`label`: what `inc` is told, if anything."""
        self._said = (name, help_text)
        self._label = label
        self._values: dict[str, float] = {} if label else {"": 0.0}
        registry.register(self)

    def inc(self, by: float = 1, of: str = "") -> None:
        self._values[of] = self._values.get(of, 0.0) + by

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily(*self._said, labels=[self._label] if self._label else [])
        for of, value in self._values.items():
            family.add_metric([of] if self._label else [], value)
        yield family


class Spread(Collector):
    """A histogram that belongs to one event loop."""

    def __init__(self, name: str, help_text: str, buckets: Sequence[float], registry: CollectorRegistry) -> None:
        self._said = (name, help_text)
        self._bounds = tuple(buckets)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0
        registry.register(self)

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def collect(self) -> Iterator[Metric]:
        ends = map(floatToGoString, (*self._bounds, math.inf))
        buckets = list(zip(ends, accumulate(self._counts), strict=True))
        yield HistogramMetricFamily(*self._said, buckets=buckets, sum_value=self._sum)


class RequestMetrics:
    """What gateways and batchers count alike. offered = answered + refused + expired + failed, once nothing is open."""

    OUTCOMES = ("answered", "refused", "expired", "failed")

    def __init__(self, registry: CollectorRegistry) -> None:
        self.offered = Count("narsil_requests_offered", "Requests that came in", registry)
        self._ended = Count("narsil_requests", "Requests by how they ended", registry, "outcome")
        for outcome in self.OUTCOMES:
            self._ended.inc(0, outcome)
        self._faults = Count("narsil_errors", "Errors given, by row of the error table", registry, "fault")
        self.rows = Count("narsil_rows", "Rows scored", registry)
        self.seconds = Spread("narsil_request_seconds", "From arrival to answer", SECONDS, registry)

    def answered(self, rows: int, seconds: float) -> None:
        self._ended.inc(1, "answered")
        self.rows.inc(rows)
        self.seconds.observe(seconds)

    def refused(self, fault: str) -> None:
        """Turned away on arrival."""
        self._end("refused", fault)

    def ended_badly(self, fault: str) -> None:
        """Accepted, but not scored: its budget ran out, the caller left, or nobody could score it."""
        self._end("expired" if fault == "DEADLINE_EXCEEDED" else "failed", fault)

    def by_fault(self, fault: str) -> None:
        """For who only sees the answer: a gateway."""
        row = named(fault)
        if row in (Fault.DEADLINE_EXCEEDED, Fault.CANCELLED, Fault.INTERNAL, Fault.UNAVAILABLE):
            self.ended_badly(fault)
        else:
            self.refused(fault)

    def _end(self, outcome: str, fault: str) -> None:
        self._ended.inc(1, outcome)
        self._faults.inc(1, fault)
