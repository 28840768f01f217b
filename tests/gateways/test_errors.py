"""What a caller learns of an error that is ours."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from numpy.typing import NDArray

from narsil_stream.kernels import reference
from narsil_stream.kernels.backend import Backend, RaggedBatch
from tests.asking import HttpAnswer, Rows, ask_http, infer_json, json_scores, some_rows
from tests.doubles import Gate, GatedBackend
from tests.gateways.calling import GrpcCaller, infer_message
from tests.support import NatsServer, System, until

SECRET = "/srv/models/secret-42"


class Broken(GatedBackend):
    """A backend whose every run fails, and says where it lives."""

    def run(self, batch: RaggedBatch, scores: NDArray[np.float32]) -> None:
        raise RuntimeError(f"cannot read {SECRET}")


def load(artifact: Path) -> Backend:
    return Broken(reference.load(artifact), Gate())


def test_an_error_of_the_backend_names_nothing_of_ours(nats_server: NatsServer, criteo_model: Path) -> None:
    """An internal name in an error has opened other servers' doors (CVE-2025-23319)."""
    rows = some_rows(criteo_model, 1)
    with System(nats_server.url, criteo_model, loader=load, gateways=1, grpc_gateways=1) as system:
        over_http = ask_http(system.http_port, "POST", "/v2/models/ctr/infer", infer_json(rows))
        with GrpcCaller(system.grpc_port) as call:
            over_grpc = call("ModelInfer", infer_message(rows))
    assert (over_http.status, over_http.json["code"]) == (500, "INTERNAL")
    assert over_grpc.code is grpc.StatusCode.INTERNAL
    for told in (over_http.body.decode(), over_grpc.detail):
        assert SECRET not in told
        assert "Error" not in told
        assert "forward pass failed" in told


class Picky(GatedBackend):
    """No number comes out for rows whose first feature is 777."""

    def run(self, batch: RaggedBatch, scores: NDArray[np.float32]) -> None:
        super().run(batch, scores)
        scores[batch.dense[:, 0] == 777] = np.nan


def test_a_row_without_a_score_fails_its_own_request_alone(nats_server: NatsServer, criteo_model: Path) -> None:
    """One caller's huge number must not cost the others of its batch their scores."""
    gate, rows = Gate(), some_rows(criteo_model, 4)
    poisoned = rows.part(3)
    poisoned.dense[0, 0] = 777
    doors = {"loader": lambda artifact: Picky(reference.load(artifact), gate), "gateways": 1}
    with System(nats_server.url, criteo_model, **doors) as system, ThreadPoolExecutor(8) as threads:
        (batcher,) = system.actors("batcher")

        def ask(part: Rows) -> Future[HttpAnswer]:
            body = infer_json(part, timeout=60_000_000)
            return threads.submit(ask_http, system.http_port, "POST", "/v2/models/ctr/infer", body)

        with gate.closed():
            asked = []
            for slot in (1, 2):  # the two of the executor, so that the rest has to wait, and meets in one batch
                asked.append(ask(rows.part(0)))
                until(
                    lambda slot=slot: batcher.registry.get_sample_value("narsil_in_flight") == slot, "a slot is taken"
                )
            asked += [ask(rows.part(1)), ask(poisoned), ask(rows.part(2))]
            until(lambda: batcher.registry.get_sample_value("narsil_queue_rows") == 3, "three wait")
        *_, one, bad, other = [future.result(20) for future in asked]
    assert gate.rows[-1] == 3
    assert (bad.status, bad.json["code"]) == (500, "INTERNAL")
    assert "not a number" in bad.json["error"]
    assert json_scores(one.json) == pytest.approx(rows.scores[1:2], abs=1e-6)
    assert json_scores(other.json) == pytest.approx(rows.scores[2:3], abs=1e-6)
