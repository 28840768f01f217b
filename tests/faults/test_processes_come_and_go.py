"""Processes that join and leave under load, and what `narsil serve` starts and refuses to start."""

import json
import os
import re
import signal
import socket
from pathlib import Path

import pytest

from tests.asking import metric, some_rows
from tests.faults.serving import Serve, actor, alive, ready
from tests.faults.traffic import Traffic
from tests.gateways.calling import GrpcCaller, close, infer_message
from tests.support import PATIENCE_S, invoke, narsil, until

MANY = 300


@pytest.mark.parametrize("kind", ["batcher", "executor"])
def test_a_second_one_joins_under_load_and_leaves_without_losing_a_request(
    criteo_model: Path, tmp_path: Path, kind: str
) -> None:
    """Scaling out and in must be invisible to callers."""
    with Serve(criteo_model, tmp_path) as serve:
        with Traffic(criteo_model, http=serve.http_port, nats=serve.nats_url) as traffic:
            traffic.answered(MANY)
            options = ["--nats-url", serve.nats_url] + (["--model", str(criteo_model)] if kind == "executor" else [])
            with actor(kind, tmp_path, *options) as second:
                log = tmp_path / f"{kind}.log"
                until(lambda: "is ready" in log.read_text(), f"a second {kind}")
                traffic.answered(MANY)
                second.send_signal(signal.SIGTERM)
                assert second.wait(PATIENCE_S) == 0, log.read_text()
            traffic.answered(MANY)
        assert not traffic.bad, traffic.ended


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("batcher", ("--batch-batchers", "2", "--placement", "apart")),
        ("executor", ("--executor-executors", "2", "--placement", "apart")),
        ("executor", ("--batch-batchers", "2", "--executor-executors", "2")),
    ],
    ids=["batcher", "executor", "both in one process"],
)
def test_the_first_one_leaves_under_load_once_a_second_is_there(
    criteo_model: Path, tmp_path: Path, kind: str, options: tuple[str, ...]
) -> None:
    """A rolling restart: what it holds is answered before it goes, and the other takes over."""
    with Serve(criteo_model, tmp_path, *options) as serve:
        with Traffic(criteo_model, http=serve.http_port, nats=serve.nats_url) as traffic:
            for _ in range(2):
                traffic.answered(MANY)
                os.kill(serve.pids(kind)[0], signal.SIGTERM)
                traffic.answered(MANY)
                with traffic.gentle():
                    serve.until_up(kind, 2)
        assert not traffic.bad, traffic.ended


def test_a_second_gateway_serves_at_once_and_drains_when_told_to(
    criteo_model: Path, tmp_path: Path, free_port: int
) -> None:
    """Readiness goes first, then what is open is answered, then the port closes."""
    port, log = free_port, tmp_path / "gateway.log"
    with Serve(criteo_model, tmp_path) as serve:
        options = ["--nats-url", serve.nats_url, "--door", "http", "--http-port", str(port)]
        with actor("gateway", tmp_path, *options) as gateway:
            until(lambda: "is ready" in log.read_text(), "a second gateway")
            with Traffic(criteo_model, http=port) as traffic:
                traffic.answered(MANY)
                gateway.send_signal(signal.SIGTERM)
                until(lambda: not ready(port), "not ready")
                traffic.until_ended("connection")
            assert gateway.wait(PATIENCE_S) == 0, log.read_text()
            assert set(traffic.bad) == {"connection"}, traffic.ended


def test_several_gateways_share_one_port(criteo_model: Path, tmp_path: Path, free_port: int) -> None:
    """One process's event loop is one core's worth of HTTP; more processes on one port carry more."""
    port = str(free_port)
    with Serve(criteo_model, tmp_path, "--http-processes", "2", "--http-port", port) as serve:
        assert len(serve.pids("gateway")) == 2
        with Traffic(criteo_model, http=int(port), callers=32) as traffic:
            traffic.answered(MANY)
            counts = re.findall(r'narsil_requests_offered_total\{actor="gateway[^}]*\} (\d+)', serve.metrics())
            assert len(counts) == 2
        assert not traffic.bad, traffic.ended


def test_several_grpc_gateways_share_one_port_beside_the_http_gateway(
    criteo_model: Path, tmp_path: Path, free_port: int
) -> None:
    """Each process is one core's worth of gRPC; clients spread over them connection by connection."""
    port, rows = free_port, some_rows(criteo_model, 32)
    with Serve(criteo_model, tmp_path, "--grpc-processes", "2", "--grpc-port", str(port)) as serve:
        gateways = [row for row in serve.actors() if row["kind"] == "gateway"]
        assert {row["process"] for row in gateways} == {"http gateway", "grpc gateway 1", "grpc gateway 2"}
        assert [row["detail"] for row in gateways].count(f"grpc://127.0.0.1:{port}, ctr 1, ready") == 2
        assert f"grpc://127.0.0.1:{port}" in serve.log.read_text()
        for row in range(32):
            with GrpcCaller(port) as call:
                assert close(call("ModelInfer", infer_message(rows.part(row))).scores, rows.part(row))
        until(lambda: len(grpc_counts(serve)) == 2 and sum(grpc_counts(serve)) == 32, "all are counted, by both")


def test_a_door_without_processes_stays_shut_and_is_not_advertised(criteo_model: Path, tmp_path: Path) -> None:
    """Its port may belong to somebody else."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        doors = ("--http-processes", "0", "--http-port", port, "--grpc-processes", "1")
        with Serve(criteo_model, tmp_path, *doors) as serve:
            rows = some_rows(criteo_model, 1)
            with GrpcCaller(serve.grpc_port) as call:
                assert close(call("ModelInfer", infer_message(rows)).scores, rows)
            shown = serve.log.read_text()
            assert "curl" not in shown and "narsil request" in shown
            assert [row["process"] for row in serve.actors() if row["kind"] == "gateway"] == ["grpc gateway"]


def test_a_gateway_without_a_door_is_refused() -> None:
    """It would run for ever and serve nobody."""
    done = invoke("gateway", "--http-processes", "0", "--grpc-processes", "0")
    assert done.exit_code == 2
    assert "no port to open" in done.output


def grpc_counts(serve: Serve) -> list[float]:
    """Requests that came to each gRPC gateway, of those that got any."""
    text = serve.metrics()
    names = re.findall(r'narsil_streams_open\{actor="(gateway-\w+)"', text)
    return [count for name in names if (count := metric(text, "narsil_requests_offered_total", actor=name))]


def test_a_killed_supervisor_leaves_no_process_behind(criteo_model: Path, tmp_path: Path) -> None:
    """Orphans would hold ports and answer requests that nobody watches."""
    with Serve(criteo_model, tmp_path, "--executor-executors", "2", "--grpc-processes", "1") as serve:
        pids = [row["pid"] for row in serve.actors()]
        assert len(pids) == 6
        assert all(map(alive, pids))
        assert serve.process is not None
        serve.process.kill()
        until(lambda: not list(filter(alive, pids)), "all gone")


@pytest.mark.parametrize(
    ("placement", "batchers", "executors", "processes"),
    [("together", 2, 1, 2), ("together", 1, 2, 2), ("apart", 1, 1, 2)],
)
def test_batchers_live_with_executors_as_far_as_there_are_as_many(
    criteo_model: Path, tmp_path: Path, placement: str, batchers: int, executors: int, processes: int
) -> None:
    """Whoever scales one of them alone must get processes of it, and answers as before."""
    counts = ("--batch-batchers", str(batchers), "--executor-executors", str(executors))
    with Serve(criteo_model, tmp_path, *counts, "--placement", placement) as serve:
        own = serve.pids("batcher"), serve.pids("executor")
        assert (len(own[0]), len(own[1]), len({*own[0], *own[1]})) == (batchers, executors, processes)
        with Traffic(criteo_model, http=serve.http_port, nats=serve.nats_url) as traffic:
            traffic.answered(MANY)
        assert not traffic.bad, traffic.ended


@pytest.mark.parametrize("mode", ["batch", "worker", "inline"])
def test_each_mode_answers_each_caller_with_its_own_scores(criteo_model: Path, tmp_path: Path, mode: str) -> None:
    """The three ways to run share everything but placement and coalescing."""
    with Serve(criteo_model, tmp_path, "--mode", mode) as serve:
        with Traffic(criteo_model, http=serve.http_port, nats=serve.nats_url, callers=32) as traffic:
            traffic.answered(2 * MANY)
        assert not traffic.bad, traffic.ended
        text = until(lambda: counted(serve.metrics(), "batcher", 2 * MANY), "metrics of what was answered")
        batches = sum(map(float, re.findall(r'narsil_batch_rows_count\{actor="batcher[^}]*\} ([\d.e+]+)', text)))
        requests = sum(map(float, re.findall(r'narsil_requests_offered_total\{actor="batcher[^}]*\} ([\d.e+]+)', text)))
        assert batches == requests if mode == "worker" else batches < requests


def counted(text: str, kind: str, least: int) -> str | None:
    """The exposition once `kind` has answered this many; checks the conservation of requests on the way."""
    found = re.search(rf'narsil_requests_offered_total\{{actor="{kind}[^}}]*\}} ([\d.e+]+)', text)
    ended = re.findall(rf'narsil_requests_total\{{actor="{kind}[^}}]*\}} ([\d.e+]+)', text)
    offered = float(found[1]) if found else 0
    return text if offered >= least and sum(map(float, ended)) == offered else None


@pytest.mark.parametrize(
    ("option", "key"),
    [("--http-port", "http.port"), ("--grpc-port", "grpc.port"), ("--metrics-port", "metrics.port"),
     ("--nats-port", "nats.port")],
)  # fmt: skip
def test_a_taken_port_is_named_with_the_setting_that_chose_it(
    criteo_model: Path, tmp_path: Path, option: str, key: str
) -> None:
    """ "Address already in use" alone sends people hunting."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        free = [
            word for flag in ("--http-port", "--grpc-port", "--metrics-port", "--nats-port") for word in (flag, "0")
        ]
        arguments = [*free, option, str(port)]
        process = narsil("serve", "--model", criteo_model, "--data-dir", tmp_path, *arguments)
        _, stderr = process.communicate(timeout=PATIENCE_S)
    message = " ".join(re.sub(r"[^\x20-\x7e]", " ", stderr.decode()).split())
    variable = f"NARSIL_{key.upper().replace('.', '_')}"
    assert process.returncode == 1
    assert str(port) in message
    assert option in message
    assert variable in message


def test_a_broken_model_is_one_message_and_no_system(criteo_model: Path, tmp_path: Path) -> None:
    """A start that cannot succeed must say so at once, not restart for ever."""
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "model.json").write_text(json.dumps({"name": "x"}))
    process = narsil("serve", "--model", broken, "--data-dir", tmp_path)
    _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 1
    assert "Traceback" not in stderr.decode()
    assert "model.json" in stderr.decode()
