"""gRPC gateways as processes: told to stop under load, and with both doors in one."""

import signal
from collections.abc import Callable, Sized
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc

from narsil_stream.schemas.protobuf import message_class
from tests.asking import some_rows
from tests.gateways.calling import (
    GrpcAnswer,
    GrpcCaller,
    close,
    gauge,
    one,
    triton_client,
    triton_inputs,
)
from tests.support import NatsServer, System, narsil, until

OK = grpc.StatusCode.OK


def told_to_go_elsewhere(answer: GrpcAnswer) -> bool:
    """Before the request was accepted."""
    return answer.code is grpc.StatusCode.UNAVAILABLE and answer.detail == "this gateway is stopping"


def test_sigterm_under_load_from_64_connections_loses_no_request(
    nats_server: NatsServer, criteo_model: Path, tmp_path: Path, free_port: int
) -> None:
    """Every deployment does it to every process. The callers here come until readiness is gone, as with a balancer."""
    rows = some_rows(criteo_model, 64)
    log = tmp_path / "gateway.log"
    ended_as: list[str] = []

    def ask_while_ready(row: int) -> None:
        with GrpcCaller(free_port) as call:
            while ready(call):
                answer = call("ModelInfer", one(rows, row))
                if told_to_go_elsewhere(answer):  # it was slow between asking whether it is ready and this
                    return
                right = answer.code is OK and close(answer.scores, rows.part(row))
                ended_as.append("right" if right else str(answer))

    with System(nats_server.url, criteo_model):
        stop_while_64_ask(ask_while_ready, ended_as, log, nats_server.url, free_port)
    assert set(ended_as) == {"right"}, [how for how in ended_as if how != "right"][:3]
    assert "Traceback" not in log.read_text()


def test_callers_who_never_look_at_readiness_get_an_answer_to_all_that_was_accepted(
    nats_server: NatsServer, criteo_model: Path, tmp_path: Path, free_port: int
) -> None:
    """Newcomers are turned away with the code that tells clients to try elsewhere, never once a batcher has them."""
    rows = some_rows(criteo_model, 64)
    log = tmp_path / "gateway.log"
    codes: list[grpc.StatusCode] = []

    def ask_until_refused(row: int) -> None:
        with GrpcCaller(free_port) as call:
            while not codes or codes[-1] is OK:
                codes.append(call("ModelInfer", one(rows, row)).code)

    with System(nats_server.url, criteo_model) as system:
        stop_while_64_ask(ask_until_refused, codes, log, nats_server.url, free_port)
        accepted = gauge(system, "batcher", "narsil_requests_offered_total")
    assert accepted == codes.count(OK)
    assert set(codes) <= {OK, grpc.StatusCode.UNAVAILABLE}


def stop_while_64_ask(ask: Callable[[int], None], ended: Sized, log: Path, url: str, port: int) -> None:
    """SIGTERM to a gateway once callers, each of which asks on its own connection until `ask` returns, were answered
    500 times."""

    def run(gateway: Any) -> None:
        with GrpcCaller(port) as call:
            until(lambda: ready(call), "it is ready")
        with ThreadPoolExecutor(64) as threads:
            callers = [threads.submit(ask, row) for row in range(64)]
            until(lambda: len(ended) > 500, "it is busy")
            gateway.send_signal(signal.SIGTERM)
            for caller in callers:
                caller.result(20)
        assert gateway.wait(20) == 0, log.read_text()

    with_gateway(run, log, "--nats-url", url, "--door", "grpc", "--grpc-port", str(port))


def with_gateway(run: Callable[[Any], None], log: Path, *options: str) -> None:
    with log.open("wb") as err:
        gateway = narsil("gateway", *options, stderr=err)
        try:
            run(gateway)
        finally:
            gateway.kill()
            gateway.communicate()


def ready(call: GrpcCaller) -> bool:
    answer = call("ServerReady", b"", timeout=5.0)
    return answer.code is OK and message_class("ServerReadyResponse").FromString(answer.body).ready


def test_both_doors_of_one_process_are_open(
    nats_server: NatsServer, criteo_model: Path, tmp_path: Path, free_port: int
) -> None:
    """Small installations run one gateway process, and one with everything in mode inline."""
    rows = some_rows(criteo_model, 3)
    for mode in ("batch", "inline"):
        log = tmp_path / f"{mode}.log"
        options = ["--mode", mode, "--model", str(criteo_model), "--nats-url", nats_server.url]
        ports = ["--http-port", "0", "--grpc-port", str(free_port), "--metrics-port", "0"]

        def run(_: Any, log: Path = log) -> None:
            until(lambda: log.read_text().count("gateway-") >= 2, "both gateways are ready")
            with triton_client(free_port) as client:
                until(client.is_server_ready, "it is ready")
                assert close(client.infer("ctr", triton_inputs(rows)).as_numpy("scores"), rows)

        if mode == "batch":
            with System(nats_server.url, criteo_model):
                with_gateway(run, log, *options, *ports)
        else:
            with_gateway(run, log, *options, *ports)
