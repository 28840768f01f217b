"""One port shows the metrics of all processes, and whether each is well."""

import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from narsil_stream.core.exposition import MetricsServer
from narsil_stream.core.telemetry import RequestMetrics, Telemetry, text
from narsil_stream.schemas.internal import Report
from tests.asking import metric


class Served:
    """A metrics server over reports and a health that the test sets."""

    def __init__(self) -> None:
        self.reports: list[Report] = []
        self.health: dict[str, Any] = {"healthy": True, "actors": []}
        self.server = MetricsServer("127.0.0.1", 0, lambda: self.reports, lambda: self.health)

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.server.port}{path}", timeout=10) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def report(self, kind: str, actor: str, metrics: str) -> None:
        self.reports.append(Report(kind, actor, 1, "up", "", metrics))


@pytest.fixture
def served() -> Iterator[Served]:
    running = Served()
    running.server.start()
    yield running
    running.server.stop()


def exposition(offered: int) -> str:
    """What an actor reports after this many requests."""
    telemetry = Telemetry()
    metrics = RequestMetrics(telemetry.registry)
    for _ in range(offered):
        metrics.offered.inc()
        metrics.answered(2, 0.01)
    return text(telemetry.registry)


def test_the_metrics_of_all_actors_are_told_apart_by_labels(served: Served) -> None:
    """Two batchers that report one metric must not hide each other."""
    served.report("batcher", "batcher-1", exposition(3))
    served.report("batcher", "batcher-2", exposition(4))
    served.report("gateway", "gateway-1", exposition(7))
    status, body = served.get("/metrics")
    assert status == 200
    name = "narsil_requests_offered_total"
    assert metric(body, name, actor="batcher-1") == 3
    assert metric(body, name, kind="batcher") == metric(body, name, kind="gateway") == 7
    assert metric(body, "narsil_request_seconds_count", actor="batcher-2") == 4
    assert metric(body, "narsil_requests_total", outcome="answered", actor="gateway-1") == 7


def test_the_merged_text_is_what_prometheus_reads(served: Served) -> None:
    """A family given twice, or a sample outside its family, makes the whole scrape fail."""
    for number in range(3):
        served.report("executor", f"executor-{number}", exposition(number))
    _, body = served.get("/metrics")
    families = list(text_string_to_metric_families(body))
    names = [family.name for family in families]
    assert len(set(names)) == len(names)
    assert {"narsil_requests", "narsil_event_loop_lag_seconds", "process_resident_memory_bytes"} <= set(names)
    assert body.count("# TYPE narsil_request_seconds histogram\n") == 1
    for family in families:
        assert family.samples or family.name == "narsil_errors"
        assert all({"kind", "actor"} <= sample.labels.keys() for sample in family.samples)


@pytest.mark.parametrize("broken", ["nonsense {", 'a{b="c} 1\n', "a 1 2 3 4\n", "\x00", "# TYPE a bogus\na 1\n"])
def test_a_report_that_cannot_be_read_hides_no_other(served: Served, broken: str) -> None:
    """One broken process would blind the operator to all."""
    served.report("batcher", "batcher-1", broken)
    served.report("batcher", "batcher-2", exposition(2))
    status, body = served.get("/metrics")
    assert status == 200
    assert metric(body, "narsil_requests_offered_total", actor="batcher-2") == 2


@pytest.mark.parametrize(("healthy", "status"), [(True, 200), (False, 503)])
def test_health_is_200_or_503_with_the_same_table(served: Served, healthy: bool, status: int) -> None:
    """Probes look at the status, people at the table."""
    served.health = {"healthy": healthy, "actors": [{"kind": "batcher", "state": "up"}]}
    code, body = served.get("/health")
    assert code == status
    assert '"kind":"batcher"' in body


def test_other_paths_are_404_and_many_may_ask_at_once(served: Served) -> None:
    """Several Prometheus servers and a person with a browser."""
    assert served.get("/")[0] == 404
    served.report("batcher", "batcher-1", exposition(1))
    with ThreadPoolExecutor(16) as threads:
        assert {status for status, _ in threads.map(served.get, ["/metrics", "/health"] * 16)} == {200}
