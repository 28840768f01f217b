"""What a batcher counts and measures."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram

from narsil_stream.actors.scheduling import Scheduler
from narsil_stream.core.actor import Mailbox
from narsil_stream.core.telemetry import ROWS, SECONDS, RequestMetrics, Spread, gauges

MOST_TENANTS = 32
"""That have a label of their own, those that came first; the others share one."""


class TenantMetrics:
    """By tenant, of those that have a name."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._rows = Counter("narsil_tenant_rows", "Rows admitted, by tenant", ["tenant"], registry=registry)
        self._refused = Counter(
            "narsil_tenant_refusals", "Requests refused as OVERLOADED, by tenant", ["tenant"], registry=registry
        )
        self._labels: set[str] = set()

    def admitted(self, tenant: str, rows: int) -> None:
        self._rows.labels(self._label(tenant)).inc(rows)

    def refused(self, tenant: str) -> None:
        self._refused.labels(self._label(tenant)).inc()

    def _label(self, tenant: str) -> str:
        if tenant not in self._labels:
            if len(self._labels) >= MOST_TENANTS:
                return "(others)"
            self._labels.add(tenant)
        return tenant


class BatcherMetrics:
    """The batcher's own; the requests' are in `RequestMetrics`."""

    def __init__(self, registry: CollectorRegistry, policy: Scheduler, mailbox: Mailbox[Any]) -> None:
        self.requests = RequestMetrics(registry)
        self.tenants = TenantMetrics(registry)
        self.batch_rows = Histogram("narsil_batch_rows", "Rows in a batch", buckets=ROWS, registry=registry)
        self.batch_fill = Histogram(
            "narsil_batch_fill_ratio", "Rows in a batch, of max_rows", buckets=[i / 10 for i in range(1, 11)],
            registry=registry,
        )  # fmt: skip
        self.queue_wait = Spread("narsil_queue_wait_seconds", "From arrival to the cut of the batch", SECONDS, registry)
        self.no_answer = Counter("narsil_unanswerable", "Requests without a reply subject that may be used", ["why"],
                                 registry=registry)  # fmt: skip
        self.early = Counter("narsil_sent_in_future", "Requests sent later than now, by their clock", registry=registry)
        self.resent = Counter("narsil_batches_resent", "Batches sent a second time", registry=registry)
        self.tuned = Counter("narsil_batch_tuning", "Steps of row cap and linger towards the target",
                             ["knob", "direction"], registry=registry)  # fmt: skip
        executors, tuner = policy.executors, policy.tuner
        gauges(
            registry,
            narsil_queue_rows=("Rows waiting", lambda: policy.rows),
            narsil_queue_bytes=("Bytes waiting", lambda: policy.bytes),
            narsil_credits=("Slots in hand", lambda: sum(len(e.free) for e in executors.values())),
            narsil_in_flight=("Batches sent", lambda: sum(len(e.flights) for e in executors.values())),
            narsil_executors_alive=("Executors heard of", lambda: len(executors)),
            narsil_batch_cap_rows=("Most rows of a batch now", lambda: tuner.cap_rows),
            narsil_batch_linger_seconds=("Linger now", lambda: tuner.linger_us / 1e6),
            narsil_batch_slo_seconds=("Target of the p99; 0: none", lambda: tuner.slo_us / 1e6),
            narsil_batch_p99_seconds=("p99 from arrival to scores, last window of tuning", lambda: tuner.p99_us / 1e6),
            narsil_batch_wait_p99_seconds=("... from arrival to the cut", lambda: tuner.wait_p99_us / 1e6),
            narsil_batch_service_p99_seconds=("... from the cut to the scores", lambda: tuner.service_p99_us / 1e6),
            narsil_mailbox_peak=("Most messages taken at once", lambda: mailbox.peak),
        )
