"""From what load generators saw to rows of a report: medians of alternating rounds, spread, ratios, validity."""

import statistics
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from msgspec import Struct

from narsil_stream.bench import load, wrk
from narsil_stream.bench.load import Load, Outcome
from narsil_stream.bench.questions import Misbehaved
from narsil_stream.bench.report import Row

MARGIN = 1.5
"""By so much a bare echo must beat the fastest server, or the generator may be what was measured."""

UNITS = {"requests_per_s": "1/s", "rows_per_s": "1/s", "p50_ms": "ms", "p99_ms": "ms", "p999_ms": "ms"}


class BadRun(Misbehaved):
    """Wrong answers, or none, while a server was timed."""


class Figures(Struct, frozen=True):
    """One run against one server."""

    requests_per_s: float
    p50_ms: float
    p99_ms: float
    p999_ms: float
    sent: int
    """Requests that went out at least."""
    failed: int = 0
    """Refused or not answered."""
    late_p99_ms: float = 0.0
    """Open loop: how late the generator itself was."""

    def value(self, metric: str, rows: int) -> float:
        return self.requests_per_s * rows if metric == "rows_per_s" else float(getattr(self, metric))


Run = Callable[[], Figures]


def measure(name: str, given: Load, processes: int = 1, use_wrk: bool = False) -> Figures:
    """One run. `use_wrk`: for closed loops over HTTP, whose answers were checked before. Raises BadRun."""
    if use_wrk and given.questions[0].transport == "http" and not given.rate:
        return _by_wrk(name, wrk.run(given))
    return _figures(name, load.run(given, processes))


def _by_wrk(name: str, said: dict[str, Any]) -> Figures:
    if not said["requests"]:
        raise BadRun(name, "no request was answered")
    rate = (said["requests"] - said["failed"]) / said["us"] * 1e6
    return Figures(rate, said["p50"], said["p99"], said["p999"], said["requests"], said["failed"])


def _figures(name: str, outcome: Outcome) -> Figures:
    if outcome.wrong:
        raise BadRun(name, f"{outcome.wrong} of {outcome.sent} answers were wrong")
    if not outcome.good:
        raise BadRun(name, f"none of {outcome.sent} requests was answered")
    p50, p99, p999 = np.percentile(outcome.latencies, (50, 99, 99.9))
    late = np.frombuffer(outcome.lateness_ms, np.float32)
    return Figures(
        outcome.good / outcome.seconds,
        float(p50),
        float(p99),
        float(p999),
        outcome.sent,
        outcome.failed,
        float(np.percentile(late, 99)) if len(late) else 0.0,
    )


def alternate(
    sides: Mapping[str, Run], rounds: int, say: Callable[[str], None] = lambda text: None
) -> dict[str, list[Figures]]:
    """All take turns, in the same order, `rounds` times: a machine that slows down slows all alike."""
    found: dict[str, list[Figures]] = {name: [] for name in sides}
    for number in range(rounds):
        for name, run in sides.items():
            found[name].append(run())
            say(f"  round {number + 1}/{rounds} {name}: {found[name][-1].requests_per_s:,.0f} requests/s")
    return found


def rows_of(
    case: str, rows: int, own: list[Figures], baseline: str | None = None, other: list[Figures] | None = None
) -> Iterator[Row]:
    """The medians of `own`, how they compare with those of `other` (more than 1: better), and how far runs differ."""
    for metric, unit in UNITS.items():
        value = median(own, metric, rows)
        ratio = None
        if other:
            against = median(other, metric, rows)
            ratio = against / value if unit == "ms" else value / against
        yield Row(case, metric, value, unit, baseline, ratio)
    values = [one.requests_per_s for one in own]
    yield Row(
        case, "requests_per_s_spread", 100 * (max(values) - min(values)) / statistics.median(values), "%", baseline
    )


def median(runs: list[Figures], metric: str = "requests_per_s", rows: int = 1) -> float:
    return statistics.median(one.value(metric, rows) for one in runs)


def doubt(fastest: float, echo: float) -> str:
    """Why figures of servers up to `fastest` may be those of the generator; "" when the bare echo is fast enough."""
    if echo >= MARGIN * fastest:
        return ""
    return (
        f"the generator reached {echo:,.0f} requests/s at a bare echo, {echo / fastest:.2f} times the fastest server's "
        f"{fastest:,.0f}; less than {MARGIN} times, so the generator may be what was measured"
    )
