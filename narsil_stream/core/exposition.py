"""The metrics port: what all processes reported, under one roof, and the health of each."""

import http.server
import logging
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import msgspec
from prometheus_client import CollectorRegistry
from prometheus_client.core import Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from narsil_stream.schemas.internal import Report

log = logging.getLogger(__name__)

Health = Mapping[str, Any]


class Reported(Collector):
    """Metrics of other processes as one registry's own, each sample labelled with its actor's kind and name."""

    def __init__(self, reports: Callable[[], Iterable[Report]]) -> None:
        self._reports = reports

    def describe(self) -> Iterable[Metric]:
        return []

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Metric] = {}
        for report in self._reports():
            whose = {"kind": report.kind, "actor": report.actor}
            for family in _parsed(report):
                merged = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    merged.samples.append(sample._replace(labels=sample.labels | whose))
        return families.values()


def _parsed(report: Report) -> list[Metric]:
    """Nothing for a report that is not Prometheus's text: one bad process must not hide the others."""
    try:
        return list(text_string_to_metric_families(report.metrics))
    except Exception as error:  # the parser raises what it stumbles over
        log.warning("the metrics of %s cannot be read: %s", report.actor, error)
        return []


class MetricsServer:
    """`/metrics` in Prometheus's text form, `/health` in JSON (503 while something is down). Its own thread."""

    def __init__(
        self, host: str, port: int, reports: Callable[[], Iterable[Report]], health: Callable[[], Health]
    ) -> None:
        registry = CollectorRegistry()
        registry.register(Reported(reports))

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 10

            def do_GET(self) -> None:
                match self.path.partition("?")[0].rstrip("/"):
                    case "/metrics":
                        self._answer(200, CONTENT_TYPE_LATEST, generate_latest(registry))
                    case "/health":
                        state = health()
                        status = 200 if state["healthy"] else 503
                        self._answer(status, "application/json", msgspec.json.encode(state))
                    case _:
                        self._answer(404, "text/plain", b"there are /metrics and /health\n")

            def _answer(self, status: int, content_type: str, body: bytes) -> None:
                self.send_response(status)
                self.send_header("Content-Type", content_type)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                """Scrapes are not worth a line."""

        self._server = http.server.ThreadingHTTPServer((host, port), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), name="metrics", daemon=True)
        self.port = int(self._server.server_address[1])

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()
