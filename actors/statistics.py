"""What a batcher counts for each version of a model, as Triton's statistics have it. Integer additions only."""

from collections.abc import Iterable

import msgspec

from narsil_stream.actors.flights import Flight
from narsil_stream.actors.queue import ModelKey, Ticket
from narsil_stream.schemas.oip import BatchStatistics, ModelStatistics, StatisticsReport

EXACT_ROWS = 256
STEPS = 32
"""Sizes that are told apart in each power of two above that: a report must stay far smaller than a message."""


def counted_size(rows: int) -> int:
    """The size that a batch of so many rows is counted under."""
    if rows <= EXACT_ROWS:
        return rows
    step = (1 << ((rows - 1).bit_length() - 1)) // STEPS
    return -(-rows // step) * step


class Statistics:
    """Times in µs and ns, as their names say."""

    def __init__(self) -> None:
        self._models: dict[tuple[str, str], ModelStatistics] = {}
        self._batches: dict[tuple[str, str], dict[int, BatchStatistics]] = {}

    def failed(self, model: ModelKey, took_us: int = 0) -> None:
        """A request for a model that is served here ended without scores."""
        self._of(model).inference_stats.fail.add(1_000 * took_us)

    def computed(
        self, flight: Flight, answered: Iterable[Ticket], service_us: int, split_ns: int, now_us: int, unix_ms: int
    ) -> None:
        """A batch came back with scores. `answered`: those of its tickets that were still waited for."""
        key = flight.group.model
        total, infer_ns = self._of(key), 1_000 * service_us
        total.execution_count += 1
        batch = self._batch(key, counted_size(flight.rows))
        batch.compute_input.add(flight.joined_ns)
        batch.compute_infer.add(infer_ns)
        batch.compute_output.add(split_ns)
        count = rows = arrived_us = 0
        for ticket in answered:
            count += 1
            rows += ticket.rows
            arrived_us += ticket.arrived_us
        if not count:
            return
        total.last_inference = unix_ms
        total.inference_count += rows
        stats = total.inference_stats
        stats.success.add(1_000 * (count * now_us - arrived_us), count)
        stats.queue.add(1_000 * (count * flight.sent_us - arrived_us), count)
        stats.compute_input.add(count * flight.joined_ns, count)
        stats.compute_infer.add(count * infer_ns, count)
        stats.compute_output.add(count * split_ns, count)

    def report(self) -> bytes:
        """A `StatisticsReport` in JSON."""
        for key, batches in self._batches.items():
            self._models[key].batch_stats = [batches[size] for size in sorted(batches)]
        return msgspec.json.encode(StatisticsReport(tuple(self._models.values())))

    def _of(self, model: ModelKey) -> ModelStatistics:
        """Whatever its weights are: counts go on when these are replaced."""
        found = self._models.get(model[:2])
        if found is None:
            found = self._models[model[:2]] = ModelStatistics(model.name, model.version)
        return found

    def _batch(self, model: ModelKey, size: int) -> BatchStatistics:
        batches = self._batches.setdefault(model[:2], {})
        found = batches.get(size)
        if found is None:
            found = batches[size] = BatchStatistics(size)
        return found
