"""What a caller learns of an error that is ours."""

from pathlib import Path

import grpc
import numpy as np
from numpy.typing import NDArray

from narsil_stream.kernels import reference
from narsil_stream.kernels.backend import Backend, RaggedBatch
from tests.asking import ask_http, infer_json, some_rows
from tests.doubles import Gate, GatedBackend
from tests.gateways.calling import GrpcCaller, infer_message
from tests.support import NatsServer, System

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
