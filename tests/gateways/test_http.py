"""The HTTP gateway as any client of the Open Inference Protocol sees it."""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from narsil_stream.kernels.artifact import write
from narsil_stream.kernels.init import criteo_spec, random_model
from tests.asking import HttpCaller, ask_http, infer_json, json_scores, metric, scrape, some_rows
from tests.support import NatsServer, System, expected

INFER = "/v2/models/ctr/infer"


@pytest.fixture(scope="module")
def port(shared_system: System) -> int:
    return shared_system.http_port


@pytest.mark.parametrize("nested", [False, True], ids=["flat", "nested"])
def test_rows_in_json_get_their_scores_and_their_id_back(port: int, criteo_model: Path, nested: bool) -> None:
    """The one thing that everybody comes for."""
    rows = some_rows(criteo_model, 7)
    answer = ask_http(port, "POST", INFER, infer_json(rows, nested=nested, id="mine/1"))
    assert answer.status == 200
    assert answer.headers["content-type"] == "application/json"
    assert np.allclose(json_scores(answer.json), rows.scores, rtol=0, atol=1e-6)
    said = answer.json
    assert (said["id"], said["model_name"], said["model_version"]) == ("mine/1", "ctr", "1")


def test_one_connection_serves_many_requests(port: int, criteo_model: Path) -> None:
    """A connection for each request would cost more than the request."""
    rows = some_rows(criteo_model, 50)
    with HttpCaller(port) as call:
        for row in range(50):
            one = rows.part(row)
            assert np.allclose(json_scores(call("POST", INFER, infer_json(one)).json), one.scores, rtol=0, atol=1e-6)


def test_a_body_of_unknown_length_is_taken_too(port: int, criteo_model: Path) -> None:
    """Proxies and streaming clients send chunks."""
    rows = some_rows(criteo_model, 3)
    body = json.dumps(infer_json(rows)).encode()
    parts = iter([body[:10], body[10:2000], body[2000:]])
    with HttpCaller(port) as call:
        answer = call("POST", INFER, parts, {"content-type": "text/plain"})
    assert np.allclose(json_scores(answer.json), rows.scores, rtol=0, atol=1e-6)


def test_64_callers_at_once_get_each_their_own_answer(port: int, criteo_model: Path) -> None:
    """Requests share batches; an answer that went to a neighbour would look like any other."""
    rows = some_rows(criteo_model, 64 * 8)

    def ask_eight(caller: int) -> bool:
        with HttpCaller(port) as call:
            for row in range(8 * caller, 8 * caller + 8):
                one = rows.part(*range(row, min(row + 1 + row % 3, len(rows.dense))))
                said = call("POST", INFER, infer_json(one, id=f"row {row}")).json
                assert said["id"] == f"row {row}"
                assert np.allclose(json_scores(said), one.scores, rtol=0, atol=1e-6)
        return True

    with ThreadPoolExecutor(64) as threads:
        assert all(threads.map(ask_eight, range(64)))


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[System, dict[str, Path]]]:
    """A system with one model in three versions, and their folders."""
    folders = {}
    for seed, version in enumerate(("2", "9", "10")):
        folders[version] = tmp_path_factory.mktemp("versions") / version
        spec = replace(criteo_spec("ctr", rows=100, dim=4, bottom=(8,), top=(8,)), version=version)
        write(folders[version], random_model(spec, seed))
    with NatsServer() as server, System(server.url, *folders.values(), gateways=1) as system:
        yield system, folders


def test_a_version_is_scored_by_its_own_weights_and_the_newest_when_none_is_named(
    versions: tuple[System, dict[str, Path]],
) -> None:
    """Ten is newer than nine, although it sorts before it."""
    system, folders = versions
    rows = some_rows(folders["2"], 4)
    for version, named in (("2", "2"), ("9", "9"), ("10", "10"), ("10", "")):
        path = f"/v2/models/ctr/versions/{named}/infer" if named else INFER
        said = ask_http(system.http_port, "POST", path, infer_json(rows)).json
        assert said["model_version"] == version
        assert np.allclose(json_scores(said), expected(folders[version], rows.dense, rows.ids), rtol=0, atol=1e-6)


def test_metadata_describes_the_version_that_would_be_scored(versions: tuple[System, dict[str, Path]]) -> None:
    """A client shapes its tensors by it."""
    port = versions[0].http_port
    said = ask_http(port, "GET", "/v2/models/ctr").json
    assert said == {
        "name": "ctr",
        "versions": ["2", "9", "10"],
        "platform": "narsil_dlrm-dot",
        "inputs": [
            {"name": "dense", "datatype": "FP32", "shape": [-1, 13]},
            {"name": "sparse", "datatype": "INT64", "shape": [-1, 26]},
            {"name": "values", "datatype": "INT64", "shape": [-1]},
            {"name": "lengths", "datatype": "INT32", "shape": [-1, 26]},
        ],
        "outputs": [{"name": "scores", "datatype": "FP32", "shape": [-1]}],
    }
    assert ask_http(port, "GET", "/v2/models/ctr/versions/9").json == said
    missing = ask_http(port, "GET", "/v2/models/ctr/versions/3")
    assert (missing.status, set(missing.json)) == (404, {"error", "code"})


def test_health_server_metadata_and_models(port: int) -> None:
    """What load balancers and the protocol's own clients ask first."""
    assert ask_http(port, "GET", "/v2/health/live").json == {"live": True}
    assert ask_http(port, "GET", "/v2/health/ready").json == {"ready": True}
    assert ask_http(port, "GET", "/v2/models/ctr/ready").json == {"name": "ctr", "ready": True}
    assert ask_http(port, "GET", "/v2/models/ctr/versions/1/ready").status == 200
    assert ask_http(port, "GET", "/v2/models/ctr/versions/7/ready").status == 503
    assert ask_http(port, "GET", "/v2/models/nobody/ready").status == 503
    assert ask_http(port, "GET", "/v2").json["name"] == "narsil-stream"
    assert ask_http(port, "GET", "/v2/").status == 200


def test_a_gateway_without_a_batcher_is_alive_but_not_ready(nats_server: NatsServer, criteo_model: Path) -> None:
    """A balancer that sent requests there would turn them into errors; one that restarted it would not help."""
    with System(nats_server.url, criteo_model, gateways=1) as system:
        port = system.http_port
        (batcher,) = system.runtimes["batcher"]
        system.submit(batcher.drain()).result(20)
        assert ask_http(port, "GET", "/v2/health/live").status == 200
        not_ready = ask_http(port, "GET", "/v2/health/ready")
        assert (not_ready.status, not_ready.json) == (503, {"ready": False})
        refused = ask_http(port, "POST", INFER, infer_json(some_rows(criteo_model, 1)))
        assert (refused.status, refused.json["code"]) == (503, "UNAVAILABLE")
        assert int(refused.headers["retry-after"]) >= 1


def test_metrics_count_what_was_asked(port: int, criteo_model: Path) -> None:
    """Nobody can run what they cannot see."""
    before = scrape(port)
    ask_http(port, "POST", INFER, infer_json(some_rows(criteo_model, 3)))
    ask_http(port, "POST", INFER, b"{")
    assert ask_http(port, "POST", INFER, b"{}", **{"content-encoding": "br"}).status == 415
    after = scrape(port)

    def more(name: str, **labels: str) -> float:
        return metric(after, name, **labels) - metric(before, name, **labels)

    assert more("narsil_requests_offered_total") == 3
    assert more("narsil_requests_total", outcome="answered") == 1
    assert more("narsil_requests_total", outcome="refused") == 2
    assert more("narsil_errors_total", fault="INVALID_ARGUMENT") == 2
    assert more("narsil_rows_total") == 3
    assert metric(after, "narsil_ready") == 1


@pytest.mark.parametrize("path", ["/", "/v1/models", "/v2/model", "/v2/models/ctr/explain", "/v2/models/ctr/infer/x"])
def test_a_path_that_is_none_is_404_in_the_protocols_own_form(port: int, path: str) -> None:
    """Clients parse `error` of every answer that is not 200."""
    answer = ask_http(port, "GET", path)
    assert answer.status == 404
    assert set(answer.json) == {"error"}
    assert path in answer.json["error"]


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("GET", INFER, "POST"), ("DELETE", INFER, "POST"), ("POST", "/v2/health/live", "GET, HEAD"),
     ("PUT", "/v2/models/ctr", "GET, HEAD"), ("HEAD", INFER, "POST")],
)  # fmt: skip
def test_a_method_that_is_not_possible_is_405_and_says_which_is(
    port: int, method: str, path: str, allowed: str
) -> None:
    """HTTP asks for Allow; people need it too."""
    answer = ask_http(port, method, path)
    assert answer.status == 405
    assert answer.headers["allow"] == allowed
    assert method == "HEAD" or set(answer.json) == {"error"}


@pytest.mark.parametrize("path", ["/v2/health/ready", "/v2/models/ctr", "/metrics", "/nowhere"])
def test_head_has_the_headers_of_get_and_no_body(port: int, path: str) -> None:
    """Health checks often use it."""
    with HttpCaller(port) as call:
        head, get = call("HEAD", path), call("GET", path)
    assert head.status == get.status
    assert head.body == b""
    assert head.headers["content-type"] == get.headers["content-type"]
    if path != "/metrics":
        assert head.headers["content-length"] == get.headers["content-length"]


@pytest.mark.parametrize("model", ["nobody", "ctr%20", "a.b", "%3E", "*", "ctr%00", "x" * 300, "%C3%A9"])
def test_a_model_that_nobody_serves_is_404_whatever_its_name(port: int, model: str) -> None:
    """A name becomes part of a subject; what cannot be one must not come that far."""
    for path in (f"/v2/models/{model}/infer", f"/v2/models/ctr/versions/{model}/infer"):
        answer = ask_http(port, "POST", path, {"inputs": []})
        assert answer.status == 404, answer
        assert answer.json["code"] == "NOT_FOUND"


def wrong(model: Path, at: int, **fields: Any) -> dict[str, Any]:
    """A request for two rows with one field of an input changed."""
    request = infer_json(some_rows(model, 2))
    request["inputs"][at] |= fields
    return request


WRONG: list[tuple[int, dict[str, Any], str]] = [
    (0, {"shape": [2, 12], "data": [0.0] * 24}, "'dense' has shape [2, 12]; expected [rows, 13]"),
    (0, {"shape": [26]}, "'dense' has shape [26]; expected [rows, 13]"),
    (0, {"shape": [0, 13], "data": []}, "'dense' has 0 rows"),
    (0, {"shape": [2, 13], "data": [0.0] * 25}, "'dense' has 100 bytes; expected 104"),
    (0, {"datatype": "INT64", "data": [0] * 26}, "'dense' has datatype 'INT64'; expected FP32"),
    (0, {"datatype": "FP64", "data": [0.0] * 14 + [1e39] + [0.0] * 11}, "'dense' [1, 1] is 1e+39"),
    (0, {"data": [0.0] * 14 + [1e39] + [0.0] * 11}, "'dense' data[14]"),
    (0, {"shape": [2**40, 2**40]}, "'dense' has shape"),
    (1, {"shape": [1, 26], "data": [0] * 26}, "'sparse' has shape [1, 26]; expected [2, 26]"),
    (1, {"data": [0] * 27 + [1000] + [0] * 24}, "'sparse' [1, 1] is 1000; expected an id from 0 to 999"),
    (1, {"data": [0] * 51 + [-1]}, "'sparse' [1, 25] is -1"),
    (1, {"data": [[0] * 26, [0] * 25]}, "'sparse' has data nested"),
    (1, {"datatype": "FP32"}, "'sparse' has datatype 'FP32'; expected INT32 or INT64"),
    (1, {"datatype": "UINT16"}, "'sparse' has datatype 'UINT16'; expected INT32 or INT64"),
    (1, {"name": "dense"}, "given twice"),
    (1, {"name": "ids"}, "inputs are 'dense', 'ids'; expected"),
]


@pytest.mark.parametrize(("at", "fields", "told"), WRONG, ids=[told for _, _, told in WRONG])
def test_a_wrong_tensor_is_400_that_names_it_and_what_was_expected(
    port: int, criteo_model: Path, at: int, fields: dict[str, Any], told: str
) -> None:
    """ "Bad request" alone costs somebody an afternoon."""
    answer = ask_http(port, "POST", INFER, wrong(criteo_model, at, **fields))
    assert answer.status == 400, answer
    assert told in answer.json["error"]
    assert answer.json["code"] == "INVALID_ARGUMENT"


def test_an_answer_with_an_error_has_the_requests_id(port: int, criteo_model: Path) -> None:
    """Whoever logs errors wants to know which request each was for."""
    request = wrong(criteo_model, 0, shape=[1, 1], data=[0.0]) | {"id": "mine/2"}
    assert ask_http(port, "POST", INFER, request).json["id"] == "mine/2"
