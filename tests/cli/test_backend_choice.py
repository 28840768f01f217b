"""`--backend` and `--precision`, from the command line to the scores."""

import json
import subprocess
import urllib.request
from pathlib import Path

import numpy as np
import pytest

from narsil_stream.actors.processes import CANNOT_SUCCEED
from narsil_stream.kernels import reference
from narsil_stream.kernels.init import random_batch
from narsil_stream.kernels.torch_family import unit
from tests.faults.serving import Serve
from tests.support import PATIENCE_S, NatsServer, narsil


def ask(port: int, model: str, dense: np.ndarray, sparse: np.ndarray) -> np.ndarray:
    inputs = [
        {"name": "dense", "datatype": "FP32", "shape": dense.shape, "data": dense.ravel().tolist()},
        {"name": "sparse", "datatype": "INT64", "shape": sparse.shape, "data": sparse.ravel().tolist()},
    ]
    url = f"http://127.0.0.1:{port}/v2/models/{model}/infer"
    request = urllib.request.Request(url, json.dumps({"inputs": inputs}).encode())
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
        return np.array(json.load(response)["outputs"][0]["data"])


@pytest.mark.skipif(not unit.is_here(), reason="no locked unit of torch, FBGEMM and TorchRec")
def test_an_executor_serves_with_the_torch_family(criteo_model: Path, tmp_path: Path) -> None:
    """The whole way of a request, with another family behind it: what computes is told, the scores are the same."""
    backend = reference.load(criteo_model)
    batch = random_batch(backend.spec, 5, 1)
    expected = np.empty(5, np.float32)
    backend.run(batch, expected)
    with Serve(criteo_model, tmp_path, "--backend", "torch", "--precision", "fp32") as serve:
        scores = ask(serve.http_port, backend.spec.name, batch.dense, batch.ids.reshape(5, -1))
        log = serve.log.read_text()
    np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)
    assert "compute: torch backend, precision fp32 (as configured)" in log
    assert "(torch, fp32)" in log
    assert "Successfully loaded" not in log


def test_a_choice_that_cannot_be_met_ends_the_executor_with_the_reason(
    nats_server: NatsServer, criteo_model: Path
) -> None:
    """Another try would fail again: the exit status says so to the supervisor."""
    arguments = ("executor", "--nats-url", nats_server.url, "--model", criteo_model)
    process = narsil(*arguments, "--backend", "reference", "--precision", "bf16", stdin=subprocess.DEVNULL)
    _, stderr = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == CANNOT_SUCCEED
    assert b"fp64 alone, not in bf16" in stderr
    assert b"Next: leave --precision to auto" in stderr
    assert b"Traceback" not in stderr
