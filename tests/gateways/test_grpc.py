"""The gRPC gateway as Triton's client sees it, and any other client of the Open Inference Protocol."""

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from msgspec.structs import replace
from tritonclient.utils import InferenceServerException

from narsil_stream.core.config import BatchConfig, Config
from narsil_stream.gateways.grpc_verbs import VERBS
from narsil_stream.kernels.artifact import write
from narsil_stream.kernels.init import criteo_spec, random_model
from narsil_stream.schemas.protobuf import SERVICE, message_class
from tests.asking import some_rows
from tests.gateways.calling import GrpcCaller, close, infer_message, triton_client, triton_inputs
from tests.support import PATIENCE_S, NatsServer, System, expected, plain_environ

MOST_ROWS = 10_000
MINUTE_US = 60_000_000
"""A budget for large requests: how fast the machine is does not count."""
"""More than a batch holds: these are split."""


@pytest.fixture(scope="module")
def system(criteo_model: Path) -> Iterator[System]:
    config = replace(Config(), batch=BatchConfig(max_request_rows=MOST_ROWS))
    with NatsServer() as server, System(server.url, criteo_model, config=config, grpc_gateways=1) as running:
        yield running


@pytest.fixture
def port(system: System) -> int:
    return system.grpc_port


@pytest.fixture
def client(port: int) -> Iterator[triton.InferenceServerClient]:
    with triton_client(port) as opened:
        yield opened


def refusal(ask: Any, *arguments: Any, **named: Any) -> tuple[str, str]:
    """The status and the message of a call that is refused."""
    with pytest.raises(InferenceServerException) as raised:
        ask(*arguments, **named)
    return raised.value.status().removeprefix("StatusCode."), raised.value.message()


# Scores


@pytest.mark.parametrize("rows", [1, 2, 100, 4_095, 4_096, 4_097, MOST_ROWS])
def test_rows_get_their_scores_and_their_id_back(
    client: triton.InferenceServerClient, criteo_model: Path, rows: int
) -> None:
    """The one thing that everybody comes for, up to a batch and above."""
    asked = some_rows(criteo_model, rows)
    answer = client.infer("ctr", triton_inputs(asked), request_id="mine/1 é", timeout=MINUTE_US)
    said = answer.get_response()
    assert close(answer.as_numpy("scores"), asked)
    assert (said.id, said.model_name, said.model_version) == ("mine/1 é", "ctr", "1")


def test_more_rows_than_one_request_may_hold_are_refused(
    client: triton.InferenceServerClient, criteo_model: Path
) -> None:
    """One caller must not hold up the others, and is told how much is possible."""
    status, message = refusal(client.infer, "ctr", triton_inputs(some_rows(criteo_model, MOST_ROWS + 1)))
    assert status == "OUT_OF_RANGE"
    assert str(MOST_ROWS) in message


@pytest.mark.parametrize("dense", ["FP16", "FP32", "FP64"])
@pytest.mark.parametrize("ids", ["INT32", "INT64"])
def test_number_types_that_lose_nothing_are_taken(
    client: triton.InferenceServerClient, criteo_model: Path, dense: str, ids: str
) -> None:
    """Feature stores give doubles and long integers."""
    rows = some_rows(criteo_model, 5)
    narrow = rows._replace(dense=rows.dense.astype(np.float16).astype(np.float32))
    wanted = narrow._replace(scores=expected(criteo_model, narrow.dense, narrow.ids))
    assert close(client.infer("ctr", triton_inputs(narrow, ids, dense)).as_numpy("scores"), wanted)


def test_multi_hot_ids_are_scored(client: triton.InferenceServerClient, criteo_model: Path) -> None:
    """`values` with `lengths` of one id each say the same as `sparse`."""
    rows = some_rows(criteo_model, 4)
    dense = triton_inputs(rows)[0]
    values = triton.InferInput("values", [rows.ids.size], "INT64")
    values.set_data_from_numpy(rows.ids.reshape(-1).astype(np.int64))
    lengths = triton.InferInput("lengths", list(rows.ids.shape), "INT32")
    lengths.set_data_from_numpy(np.ones_like(rows.ids))
    assert close(client.infer("ctr", [dense, values, lengths]).as_numpy("scores"), rows)


@pytest.mark.parametrize("ids", ["INT32", "INT64"])
def test_typed_and_raw_contents_give_the_same_bits(port: int, criteo_model: Path, ids: str) -> None:
    """KServe's client sends the ones, Triton's the others."""
    rows = some_rows(criteo_model, 100)
    with GrpcCaller(port) as call:
        raw, typed = (call("ModelInfer", infer_message(rows, typed=typed, ids=ids)) for typed in (False, True))
    assert raw.body == typed.body
    assert close(raw.scores, rows)


def test_200_callers_at_once_get_each_their_own_answer(port: int, criteo_model: Path) -> None:
    """Requests share batches; an answer that went to a neighbour would look like any other."""
    rows = some_rows(criteo_model, 400)
    with triton_client(port) as client, ThreadPoolExecutor(200) as threads:

        def ask(caller: int) -> bool:
            for row in (caller, caller + 200):
                one = rows.part(*range(row, min(row + 1 + row % 3, 400)))
                answer = client.infer("ctr", triton_inputs(one), request_id=f"row {row}", timeout=60_000_000)
                assert answer.get_response().id == f"row {row}"
                assert close(answer.as_numpy("scores"), one)
            return True

        assert all(threads.map(ask, range(200)))


def test_a_version_is_scored_by_its_own_weights_and_the_newest_when_none_is_named(
    nats_server: NatsServer, tmp_path: Path
) -> None:
    """Ten is newer than nine, although it sorts before it."""
    folders = {}
    for seed, version in enumerate(("9", "10")):
        folders[version] = tmp_path / version
        spec = replace(criteo_spec("ctr", rows=100, dim=4, bottom=(8,), top=(8,)), version=version)
        write(folders[version], random_model(spec, seed))
    rows = some_rows(folders["9"], 4)
    with (
        System(nats_server.url, *folders.values(), grpc_gateways=1) as system,
        triton_client(system.grpc_port) as client,
    ):
        for version, named in (("9", "9"), ("10", "10"), ("10", "")):
            answer = client.infer("ctr", triton_inputs(rows), model_version=named)
            wanted = rows._replace(scores=expected(folders[version], rows.dense, rows.ids))
            assert answer.get_response().model_version == version
            assert close(answer.as_numpy("scores"), wanted)
        assert client.get_model_metadata("ctr", "9", as_json=True)["versions"] == ["9", "10"]
        assert refusal(client.get_model_metadata, "ctr", "3")[0] == "NOT_FOUND"


# What a server says of itself


def test_health_and_readiness(client: triton.InferenceServerClient) -> None:
    """What load balancers and the protocol's own clients ask first."""
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("ctr") and client.is_model_ready("ctr", "1")
    assert not client.is_model_ready("ctr", "7") and not client.is_model_ready("nobody")


def test_metadata_and_configuration_say_how_to_ask(client: triton.InferenceServerClient) -> None:
    """A client shapes its tensors by the first, a load generator by the second."""
    assert client.get_server_metadata(as_json=True)["name"] == "narsil-stream"
    metadata = client.get_model_metadata("ctr", as_json=True)
    assert metadata["inputs"][:2] == [
        {"name": "dense", "datatype": "FP32", "shape": ["-1", "13"]},
        {"name": "sparse", "datatype": "INT64", "shape": ["-1", "26"]},
    ]
    assert metadata["outputs"] == [{"name": "scores", "datatype": "FP32", "shape": ["-1"]}]
    config = client.get_model_config("ctr").config
    assert config.max_batch_size == MOST_ROWS
    assert [(i.name, i.data_type, list(i.dims), i.optional) for i in config.input] == [
        ("dense", 11, [13], False),
        ("sparse", 9, [26], False),
        ("values", 9, [-1], True),
        ("lengths", 8, [26], True),
    ]
    assert config.WhichOneof("scheduling_choice") == "dynamic_batching"


@pytest.mark.parametrize(
    ("verb", "arguments"),
    [("get_system_shared_memory_status", ()), ("register_system_shared_memory", ("a", "b", 8)),
     ("unregister_system_shared_memory", ("a",)), ("get_cuda_shared_memory_status", ()),
     ("register_cuda_shared_memory", ("a", b"aGFuZGxl", 0, 8)), ("unregister_cuda_shared_memory", ("a",)),
     ("update_trace_settings", ()), ("get_trace_settings", ()),
     ("update_log_settings", ({"log_verbose_level": 1},)), ("get_log_settings", ())],
)  # fmt: skip
def test_what_is_not_offered_says_so_and_what_to_do(
    client: triton.InferenceServerClient, verb: str, arguments: tuple[Any, ...]
) -> None:
    """ "Method not found" would send people to look for a wrong version."""
    status, message = refusal(getattr(client, verb), *arguments)
    assert status == "UNIMPLEMENTED"
    assert "not offered; " in message


def test_every_verb_of_the_service_has_a_handler() -> None:
    """One that is forgotten looks like a server of another protocol."""
    assert {method.name for method in SERVICE.methods} == {*VERBS, "ModelInfer", "ModelStreamInfer"}


def test_reflection_describes_every_service(port: int) -> None:
    """grpcurl and Postman need no .proto file then."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        told = ProtoReflectionDescriptorDatabase(channel)
        assert set(told.get_services()) == {
            "inference.GRPCInferenceService",
            "grpc.health.v1.Health",
            "grpc.reflection.v1alpha.ServerReflection",
        }
        pool = DescriptorPool(told)
        for service in told.get_services():
            assert pool.FindServiceByName(service).methods
        infer = pool.FindServiceByName("inference.GRPCInferenceService").FindMethodByName("ModelInfer")
        assert [field.name for field in infer.input_type.fields][-1] == "raw_input_contents"


def test_the_standard_health_service_knows_the_server_and_its_services(port: int) -> None:
    """Kubernetes asks nothing else."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for service in ("", "inference.GRPCInferenceService"):
            answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=PATIENCE_S)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.RpcError) as raised:
            health.Check(health_pb2.HealthCheckRequest(service="nobody"), timeout=PATIENCE_S)
        assert raised.value.code() is grpc.StatusCode.NOT_FOUND


def test_who_watches_the_health_hears_of_a_lost_batcher(nats_server: NatsServer, criteo_model: Path) -> None:
    """Clients that balance by themselves watch instead of asking; each of several hears everything."""
    with System(nats_server.url, criteo_model, grpc_gateways=1) as system:
        with grpc.insecure_channel(f"127.0.0.1:{system.grpc_port}") as channel:
            health = health_pb2_grpc.HealthStub(channel)
            watching = [health.Watch(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S) for _ in range(3)]
            assert [next(watch).status for watch in watching] == [health_pb2.HealthCheckResponse.SERVING] * 3
            watching.pop().cancel()
            (batcher,) = system.runtimes["batcher"]
            system.submit(batcher.drain()).result(20)
            assert [next(watch).status for watch in watching] == [health_pb2.HealthCheckResponse.NOT_SERVING] * 2
        with triton_client(system.grpc_port) as client:
            assert client.is_server_live() and not client.is_server_ready()
            status, _ = refusal(client.infer, "ctr", triton_inputs(some_rows(criteo_model, 1)))
            assert status == "UNAVAILABLE"


# Other clients


@pytest.mark.parametrize("caller", ["triton_aio", "kserve_aio"])
def test_asyncio_clients_get_all_they_ask_for(port: int, criteo_model: Path, caller: str, tmp_path: Path) -> None:
    """KServe's client, and Triton's for asyncio. In a process of their own: the two cannot be imported together."""
    rows = some_rows(criteo_model, 64)
    np.savez(tmp_path / "rows.npz", dense=rows.dense, ids=rows.ids)
    done = subprocess.run(
        [sys.executable, "-m", f"tests.gateways.{caller}", str(port), tmp_path / "rows.npz"],
        env=plain_environ(), cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said.pop("scores") == pytest.approx(rows.scores.tolist(), abs=1e-6)
    assert said.pop("each") == pytest.approx(rows.scores.tolist(), abs=1e-6)
    assert said["ready"] == [True] * len(said["ready"])
    assert said["refused"] == ["NOT_FOUND", "INVALID_ARGUMENT"]


def test_triton_and_kserve_clients_can_be_imported_beside_us() -> None:
    """A user's process may hold one of them, and protobuf refuses a second message of the same name."""
    for other in ("tritonclient.grpc", "kserve"):
        code = f"import narsil_stream.gateways.grpc, {other}, narsil_stream"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr


# Errors


@pytest.mark.parametrize("model", ["nobody", "ctr ", "a.b", ">", "*", "ctr\0", "x" * 300, "é", ""])
def test_a_model_that_nobody_serves_is_not_found_whatever_its_name(port: int, criteo_model: Path, model: str) -> None:
    """A name becomes part of a subject; what cannot be one must not come that far."""
    rows = some_rows(criteo_model, 1)
    with GrpcCaller(port) as call:
        request = infer_message(rows)
        request.model_name = model
        assert call("ModelInfer", request).code is grpc.StatusCode.NOT_FOUND
        request.model_name, request.model_version = "ctr", model or "?"
        assert call("ModelInfer", request).code is grpc.StatusCode.NOT_FOUND
        wanted = message_class("ModelMetadataRequest")(name=model)
        assert call("ModelMetadata", wanted).code is grpc.StatusCode.NOT_FOUND


def test_metrics_count_what_was_asked(system: System, port: int, criteo_model: Path) -> None:
    """Nobody can run what they cannot see."""
    (gateway,) = system.actors("grpc")

    def value(name: str, **labels: str) -> float:
        return gateway.registry.get_sample_value(name, labels) or 0.0

    names: list[tuple[str, dict[str, str]]] = [
        ("narsil_requests_offered_total", {}),
        ("narsil_requests_total", {"outcome": "answered"}),
        ("narsil_requests_total", {"outcome": "refused"}),
        ("narsil_errors_total", {"fault": "INVALID_ARGUMENT"}),
        ("narsil_rows_total", {}),
    ]
    before = [value(name, **labels) for name, labels in names]
    with GrpcCaller(port) as call:
        call("ModelInfer", infer_message(some_rows(criteo_model, 3)))
        call("ModelInfer", b"\xff\xff")
    after = [value(name, **labels) for name, labels in names]
    assert [now - then for now, then in zip(after, before, strict=True)] == [2, 1, 1, 1, 3]
    assert value("narsil_ready") == 1
    assert value("narsil_requests_open") == 0
