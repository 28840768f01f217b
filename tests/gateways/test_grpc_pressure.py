"""The gRPC gateway when the backend is slow, callers leave, streams are long, and it is drained."""

import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import tritonclient.grpc as triton
from grpc_health.v1 import health_pb2, health_pb2_grpc
from msgspec.structs import replace

from narsil_stream.core.config import BatchConfig, Config, GrpcConfig
from narsil_stream.gateways import grpc_verbs
from narsil_stream.gateways.grpc_stream import STREAM_OPEN
from narsil_stream.schemas.protobuf import SERVICE, message_class
from tests.asking import Rows, some_rows
from tests.doubles import Gate
from tests.gateways.calling import (
    MINUTE_US,
    GrpcCaller,
    Stream,
    close,
    ended,
    gauge,
    infer_message,
    one,
    triton_client,
    triton_inputs,
)
from tests.support import NatsServer, System, until

QUEUE_ROWS = 10
OK = grpc.StatusCode.OK


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def system(nats_server: NatsServer, criteo_model: Path, gate: Gate) -> Iterator[System]:
    """A gateway, and a batcher in which ten rows may wait, before a gate."""
    config = replace(Config(), batch=BatchConfig(queue_rows=QUEUE_ROWS))
    with System(nats_server.url, criteo_model, config=config, grpc_gateways=1, loader=gate.load) as running:
        yield running


@pytest.fixture
def call(system: System) -> Iterator[GrpcCaller]:
    with GrpcCaller(system.grpc_port) as caller:
        yield caller


@pytest.fixture(scope="module")
def rows(criteo_model: Path) -> Rows:
    return some_rows(criteo_model, 64)


def waiting_rows(system: System) -> float:
    return gauge(system, "batcher", "narsil_queue_rows")


def fill_executor(system: System, call: GrpcCaller, rows: Rows) -> dict[int, Any]:
    """One request in each of its two slots, so that the next ones have to wait."""
    asked = {}
    for row in range(2):
        asked[row] = call.future("ModelInfer", one(rows, row))
        until(lambda row=row: gauge(system, "batcher", "narsil_in_flight") == row + 1, "it is on its way")
    return asked


def all_right(asked: dict[int, Any], rows: Rows) -> bool:
    return all(close(ended(future).scores, rows.part(row)) for row, future in asked.items())


def test_an_answer_that_cannot_come_within_the_budget_is_refused_within_100_ms_of_it(
    call: GrpcCaller, gate: Gate, rows: Rows
) -> None:
    """A caller plans with its budget; an answer after it is worth nothing."""
    with gate.closed():
        for budget_ms in (50, 300):
            started = time.monotonic()
            answer = call("ModelInfer", one(rows, 1, timeout=budget_ms * 1_000))
            took_ms = (time.monotonic() - started) * 1e3
            assert answer.code is grpc.StatusCode.DEADLINE_EXCEEDED
            assert budget_ms <= took_ms < budget_ms + 100
    assert close(call("ModelInfer", one(rows, 2)).scores, rows.part(2))


def test_a_calls_own_deadline_takes_its_request_out_of_the_queue(
    system: System, call: GrpcCaller, gate: Gate, rows: Rows
) -> None:
    """The caller has gone by then; its place belongs to somebody else."""
    with gate.closed():
        kept = fill_executor(system, call, rows)
        late = call.future("ModelInfer", one(rows, 9), timeout=0.3)
        until(lambda: waiting_rows(system) == 1, "it waits")
        assert late.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        until(lambda: waiting_rows(system) == 0, "its place is free")
    assert all_right(kept, rows)
    assert gate.rows == [1, 1]


def test_a_cancelled_call_takes_its_request_out_of_the_queue(
    system: System, call: GrpcCaller, gate: Gate, rows: Rows
) -> None:
    """Retry storms fill queues with work for callers who have left."""
    with gate.closed():
        kept = fill_executor(system, call, rows)
        leaving = [call.future("ModelInfer", one(rows, row)) for row in range(10, 14)]
        until(lambda: waiting_rows(system) == 4, "four requests wait")
        kept |= {row: call.future("ModelInfer", one(rows, row)) for row in range(2, 5)}
        until(lambda: waiting_rows(system) == 7, "all wait")
        for future in leaving:
            future.cancel()
        until(lambda: waiting_rows(system) == 3, "their places are free")
    assert all_right(kept, rows)
    assert gate.rows == [1, 1, 3]
    assert gauge(system, "grpc", "narsil_errors_total", fault="CANCELLED") == 4
    until(lambda: gauge(system, "grpc", "narsil_requests_open") == 0, "none is open")


def test_a_lost_connection_takes_its_requests_out_of_the_queue(
    system: System, call: GrpcCaller, gate: Gate, rows: Rows
) -> None:
    """A client that dies cancels nothing."""
    script = f"""
import sys, time
from tests.gateways.calling import GrpcCaller
call = GrpcCaller({system.grpc_port})
asked = [call.future("ModelInfer", bytes.fromhex(line)) for line in sys.stdin]
time.sleep(60)
"""
    requests = "\n".join(one(rows, row).SerializeToString().hex() for row in range(10, 14))
    with gate.closed():
        kept = fill_executor(system, call, rows)
        with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, text=True) as dying:
            try:
                assert dying.stdin is not None
                dying.stdin.write(requests)
                dying.stdin.close()
                until(lambda: waiting_rows(system) == 4, "four requests wait")
            finally:
                dying.kill()
        until(lambda: waiting_rows(system) == 0, "their places are free")
    assert all_right(kept, rows)


def test_more_than_the_queue_holds_is_refused_at_once_with_the_time_to_try_again(
    system: System, call: GrpcCaller, gate: Gate, rows: Rows
) -> None:
    """Refusing costs little; an unbounded queue costs everybody their deadline."""
    with gate.closed():
        kept = fill_executor(system, call, rows)
        asked = {row: call.future("ModelInfer", one(rows, row)) for row in range(2, QUEUE_ROWS + 22)}
        until(lambda: sum(future.done() for future in asked.values()) == 20, "20 are refused")
        assert waiting_rows(system) == QUEUE_ROWS
        for refused in (ended(future) for future in asked.values() if future.done()):
            assert refused.code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert int(refused.trailing["retry-after-ms"]) >= 1
        kept |= {row: future for row, future in asked.items() if not future.done()}
    assert all_right(kept, rows)


def test_more_bytes_than_a_gateway_works_on_are_refused(
    system: System, call: GrpcCaller, gate: Gate, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large requests of many callers add up to more than the memory."""
    verbs = system.actors("grpc")[0]._verbs  # type: ignore[attr-defined]
    monkeypatch.setattr(verbs, "_most_bytes", one(rows, 0).ByteSize() + 10)
    assert verbs._most_bytes < grpc_verbs.OPEN_BYTES
    with gate.closed():
        first = call.future("ModelInfer", one(rows, 0))
        until(lambda: gate.waiting == 1, "one is open")
        second = call("ModelInfer", one(rows, 1))
        assert second.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert int(second.trailing["retry-after-ms"]) >= 1
    assert all_right({0: first}, rows)


def test_calls_above_the_limit_of_a_connection_wait_for_their_turn(
    nats_server: NatsServer, criteo_model: Path, gate: Gate, rows: Rows
) -> None:
    """One client must not hold up the others; HTTP/2 makes it wait by itself.

    A client that sees a stream end before the server does may begin the next one too early: gRPC refuses it unread.
    """
    config = replace(Config(), grpc=GrpcConfig(max_streams=2))
    with (
        System(nats_server.url, criteo_model, config=config, grpc_gateways=1, loader=gate.load) as system,
        GrpcCaller(system.grpc_port) as call,
        GrpcCaller(system.grpc_port) as other,
    ):
        with gate.closed():
            asked = {row: call.future("ModelInfer", one(rows, row)) for row in range(2)}
            until(lambda: gauge(system, "grpc", "narsil_requests_open") == 2, "two are open")
            asked |= {row: call.future("ModelInfer", one(rows, row)) for row in range(2, 5)}
            assert other("ServerLive", b"").code is OK
            assert gauge(system, "grpc", "narsil_requests_open") == 2
        assert all_right({row: asked.pop(row) for row in range(2)}, rows)
        for row, answer in ((row, ended(future)) for row, future in asked.items()):
            if answer.code is not grpc.StatusCode.UNAVAILABLE:
                assert close(answer.scores, rows.part(row))


def test_more_calls_than_a_gateway_works_on_are_refused(
    nats_server: NatsServer, criteo_model: Path, gate: Gate, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each call costs memory before its first byte is looked at."""
    monkeypatch.setattr("narsil_stream.gateways.grpc.PARALLEL", 4)
    with (
        System(nats_server.url, criteo_model, grpc_gateways=1, loader=gate.load) as system,
        GrpcCaller(system.grpc_port) as call,
    ):
        with gate.closed():
            asked = {row: call.future("ModelInfer", one(rows, row)) for row in range(4)}
            until(lambda: gauge(system, "grpc", "narsil_requests_open") == 4, "four are open")
            assert call("ModelInfer", one(rows, 5)).code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert all_right(asked, rows)
        assert close(call("ModelInfer", one(rows, 5)).scores, rows.part(5))


# Streams


def test_a_stream_answers_what_is_ready_and_keeps_many_requests_open(
    system: System, call: GrpcCaller, rows: Rows, gate: Gate
) -> None:
    """One slow request must not hold up the others of its stream."""
    stream = Stream(call)
    with gate.closed():
        stream.send(one(rows, 0))
        until(lambda: gate.waiting == 1, "one is being computed")
        stream.send(*(one(rows, row) for row in range(1, 10)))
        bad = infer_message(rows.part(1), id="bad")
        bad.raw_input_contents.pop()
        stream.send(bad)
        answer = stream.next()
        assert (answer.infer_response.id, "raw_input_contents has 1" in answer.error_message) == ("bad", True)
        until(lambda: gauge(system, "grpc", "narsil_requests_open") == 10, "all others are open")
    stream.half_close()
    answers = {answer.infer_response.id: answer for answer in stream.call}
    assert set(answers) == set(map(str, range(10)))
    for row in range(10):
        said = answers[str(row)].infer_response
        assert not answers[str(row)].error_message
        assert abs(message_scores(said)[0] - rows.scores[row]) < 1e-6
        assert said.parameters["triton_final_response"].bool_param
    assert stream.call.code() is OK


def message_scores(said: Any) -> list[float]:
    return memoryview(said.raw_output_contents[0]).cast("f").tolist()


def test_an_error_is_a_message_and_the_stream_goes_on(call: GrpcCaller, rows: Rows) -> None:
    """One bad row of a long feed must not end it."""
    stream = Stream(call)
    nobody = one(rows, 3)
    nobody.model_name = "nobody"
    for message, id, told in ((nobody, "3", "is not served here"), (b"\xff", "", "not a protobuf message")):
        stream.send(message)
        answer = stream.next()
        assert told in answer.error_message
        assert answer.infer_response.id == id
        assert not answer.infer_response.outputs
    stream.send(one(rows, 4))
    assert abs(message_scores(stream.next().infer_response)[0] - rows.scores[4]) < 1e-6
    stream.half_close()
    assert list(stream.call) == []
    assert stream.call.code() is OK


def test_cancelling_a_stream_takes_its_requests_out_of_the_queue(
    system: System, call: GrpcCaller, gate: Gate, rows: Rows
) -> None:
    """As for a call of its own."""
    with gate.closed():
        kept = fill_executor(system, call, rows)
        stream = Stream(call)
        stream.send(*(one(rows, row) for row in range(10, 16)))
        until(lambda: waiting_rows(system) == 6, "its requests wait")
        stream.call.cancel()
        until(lambda: waiting_rows(system) == 0, "their places are free")
        until(lambda: gauge(system, "grpc", "narsil_streams_open") == 0, "the stream has ended")
    assert all_right(kept, rows)


def test_a_stream_works_on_no_more_than_its_share(nats_server: NatsServer, criteo_model: Path, gate: Gate) -> None:
    """Without a bound one stream fills the memory."""
    rows = some_rows(criteo_model, 2)
    with (
        System(nats_server.url, criteo_model, grpc_gateways=1, loader=gate.load) as system,
        GrpcCaller(system.grpc_port) as call,
    ):
        stream = Stream(call)
        with gate.closed():
            stream.send(*(one(rows, 0) for _ in range(STREAM_OPEN + 50)))
            until(lambda: gauge(system, "grpc", "narsil_requests_open") == STREAM_OPEN, "its share is open")
            assert call("ServerLive", b"").code is OK
            assert gauge(system, "grpc", "narsil_requests_open") == STREAM_OPEN
        stream.half_close()
        assert len(list(stream.call)) == STREAM_OPEN + 50


def test_tritons_streaming_client_gets_each_answer_by_its_id(system: System, rows: Rows) -> None:
    """As their documentation shows it: a callback, many requests, errors among them."""
    answers: queue.Queue[Any] = queue.Queue()
    with triton_client(system.grpc_port) as client:
        client.start_stream(callback=lambda result, error: answers.put((result, error)))
        for row in range(8):
            client.async_stream_infer("ctr", triton_inputs(rows.part(row)), request_id=str(row), timeout=MINUTE_US)
        client.async_stream_infer("nobody", triton_inputs(rows.part(0)), request_id="x")
        client.stop_stream()
        got = [answers.get(timeout=20) for _ in range(9)]
    (error,) = [error for _, error in got if error is not None]
    assert "not served here" in error.message()
    scores = {int(result.get_response().id): result.as_numpy("scores") for result, _ in got if result is not None}
    assert all(close(scores[row], rows.part(row)) for row in range(8))


# The end


def test_a_draining_gateway_says_so_first_then_answers_what_is_open_and_closes_last(
    system: System, call: GrpcCaller, gate: Gate, rows: Rows
) -> None:
    """A balancer needs the time between the two to send its callers elsewhere."""
    (gateway,) = system.runtimes["grpc"]
    health = health_pb2_grpc.HealthStub(call.channel)
    watch = health.Watch(health_pb2.HealthCheckRequest(service=SERVICE.full_name))
    assert next(watch).status == health_pb2.HealthCheckResponse.SERVING
    stream = Stream(call)
    with gate.closed():
        early = call.future("ModelInfer", one(rows, 0))
        until(lambda: gate.waiting == 1, "a request is open")
        drained = system.submit(gateway.drain())
        assert next(watch).status == health_pb2.HealthCheckResponse.NOT_SERVING
        assert not message_class("ServerReadyResponse").FromString(call("ServerReady", b"").body).ready
        late = call.future("ModelInfer", one(rows, 1))  # came although it was not ready: still answered
        stream.send(one(rows, 2))
        until(lambda: gauge(system, "grpc", "narsil_requests_open") == 3, "both are taken")
        until(lambda: not accepts(system.grpc_port), "no new call is taken")
        assert list(watch) == []
        assert not drained.done()
    assert all_right({0: early, 1: late}, rows)
    assert abs(message_scores(stream.next().infer_response)[0] - rows.scores[2]) < 1e-6
    with pytest.raises(grpc.RpcError):
        stream.next()
    assert stream.call.code() is grpc.StatusCode.UNAVAILABLE
    drained.result(20)


def accepts(port: int) -> bool:
    with GrpcCaller(port) as call:
        return call("ServerLive", b"", timeout=2.0).code is OK


def test_nothing_is_left_of_a_thread_that_asks_while_it_ends(system: System, rows: Rows) -> None:
    """A stop without a drain answers UNAVAILABLE, never with silence."""
    (gateway,) = system.runtimes["grpc"]
    with GrpcCaller(system.grpc_port) as call:
        assert close(call("ModelInfer", one(rows, 0)).scores, rows.part(0))
        stopping = threading.Event()

        def ask() -> set[grpc.StatusCode]:
            seen = set()
            while not stopping.is_set():
                seen.add(call("ModelInfer", one(rows, 0), timeout=5.0).code)
            return seen

        with ThreadPoolExecutor(8) as threads:
            asking = [threads.submit(ask) for _ in range(8)]
            for actor in list(gateway.actors):
                system.submit(actor.stop()).result(20)
            stopping.set()
            seen = set().union(*(future.result() for future in asking))
        assert seen <= {OK, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED}


def test_tritons_client_reads_when_to_try_again(system: System, gate: Gate, rows: Rows) -> None:
    """Its exception has no trailing metadata, so that the message alone has to be enough."""
    with gate.closed(), triton_client(system.grpc_port) as client:
        with pytest.raises(triton.InferenceServerException) as raised:
            client.infer("ctr", triton_inputs(rows.part(*range(QUEUE_ROWS + 1))))
        assert raised.value.status() == "StatusCode.RESOURCE_EXHAUSTED"
        assert raised.value.message()
