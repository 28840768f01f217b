"""How long a forward pass takes, learnt while serving. Pure; times in µs.

Size is counted as work: rows, or more where a request holds more ids than one for each table (`work_of`).
"""

from bisect import bisect_left, bisect_right
from collections import deque

from narsil_stream.actors.queue import ModelKey

KEPT = 5
"""Measurements of a size that count: their median. One that is far off moves nothing; three of five are the truth."""
TRUSTED = 3
"""So many of a size outvote what its neighbours say of it."""
FRESH_US = 1_000_000
"""What was measured longer ago does not prove that a request cannot make it: one may try."""
WEIGHT = 0.2
"""Of the newest measurement in the moving averages of flights and of `Pace`."""
SPIKE = 16.0
"""An interval counts for so many usual ones at most."""


def work_of(rows: int, ids: int, tables: int) -> int:
    """Rows, or as many one-hot rows as would hold these ids."""
    return max(rows, -(-ids // tables)) if tables else rows


class Recent:
    """The last few measurements of one thing. `median`: (µs, work) of the one in the middle, the faster of two."""

    def __init__(self) -> None:
        self._kept: deque[tuple[float, int]] = deque(maxlen=KEPT)
        self.median: tuple[float, int] = (0.0, 0)

    def __len__(self) -> int:
        return len(self._kept)

    def add(self, us: float, work: int = 0) -> None:
        self._kept.append((us, work))
        ranked = sorted(self._kept)
        self.median = ranked[(len(ranked) - 1) // 2]


class Curve:
    """One model's time by work: a point for each power of two that was measured, straight lines between them.

    `grain`: so many bits more tell sizes apart.
    """

    def __init__(self, grain: int = 0) -> None:
        self._grain = grain
        self._sizes: dict[int, Recent] = {}
        self._works: list[int] = []
        self._times: list[float] = []
        self._count = 0
        self.measured_us = 0
        """When the last measurement came."""
        self.us_per_row = 0.0
        """At the most efficient size that was measured, which is `best_work`."""
        self.best_work = 0

    def observe(self, work: int, service_us: int, now_us: int) -> None:
        self._count += 1
        self.measured_us = now_us
        bits = work.bit_length()
        size = (bits << self._grain) + (work << self._grain >> bits - 1)
        self._sizes.setdefault(size, Recent()).add(service_us, work)
        self._draw()

    def _draw(self) -> None:
        """Points in order of work; more work never takes less time."""
        sizes = [self._sizes[size] for size in sorted(self._sizes)]
        points = [(work, us, len(recent)) for recent in sizes for us, work in [recent.median]]
        if any(count < TRUSTED for _, _, count in points):
            points = [_bounded(points, at) for at in range(len(points))]
        self._works = [work for work, _, _ in points]
        self._times = _rising([(us, count) for _, us, count in points])
        self.us_per_row, self.best_work = min(
            (us / work, work) for work, us in zip(self._works, self._times, strict=True)
        )

    def predict(self, work: int) -> int:
        """Of sizes beyond those measured: the next smaller in proportion; the next larger, for a launch costs what it
        costs. Never less for more work."""
        works, times = self._works, self._times
        at = bisect_right(works, work)
        if at == 0:
            return int(times[0])
        if at < len(works):
            return int(_between(works[at - 1], times[at - 1], works[at], times[at], work))
        grown = times[-1] * work / works[-1]
        if len(works) > 1:
            grown = min(grown, max(times[-1], _between(works[-2], times[-2], works[-1], times[-1], work)))
        return int(grown)

    def at_least(self, work: int) -> int:
        """What it surely takes, if times are as measured: of a smaller size in proportion, of a larger no more."""
        works, times = self._works, self._times
        if work < works[0]:
            return int(times[0] * work / works[0])
        return int(times[-1]) if work > works[-1] else self.predict(work)

    @property
    def longest_us(self) -> float:
        """Of all sizes that were measured."""
        return self._times[-1]

    def measured(self, least: int, most: int) -> bool:
        """Whether work of such a size was."""
        return bisect_right(self._works, most) > bisect_left(self._works, least)

    def most(self, within_us: int, limit: int) -> int:
        """Most work, up to `limit`, that is predicted to take no longer; 0: none."""
        if self.predict(limit) <= within_us:
            return limit
        return bisect_right(range(1, limit), within_us, key=self.predict)

    def sure(self, now_us: int) -> bool:
        """Whether there is enough and recent proof to turn somebody away for."""
        return self._count >= TRUSTED and now_us - self.measured_us <= FRESH_US


def _between(work0: int, us0: float, work1: int, us1: float, work: int) -> float:
    return us0 + (us1 - us0) * (work - work0) / (work1 - work0)


def _bounded(points: list[tuple[int, float, int]], at: int) -> tuple[int, float, int]:
    """A point of few measurements lies between what trusted neighbours allow: not faster than less work nor slower than
    more, and no more than in proportion."""
    work, us, count = points[at]
    if count >= TRUSTED:
        return points[at]
    low, high = 0.0, float("inf")
    for other, other_us, of in points:
        if of >= TRUSTED and other < work:
            low, high = max(low, other_us), min(high, other_us * work / other)
        elif of >= TRUSTED and other > work:
            low, high = max(low, other_us * work / other), min(high, other_us)
    return work, max(low, min(us, high)) if low <= high else us, count


def _rising(points: list[tuple[float, int]]) -> list[float]:
    """The closest times that never fall (pool adjacent violators), each weighted by its count."""
    pools: list[tuple[float, int, int]] = []
    for us, weight in points:
        pools.append((us, weight, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (us0, weight0, points0), (us1, weight1, points1) = pools[-2:]
            mean = (us0 * weight0 + us1 * weight1) / (weight0 + weight1)
            pools[-2:] = [(mean, weight0 + weight1, points0 + points1)]
    return [us for us, _, count in pools for _ in range(count)]


class ServiceTimes:
    """All models."""

    def __init__(self) -> None:
        self._curves: dict[ModelKey, Curve] = {}
        self._flights: dict[ModelKey, float] = {}
        self._overhead = Recent()

    def observe(self, model: ModelKey, work: int, service_us: int, now_us: int = 0) -> None:
        self._curves.setdefault(model, Curve()).observe(max(1, work), service_us, now_us)

    def carried(self, us: int) -> None:
        """A batch that found its executor idle was answered so much later than its forward pass explains."""
        self._overhead.add(max(0, us))

    @property
    def overhead_us(self) -> int:
        """There and back: bus, queues of messages, copies."""
        return int(self._overhead.median[0])

    def predict(self, model: ModelKey, work: int) -> int:
        """Microseconds that a batch takes; 0 while nothing was measured."""
        curve = self._curves.get(model)
        return curve.predict(work) if curve else 0

    def most(self, model: ModelKey, within_us: int, limit: int) -> int:
        """Most work, up to `limit`, that is predicted to take no longer; `limit` while nothing was measured."""
        curve = self._curves.get(model)
        return curve.most(within_us, limit) if curve else limit

    def at_least(self, model: ModelKey, work: int) -> int:
        """What it surely takes, if times are as measured; 0 while nothing was measured."""
        curve = self._curves.get(model)
        return curve.at_least(work) if curve else 0

    def hopeless(self, model: ModelKey, work: int, within_us: int, now_us: int) -> bool:
        """Whether it is proven that so much work takes longer, even alone."""
        curve = self._curves.get(model)
        return curve is not None and curve.at_least(work) > within_us and curve.sure(now_us)

    def sure(self, model: ModelKey, now_us: int) -> bool:
        """Whether there is enough and recent proof to call anything hopeless."""
        curve = self._curves.get(model)
        return curve is not None and curve.sure(now_us)

    def landed(self, model: ModelKey, flight_us: int) -> None:
        """A batch came back so long after it was sent, or after our own before it, where nobody else has any."""
        mean_us = self._flights.get(model, float(flight_us))
        self._flights[model] = mean_us + WEIGHT * (flight_us - mean_us)

    def flight(self, model: ModelKey) -> int:
        """Microseconds until a batch's result, as batches are now (see `landed`); 0 while unknown."""
        return int(self._flights.get(model, 0.0))

    def longest(self, model: ModelKey) -> int:
        """Microseconds that the largest batches take; 0 while nothing was measured."""
        curve = self._curves.get(model)
        return int(curve.longest_us) if curve else 0

    def forget(self, model: ModelKey) -> None:
        self._curves.pop(model, None)
        self._flights.pop(model, None)

    def us_per_row(self, model: ModelKey) -> float:
        """At the most efficient batch size seen, which is what a backlog is served with; 0 while unknown."""
        curve = self._curves.get(model)
        return curve.us_per_row if curve else 0.0


class Pace:
    """How fast a queue moves while work waits in it, with batches as full, executors as many and rivals as greedy as
    they are."""

    def __init__(self) -> None:
        self.cut_us = 0
        self.us_per_row = 0.0
        self._mean_rows = self._mean_us = 0.0

    def cut(self, rows: int, waiting_since_us: int, now_us: int) -> None:
        """A batch was taken out of a queue in which work waited since then."""
        if waiting_since_us <= self.cut_us:
            took_us = float(now_us - self.cut_us)
            if self._mean_us:
                took_us = min(took_us, SPIKE * self._mean_us)
            self._mean_rows += WEIGHT * (rows - self._mean_rows)
            self._mean_us += WEIGHT * (took_us - self._mean_us)
            self.us_per_row = self._mean_us / self._mean_rows
        self.cut_us = now_us
