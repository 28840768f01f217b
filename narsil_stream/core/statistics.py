"""What several batchers have counted, as one: Triton's statistics of each version of a model."""

from collections.abc import Iterable

from msgspec import structs

from narsil_stream.core.versions import newness
from narsil_stream.schemas.oip import BatchStatistics, Duration, InferStatistics, ModelStatistics, StatisticsReport


def merged(reports: Iterable[StatisticsReport]) -> dict[tuple[str, str], ModelStatistics]:
    """Sums, by name and version in their order. The reports are used up."""
    found: dict[tuple[str, str], ModelStatistics] = {}
    for report in reports:
        for model in report.model_stats:
            total = found.setdefault((model.name, model.version), model)
            if total is not model:
                _add(total, model)
    return dict(sorted(found.items(), key=lambda item: (item[0][0], newness(item[0][1]))))


def _add(total: ModelStatistics, more: ModelStatistics) -> None:
    total.last_inference = max(total.last_inference, more.last_inference)
    total.inference_count += more.inference_count
    total.execution_count += more.execution_count
    _add_durations(total.inference_stats, more.inference_stats)
    by_size = {batch.batch_size: batch for batch in total.batch_stats}
    for batch in more.batch_stats:
        same = by_size.setdefault(batch.batch_size, batch)
        if same is not batch:
            _add_durations(same, batch)
    total.batch_stats = [by_size[size] for size in sorted(by_size)]


def _add_durations(total: InferStatistics | BatchStatistics, more: InferStatistics | BatchStatistics) -> None:
    for name, value in structs.asdict(total).items():
        if isinstance(value, Duration):
            of = getattr(more, name)
            value.add(of.ns, of.count)
