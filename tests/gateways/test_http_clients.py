"""Triton's and KServe's own HTTP clients, unchanged."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from numpy.typing import NDArray

from narsil_stream.kernels import reference
from narsil_stream.kernels.artifact import read_spec
from narsil_stream.kernels.init import random_batch
from tests.asking import Rows, ask_http, some_rows
from tests.support import PATIENCE_S, System

NUMPY_TYPES = {"FP16": np.float16, "FP32": np.float32, "FP64": np.float64, "INT32": np.int32, "INT64": np.int64}
MINUTE_US = 60_000_000
"""A budget for large requests: how fast the machine is does not count."""


@pytest.fixture(scope="module")
def url(shared_system: System) -> str:
    return f"127.0.0.1:{shared_system.http_port}"


@pytest.fixture
def client(url: str) -> Iterator[Any]:
    with triton.InferenceServerClient(url) as client:
        yield client


def inputs(
    rows: Rows,
    dense: str = "FP32",
    ids: str = "INT64",
    *,
    binary: bool | tuple[bool, bool] = True,
    module: Any = triton,
) -> list[Any]:
    """A request's tensors; `binary`: of both, or of each."""
    of_dense, of_ids = (binary, binary) if isinstance(binary, bool) else binary
    tensors = []
    for name, datatype, array, as_bytes in (("dense", dense, rows.dense, of_dense), ("sparse", ids, rows.ids, of_ids)):
        tensor = module.InferInput(name, list(array.shape), datatype)
        tensor.set_data_from_numpy(np.ascontiguousarray(array, NUMPY_TYPES[datatype]), binary_data=as_bytes)
        tensors.append(tensor)
    return tensors


def wish(binary: bool) -> list[Any]:
    return [triton.InferRequestedOutput("scores", binary_data=binary)]


def right(scores: NDArray[Any], rows: Rows) -> bool:
    return scores.dtype == np.float32 and np.allclose(scores, rows.scores, rtol=0, atol=1e-6)


def test_the_verbs_that_every_client_begins_with(client: Any) -> None:
    """A client that finds no server, no model or no shape never sends its first request."""
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("ctr")
    assert client.is_model_ready("ctr", "1")
    assert not client.is_model_ready("ctr", "2")
    assert not client.is_model_ready("nobody")
    server = client.get_server_metadata()
    assert server["name"] == "narsil-stream"
    assert {"binary_tensor_data", "statistics", "model_repository"} <= set(server["extensions"])
    metadata = client.get_model_metadata("ctr")
    assert [tensor["name"] for tensor in metadata["inputs"]] == ["dense", "sparse", "values", "lengths"]
    config = client.get_model_config("ctr", "1")
    required = {tensor["name"]: tensor for tensor in config["input"] if not tensor.get("optional")}
    assert (required["dense"]["dims"], required["dense"]["data_type"]) == ([13], "TYPE_FP32")
    assert (required["sparse"]["dims"], required["sparse"]["data_type"]) == ([26], "TYPE_INT64")
    assert config["max_batch_size"] >= 4_096
    for ask in (client.get_model_metadata, client.get_model_config):
        with pytest.raises(triton.InferenceServerException, match="'nobody' is not served here"):
            ask("nobody")


@pytest.mark.parametrize("binary_out", [True, False], ids=["binary out", "JSON out"])
@pytest.mark.parametrize(
    "binary_in",
    [(True, True), (False, False), (True, False), (False, True)],
    ids=["bin", "JSON", "bin-JSON", "JSON-bin"],
)
def test_binary_and_json_in_any_mix_give_the_same_bits(
    client: Any, criteo_model: Path, binary_in: tuple[bool, bool], binary_out: bool
) -> None:
    """A team that changes the encoding must not see its scores move."""
    rows = some_rows(criteo_model, 33)
    answer = client.infer("ctr", inputs(rows, binary=binary_in), outputs=wish(binary_out), request_id="mine/1")
    plain = client.infer("ctr", inputs(rows))
    assert right(answer.as_numpy("scores"), rows)
    assert answer.as_numpy("scores").tobytes() == plain.as_numpy("scores").tobytes()
    said = answer.get_response()
    assert (said["id"], said["model_name"], said["model_version"]) == ("mine/1", "ctr", "1")


@pytest.mark.parametrize("algorithm", ["gzip", "deflate"])
def test_compression_both_ways(client: Any, criteo_model: Path, algorithm: str) -> None:
    """Between data centres it halves the bill."""
    rows = some_rows(criteo_model, 1_000)
    answer = client.infer(
        "ctr",
        inputs(rows),
        request_compression_algorithm=algorithm,
        response_compression_algorithm=algorithm,
    )
    assert right(answer.as_numpy("scores"), rows)


@pytest.mark.parametrize("ids", ["INT32", "INT64"])
@pytest.mark.parametrize("dense", ["FP16", "FP32", "FP64"])
def test_number_types_that_lose_nothing_are_taken(client: Any, criteo_model: Path, dense: str, ids: str) -> None:
    """Feature pipelines write what they write."""
    rows = some_rows(criteo_model, 5)
    rows = rows._replace(dense=np.round(rows.dense * 4) / 4)  # which FP16 holds exactly
    plain = client.infer("ctr", inputs(rows)).as_numpy("scores")
    binary = client.infer("ctr", inputs(rows, dense, ids)).as_numpy("scores")
    assert binary.tobytes() == plain.tobytes()
    if dense != "FP16":  # Triton's client has no FP16 in JSON
        in_json = client.infer("ctr", inputs(rows, dense, ids, binary=False)).as_numpy("scores")
        assert in_json.tobytes() == plain.tobytes()


@pytest.mark.parametrize("count", [1, 2, 3, 64, 255, 1_000, 4_095, 4_096, 4_097, 10_000])
def test_any_number_of_rows(client: Any, criteo_model: Path, count: int) -> None:
    """What is more than a batch is split and joined, in the caller's order."""
    rows = some_rows(criteo_model, count)
    assert right(client.infer("ctr", inputs(rows), timeout=MINUTE_US).as_numpy("scores"), rows)


@pytest.mark.parametrize("count", [7, 9_000])
def test_bags_of_ids(client: Any, criteo_model: Path, count: int) -> None:
    """Multi-hot, in one message and in several: a bag must not lose ids to its neighbour at a cut."""
    spec = read_spec(criteo_model)
    batch = random_batch(spec, count, seed=4, bag=3)
    assert batch.lengths is not None
    scores = np.empty(count, np.float32)
    reference.load(criteo_model).run(batch, scores)
    tensors = []
    for name, datatype, array in (
        ("dense", "FP32", batch.dense),
        ("values", "INT32", batch.ids),
        ("lengths", "INT32", batch.lengths),
    ):
        tensor = triton.InferInput(name, list(array.shape), datatype)
        tensor.set_data_from_numpy(array)
        tensors.append(tensor)
    assert np.allclose(client.infer("ctr", tensors, timeout=MINUTE_US).as_numpy("scores"), scores, rtol=0, atol=1e-6)


def reconnects(system: System) -> int:
    """Of all connections to the broker, which cuts those that send it too large a message."""
    runtimes = [runtime for of_kind in system.runtimes.values() for runtime in of_kind]
    return sum(int(runtime.bus._nats.stats["reconnects"]) for runtime in runtimes)


def test_requests_about_as_large_as_a_message_keep_the_connection(
    shared_system: System, client: Any, criteo_model: Path
) -> None:
    """The broker counts more than the payload; one message too large takes all others on its connection along."""
    (gateway,) = shared_system.runtimes["gateway"]
    row_bytes = 4 * 13 + 8 * 26
    at_the_edge = gateway.bus.max_payload // row_bytes
    assert at_the_edge < shared_system.config.batch.max_rows
    rows = some_rows(criteo_model, at_the_edge + 4)
    for count in range(at_the_edge - 10, at_the_edge + 2):
        part = rows.part(*range(count))
        assert right(client.infer("ctr", inputs(part)).as_numpy("scores"), part)
    assert reconnects(shared_system) == 0


def test_a_row_that_no_message_holds_is_413(shared_system: System, client: Any) -> None:
    """A bag of a million ids cannot be split."""
    count = 1_000_000
    tensors = []
    for name, array in (
        ("dense", np.zeros((2, 13), np.float32)),
        ("values", np.ones(count + 51, np.int32)),
        ("lengths", np.array([[1] * 26, [count] + [1] * 25], np.int32)),
    ):
        tensor = triton.InferInput(name, list(array.shape), "FP32" if name == "dense" else "INT32")
        tensor.set_data_from_numpy(array)
        tensors.append(tensor)
    with pytest.raises(triton.InferenceServerException, match="row 1 has 40") as refused:
        client.infer("ctr", tensors)
    assert refused.value.status() == "413"
    assert reconnects(shared_system) == 0


def test_a_wrong_id_in_a_split_request_is_named_by_its_own_row(client: Any, criteo_model: Path) -> None:
    """The caller knows nothing of the parts."""
    rows = some_rows(criteo_model, 6_000)
    rows.ids[5_555, 3] = 1_000
    with pytest.raises(triton.InferenceServerException, match=r"'sparse' \[5555, 3\] is 1000"):
        client.infer("ctr", inputs(rows))


def test_more_rows_than_the_limit_are_413_that_says_it(client: Any, criteo_model: Path) -> None:
    """One caller must not take all the time there is."""
    rows = some_rows(criteo_model, 1)
    many = Rows(rows.dense.repeat(65_537, axis=0), rows.ids.repeat(65_537, axis=0), rows.scores)
    with pytest.raises(triton.InferenceServerException, match="65537 rows; expected at most 65536") as refused:
        client.infer("ctr", inputs(many, ids="INT32"))
    assert refused.value.status() == "413"


def test_parameters_reach_the_scheduler(client: Any, criteo_model: Path) -> None:
    """A timeout in microseconds that cannot be kept is refused, and a priority outside of the scale is named."""
    rows = some_rows(criteo_model, 1)
    assert right(client.infer("ctr", inputs(rows), timeout=5_000_000, priority=1).as_numpy("scores"), rows)
    with pytest.raises(triton.InferenceServerException) as late:
        client.infer("ctr", inputs(rows), timeout=1)
    assert late.value.status() in ("429", "504")
    with pytest.raises(triton.InferenceServerException, match="priority"):
        client.infer("ctr", inputs(rows), priority=256)


def test_an_output_that_there_is_none_of_is_named(client: Any, criteo_model: Path) -> None:
    """Classes and other outputs are other models'."""
    rows = some_rows(criteo_model, 1)
    with pytest.raises(triton.InferenceServerException, match="unknown output 'logits'"):
        client.infer("ctr", inputs(rows), outputs=[triton.InferRequestedOutput("logits")])
    with pytest.raises(triton.InferenceServerException, match="has no classes"):
        client.infer("ctr", inputs(rows), outputs=[triton.InferRequestedOutput("scores", class_count=2)])


def test_200_callers_at_once_get_each_their_own_answer(url: str, criteo_model: Path) -> None:
    """Requests share batches; an answer that went to a neighbour would look like any other."""
    rows = some_rows(criteo_model, 600)

    async def one(client: Any, caller: int) -> bool:
        mine = rows.part(*range(caller, 600, 200))
        answer = await client.infer("ctr", inputs(mine, module=triton_aio), request_id=f"caller {caller}")
        return right(answer.as_numpy("scores"), mine) and answer.get_response()["id"] == f"caller {caller}"

    async def all_of_them() -> list[bool]:
        async with triton_aio.InferenceServerClient(url, conn_limit=200) as client:
            assert await client.is_model_ready("ctr")
            return await asyncio.gather(*(one(client, caller) for caller in range(200)))

    assert all(asyncio.run(all_of_them()))


KSERVE = Path(__file__).with_name("kserve_rest.py")


def test_kserves_client(shared_system: System, criteo_model: Path, tmp_path: Path) -> None:
    """In a process of its own: its protobuf messages and Triton's cannot be in one."""
    rows = some_rows(criteo_model, 5)
    np.savez(tmp_path / "rows.npz", dense=rows.dense, ids=rows.ids, scores=rows.scores)
    command = [sys.executable, str(KSERVE), str(shared_system.http_port), str(tmp_path / "rows.npz")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60 + PATIENCE_S, check=False)
    assert done.returncode == 0, done.stderr[-3_000:]


def test_msgpack_goes_in_and_comes_out(shared_system: System, criteo_model: Path) -> None:
    """The wire's own spelling, for clients that want neither JSON nor a header for lengths."""
    from narsil_stream.schemas import codec
    from tests.asking import infer_msgpack

    rows = some_rows(criteo_model, 9)
    port, path = shared_system.http_port, "/v2/models/ctr/infer"
    kind = {"content-type": "application/msgpack"}
    good = ask_http(port, "POST", path, infer_msgpack(rows, id="mine"), **kind)
    answer = codec.decode_answer(good.body)
    assert (good.status, good.headers["content-type"]) == (200, "application/msgpack")
    assert answer.id == "mine"
    assert np.allclose(codec.array(answer.outputs[0]), rows.scores, rtol=0, atol=1e-6)
    bad = ask_http(port, "POST", path, infer_msgpack(rows)[:-40], **kind)
    assert (bad.status, codec.decode_answer(bad.body).fault) == (400, "INVALID_ARGUMENT")
    neither = ask_http(port, "POST", path, b'{"inputs":[]}', **kind)
    assert (neither.status, codec.decode_answer(neither.body).fault) == (400, "INVALID_ARGUMENT")
