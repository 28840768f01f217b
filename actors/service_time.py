"""How long a forward pass takes, learnt while serving. Pure."""

from narsil_stream.actors.queue import ModelKey

WEIGHT = 0.2
"""Of the newest measurement in the moving average."""


class ServiceTimes:
    """A moving average for each model and power of two of rows."""

    def __init__(self) -> None:
        self._seen: dict[ModelKey, dict[int, tuple[float, float]]] = {}

    def observe(self, model: ModelKey, rows: int, service_us: int) -> None:
        buckets = self._seen.setdefault(model, {})
        at = rows.bit_length()
        if at not in buckets:
            buckets[at] = (float(rows), float(service_us))
            return
        mean_rows, mean_us = buckets[at]
        buckets[at] = (mean_rows + WEIGHT * (rows - mean_rows), mean_us + WEIGHT * (service_us - mean_us))

    def predict(self, model: ModelKey, rows: int) -> int:
        """Microseconds that a batch of `rows` takes; 0 while nothing was measured."""
        buckets = self._seen.get(model)
        if not buckets:
            return 0
        nearest = min(buckets, key=lambda at: abs(at - rows.bit_length()))
        mean_rows, mean_us = buckets[nearest]
        return int(mean_us * max(1.0, rows / mean_rows))

    def us_per_row(self, model: ModelKey) -> float:
        """At the most efficient batch size seen, which is what a backlog is served with; 0 while unknown."""
        buckets = self._seen.get(model)
        return min((us / rows for rows, us in buckets.values()), default=0.0) if buckets else 0.0
