"""That a request's priority decides who is scored first, whichever door it came through."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest
from msgspec.structs import replace

from narsil_stream.core.config import BatchConfig, Config
from tests.asking import Rows, ask_http, infer_json, some_rows
from tests.doubles import Gate
from tests.gateways.calling import GrpcCaller, infer_message
from tests.support import NatsServer, System, until

MINUTE_US = 60_000_000
Ask = Callable[[System, Rows, int], bool]


def over_http(system: System, rows: Rows, priority: int) -> bool:
    body = infer_json(rows, priority=priority, timeout=MINUTE_US)
    return ask_http(system.http_port, "POST", "/v2/models/ctr/infer", body).status == 200


def over_grpc(system: System, rows: Rows, priority: int) -> bool:
    message = infer_message(rows, priority=priority, timeout=MINUTE_US)
    with GrpcCaller(system.grpc_port) as call:
        return len(call("ModelInfer", message.SerializeToString()).scores) == len(rows.dense)


@pytest.mark.parametrize("ask", [over_http, over_grpc])
def test_what_is_urgent_overtakes_what_waits(nats_server: NatsServer, criteo_model: Path, ask: Ask) -> None:
    """Otherwise a parameter that clients send would be read and forgotten."""
    gate, rows = Gate(), some_rows(criteo_model, 5)
    config = replace(Config(), batch=BatchConfig(max_rows=5))  # one request fills a batch: its rows tell which it was
    doors = {"gateways": 1, "grpc_gateways": 1}
    with System(nats_server.url, criteo_model, config=config, loader=gate.load, **doors) as system:
        (batcher,) = system.actors("batcher")

        def gauge(name: str) -> float:
            return batcher.registry.get_sample_value(name) or 0.0

        def send(count: int, priority: int) -> Future[bool]:
            return threads.submit(ask, system, rows.part(*range(count)), priority)

        with ThreadPoolExecutor(8) as threads:
            with gate.closed():
                asked = []
                for slot in (1, 2):
                    asked.append(send(slot, 100))
                    until(lambda slot=slot: gauge("narsil_in_flight") == slot, f"slot {slot} of the executor is taken")
                waiting = 0
                for count, priority in ((3, 200), (4, 200), (5, 1)):
                    asked.append(send(count, priority))
                    waiting += count
                    until(lambda rows=waiting: gauge("narsil_queue_rows") == rows, f"{waiting} rows wait")
            assert all(future.result(20) for future in asked)
    came = list(dict.fromkeys(gate.rows))  # a batch may come twice: it stood there for long
    assert came[:3] == [1, 2, 5]
    assert set(came[3:]) == {3, 4}  # those two go by their deadlines, which lie within a moment
