"""The HTTP gateway when the backend is slow, callers leave, and the process is told to stop."""

import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from narsil_stream.core.config import BatchConfig, Config
from tests.asking import HttpAnswer, HttpCaller, Rows, ask_http, infer_json, json_scores, metric, scrape, some_rows
from tests.doubles import Gate
from tests.support import NatsServer, System, narsil, until

INFER = "/v2/models/ctr/infer"
QUEUE_ROWS = 10
MINUTE_US = 60_000_000


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def system(nats_server: NatsServer, criteo_model: Path, gate: Gate) -> Iterator[System]:
    """A gateway, and a batcher in which ten rows may wait, before a gate."""
    config = replace(Config(), batch=BatchConfig(queue_rows=QUEUE_ROWS))
    with System(nats_server.url, criteo_model, config=config, gateways=1, loader=gate.load) as running:
        yield running


class Asking:
    """Requests of one row each, under way on threads of their own."""

    def __init__(self, port: int, rows: Rows) -> None:
        self._port = port
        self.rows = rows
        self._threads = ThreadPoolExecutor(64)

    def __call__(self, row: int, **parameters: int) -> Future[HttpAnswer]:
        body = infer_json(self.rows.part(row), id=str(row), **({"timeout": MINUTE_US} | parameters))
        return self._threads.submit(ask_http, self._port, "POST", INFER, body)

    def right(self, row: int, answer: HttpAnswer) -> bool:
        assert answer.status == 200, answer
        return bool(np.allclose(json_scores(answer.json), self.rows.scores[row], rtol=0, atol=1e-6))


@pytest.fixture
def ask(system: System, criteo_model: Path) -> Asking:
    return Asking(system.http_port, some_rows(criteo_model, 64))


def gauge(system: System, kind: str, name: str) -> float:
    (actor,) = system.actors(kind)
    value = actor.registry.get_sample_value(name)
    assert value is not None
    return value


def waiting_rows(system: System) -> float:
    return gauge(system, "batcher", "narsil_queue_rows")


def fill_executor(system: System, ask: Asking) -> dict[int, Future[HttpAnswer]]:
    """One request in each of its two slots, so that the next ones have to wait."""
    asked = {}
    for row in range(2):
        asked[row] = ask(row)
        until(lambda row=row: gauge(system, "batcher", "narsil_in_flight") == row + 1, "it is on its way")
    return asked


def test_an_answer_that_cannot_come_within_the_budget_is_504_within_100_ms_of_it(
    system: System, gate: Gate, ask: Asking
) -> None:
    """A caller plans with its budget; an answer after it is worth nothing."""
    assert ask.right(0, ask(0).result(20))
    with gate.closed():
        for budget_ms in (50, 300):
            started = time.monotonic()
            answer = ask(1, timeout=budget_ms * 1_000).result(20)
            took_ms = (time.monotonic() - started) * 1e3
            assert (answer.status, answer.json["code"]) == (504, "DEADLINE_EXCEEDED")
            assert budget_ms <= took_ms < budget_ms + 100
    assert ask.right(2, ask(2).result(20))


def test_more_than_the_queue_holds_is_429_at_once_with_retry_after(system: System, gate: Gate, ask: Asking) -> None:
    """Refusing costs little; an unbounded queue costs everybody their deadline."""
    with gate.closed():
        fill_executor(system, ask)
        asked = {row: ask(row) for row in range(QUEUE_ROWS + 20)}
        until(lambda: sum(one.done() for one in asked.values()) == 20, "20 are refused")
        assert waiting_rows(system) == QUEUE_ROWS
        for one in (one.result() for one in asked.values() if one.done()):
            assert (one.status, one.json["code"]) == (429, "OVERLOADED")
            assert int(one.headers["retry-after"]) >= 1
            assert one.json["retry_after_us"] > 0
        waiting = {row: one for row, one in asked.items() if not one.done()}
    assert all(ask.right(row, one.result(20)) for row, one in waiting.items())


def test_a_caller_who_leaves_frees_its_place_and_harms_nobody(system: System, gate: Gate, ask: Asking) -> None:
    """Retry storms fill queues with work for callers who have left."""
    port = system.http_port
    with gate.closed():
        kept = fill_executor(system, ask)
        leaving = []
        for row in range(10, 14):
            wire = socket.create_connection(("127.0.0.1", port), 20)
            body = json.dumps(infer_json(ask.rows.part(row), timeout=MINUTE_US)).encode()
            wire.sendall(b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % (INFER.encode(), len(body)))
            wire.sendall(body)
            leaving.append(wire)
        until(lambda: waiting_rows(system) == 4, "four requests wait")
        kept |= {row: ask(row) for row in range(2, 5)}
        until(lambda: waiting_rows(system) == 7, "all wait")
        for wire in leaving:
            wire.close()
        until(lambda: waiting_rows(system) == 3, "their places are free")
    assert all(ask.right(row, answer.result(20)) for row, answer in kept.items())
    assert gate.rows == [1, 1, 3]
    assert metric(scrape(port), "narsil_errors_total", fault="CANCELLED") == 4
    assert metric(scrape(port), "narsil_requests_open") == 1  # the scrape itself


def test_a_caller_who_leaves_before_its_body_is_sent_harms_nobody(system: System, ask: Asking) -> None:
    """Broken uploads are everyday; each must end somewhere."""
    port = system.http_port
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", port), 20) as wire:
            wire.sendall(b"POST %b HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\nhello" % INFER.encode())
    assert ask.right(0, ask(0).result(20))
    until(lambda: metric(scrape(port), "narsil_requests_open") == 1, "none of them is open")
    text = scrape(port)
    assert metric(text, "narsil_requests_offered_total") == metric(text, "narsil_requests_total")


def test_a_draining_gateway_says_so_first_then_answers_what_is_open_and_closes_last(
    system: System, gate: Gate, ask: Asking
) -> None:
    """A balancer needs the time between the two to send its callers elsewhere."""
    port = system.http_port
    (gateway,) = system.runtimes["gateway"]
    with gate.closed():
        early = ask(0)
        until(lambda: gate.waiting == 1, "a request is open")
        drained = system.submit(gateway.drain())
        until(lambda: ask_http(port, "GET", "/v2/health/ready").status == 503, "not ready")
        assert ask_http(port, "GET", "/v2/health/live").status == 200
        late = ask(1)  # came although it was not ready: still answered
        until(lambda: gauge(system, "gateway", "narsil_requests_open") == 2, "it is taken")
        until(lambda: not accepts(port), "no new connection is taken")
        assert not drained.done()
    assert ask.right(0, early.result(20)) and ask.right(1, late.result(20))
    drained.result(20)


def accepts(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 20).close()
    except OSError:
        return False
    return True


def test_sigterm_under_load_loses_no_request(
    nats_server: NatsServer, criteo_model: Path, tmp_path: Path, free_port: int
) -> None:
    """Every deployment does it to every process. The callers here come until readiness is gone, as with a balancer."""
    rows = some_rows(criteo_model, 16)
    log = tmp_path / "gateway.log"
    ended: list[str] = []

    def ask_while_ready(row: int) -> None:
        while ready(free_port):
            try:
                answer = ask_http(free_port, "POST", INFER, infer_json(rows.part(row)))
                if answer.status == 503:  # it was slow between asking whether it is ready and this: not accepted
                    return
                right = answer.status == 200 and abs(json_scores(answer.json)[0] - rows.scores[row]) < 1e-6
                ended.append("right" if right else str(answer))
            except OSError as error:
                ended.append(repr(error))

    with System(nats_server.url, criteo_model), log.open("wb") as err:
        gateway = narsil(
            "gateway", "--nats-url", nats_server.url, "--door", "http", "--http-port", free_port, stderr=err
        )
        try:
            until(lambda: ready(free_port), "it is ready")
            callers = [threading.Thread(target=ask_while_ready, args=(row,)) for row in range(16)]
            for caller in callers:
                caller.start()
            until(lambda: len(ended) > 200, "it is busy")
            gateway.send_signal(signal.SIGTERM)
            assert gateway.wait(20) == 0, log.read_text()
            for caller in callers:
                caller.join(20)
        finally:
            gateway.kill()
            gateway.communicate()
    assert set(ended) == {"right"}, [e for e in ended if e != "right"][:3]


def test_sigterm_under_load_answers_all_that_64_connections_had_sent(
    nats_server: NatsServer, criteo_model: Path, tmp_path: Path, free_port: int
) -> None:
    """These callers keep their connections and never ask whether the gateway is ready: no request may be lost."""
    rows = some_rows(criteo_model, 64)
    log = tmp_path / "gateway.log"
    right: list[int] = []
    lost: list[str] = []

    def ask_until_refused(row: int) -> None:
        one, fresh = rows.part(row), True
        call: HttpCaller | None = None
        while True:
            try:
                call = call or HttpCaller(free_port)
                answer = call("POST", INFER, infer_json(one))
            except OSError as error:
                if not fresh:  # a new connection that is refused or reset was never accepted; an old one was
                    lost.append(f"{row}: {error!r}")
                return
            if answer.status == 503:  # told, before it was accepted, to go elsewhere
                return
            if answer.status != 200 or abs(json_scores(answer.json)[0] - one.scores[0]) > 1e-6:
                lost.append(f"{row}: {answer}")
            right.append(row)
            fresh = answer.headers.get("connection") == "close"
            call = None if fresh else call

    with System(nats_server.url, criteo_model), log.open("wb") as err:
        command = ("gateway", "--nats-url", nats_server.url, "--http-port", free_port, "--grpc-port", 0)
        gateway = narsil(*command, stderr=err)
        try:
            until(lambda: ready(free_port), "it is ready")
            callers = [threading.Thread(target=ask_until_refused, args=(row,)) for row in range(64)]
            for caller in callers:
                caller.start()
            until(lambda: len(set(right)) == 64, "each has had an answer")
            gateway.send_signal(signal.SIGTERM)
            assert gateway.wait(20) == 0, log.read_text()
            for caller in callers:
                caller.join(20)
        finally:
            gateway.kill()
            gateway.communicate()
    assert lost == []


def ready(port: int) -> bool:
    try:
        return ask_http(port, "GET", "/v2/health/ready").status == 200
    except OSError:
        return False
