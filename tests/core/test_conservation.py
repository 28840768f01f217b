"""offered = answered + refused + expired + failed, at every actor that counts requests."""

import json
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from msgspec.structs import replace

from narsil_stream.core.config import BatchConfig, Config
from narsil_stream.core.telemetry import RequestMetrics, text
from tests.asking import Producer, ask_http, infer_json, infer_msgpack, metric, some_rows
from tests.doubles import Gate
from tests.support import NatsServer, System, until

INFER = "/v2/models/ctr/infer"


def outcomes(system: System, kind: str) -> dict[str, float]:
    (actor,) = system.actors(kind)
    exposition = text(actor.registry)
    counts = {how: metric(exposition, "narsil_requests_total", outcome=how) for how in RequestMetrics.OUTCOMES}
    return counts | {"offered": metric(exposition, "narsil_requests_offered_total")}


def conserved(counts: dict[str, float]) -> bool:
    return counts["offered"] == sum(counts[how] for how in RequestMetrics.OUTCOMES)


def test_after_a_mixed_load_every_request_is_counted_once_as_ended(nats_server: NatsServer, criteo_model: Path) -> None:
    """A request that is counted nowhere was lost; one that is counted twice hides one that was."""
    gate = Gate()
    rows = some_rows(criteo_model, 8)
    one = rows.part(0)
    config = replace(Config(), batch=BatchConfig(queue_rows=20))
    with System(nats_server.url, criteo_model, config=config, gateways=1, loader=gate.load) as system:
        port = system.http_port

        def post(body: object) -> int:
            return ask_http(port, "POST", INFER, body).status

        with ThreadPoolExecutor(48) as threads, Producer(nats_server.url) as producer:
            good = [threads.submit(post, infer_json(rows.part(at % 8))) for at in range(16)]
            bad = [threads.submit(post, body) for body in (b"{", b"", {"inputs": []}) * 5]
            unknown = threads.submit(ask_http, port, "POST", "/v2/models/nobody/infer", infer_json(one))
            assert {f.result() for f in good} == {200}
            assert {f.result() for f in bad} == {400}
            assert unknown.result().status == 404
            with gate.closed():
                wire = socket.create_connection(("127.0.0.1", port), 20)
                body = json.dumps(infer_json(one, timeout=60_000_000)).encode()
                wire.sendall(b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (INFER.encode(), len(body)))
                wire.sendall(body)
                until(lambda: gate.waiting, "the caller who will leave is served")
                late = [threads.submit(post, infer_json(one, timeout=200_000)) for _ in range(40)]
                statuses = {f.result() for f in late}
                assert statuses <= {429, 504} and 504 in statuses
                wire.close()
                until(lambda: outcomes(system, "gateway")["failed"] >= 1, "the caller who left is counted")
            producer.publish("narsil.v1.infer.ctr", infer_msgpack(one))  # no reply subject: not offered
            for payload in (b"", b"\x93", infer_msgpack(one), infer_msgpack(one, sent_us=1)):
                producer.ask("narsil.v1.infer.ctr", payload)
        until(lambda: all(conserved(outcomes(system, kind)) for kind in ("gateway", "batcher")), "nothing is open")
        for kind in ("gateway", "batcher"):
            assert all(outcomes(system, kind).values()), "the load has every outcome"
        assert outcomes(system, "gateway")["offered"] == 16 + 15 + 1 + 40 + 1
