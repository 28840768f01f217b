"""How long a forward pass takes, learnt while serving. Pure."""

from narsil_stream.actors.queue import ModelKey

WEIGHT = 0.2
"""Of the newest measurement in the moving average."""


class Curve:
    """Mean rows and mean µs of one model's batches, by power of two of rows."""

    def __init__(self) -> None:
        self.means: dict[int, tuple[float, float]] = {}
        self.us_per_row = 0.0

    def observe(self, rows: int, service_us: int) -> None:
        at = rows.bit_length()
        mean_rows, mean_us = self.means.get(at, (float(rows), float(service_us)))
        self.means[at] = (mean_rows + WEIGHT * (rows - mean_rows), mean_us + WEIGHT * (service_us - mean_us))
        self.us_per_row = min(us / of for of, us in self.means.values())

    def predict(self, rows: int) -> int:
        at = rows.bit_length()
        if at not in self.means:
            at = min(self.means, key=lambda known: abs(known - at))
        mean_rows, mean_us = self.means[at]
        return int(mean_us * max(1.0, rows / mean_rows))


class ServiceTimes:
    """All models."""

    def __init__(self) -> None:
        self._curves: dict[ModelKey, Curve] = {}
        self._flights: dict[ModelKey, float] = {}

    def observe(self, model: ModelKey, rows: int, service_us: int) -> None:
        self._curves.setdefault(model, Curve()).observe(rows, service_us)

    def predict(self, model: ModelKey, rows: int) -> int:
        """Microseconds that a batch of `rows` takes; 0 while nothing was measured."""
        curve = self._curves.get(model)
        return curve.predict(rows) if curve else 0

    def landed(self, model: ModelKey, flight_us: int) -> None:
        """A batch came back so long after it was sent; the wait in front of the device is in that."""
        mean_us = self._flights.get(model, float(flight_us))
        self._flights[model] = mean_us + WEIGHT * (flight_us - mean_us)

    def flight(self, model: ModelKey) -> int:
        """Microseconds from sending a batch to its result, as batches are now; 0 while unknown."""
        return int(self._flights.get(model, 0.0))

    def longest(self, model: ModelKey) -> int:
        """Microseconds that the largest batches take; 0 while nothing was measured."""
        curve = self._curves.get(model)
        return int(max(us for _, us in curve.means.values())) if curve else 0

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
            self._mean_rows += WEIGHT * (rows - self._mean_rows)
            self._mean_us += WEIGHT * (now_us - self.cut_us - self._mean_us)
            self.us_per_row = self._mean_us / self._mean_rows
        self.cut_us = now_us
