"""`narsil serve` on a machine with an NVIDIA GPU, from the first start to scores over every door."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from narsil_stream.core.client import BlockingClient
from narsil_stream.kernels.artifact import write
from narsil_stream.kernels.init import criteo_spec, random_model
from narsil_stream.kernels.quantize import quantize
from tests.asking import HttpCaller, Rows, infer_json, json_scores, some_rows
from tests.faults.serving import Serve

pytestmark = pytest.mark.gpu
TOLERANCE = 2e-3


def right(scores: object, rows: Rows) -> bool:
    return np.allclose(np.asarray(scores), rows.scores, rtol=0, atol=TOLERANCE)


def test_the_first_start_chooses_native_kernels_with_int8_rows(tmp_path: Path) -> None:
    """`make serve` on a GPU machine: nobody has said a word about CUDA."""
    with Serve(None, tmp_path) as serve:
        (executor,) = [row for row in serve.actors() if row["kind"] == "executor"]
        assert executor["detail"].endswith("(native, fp16)")
        rows = some_rows(tmp_path / "models" / "dlrm", 4_096)
        with BlockingClient(serve.nats_url) as client:
            card = client.describe("dlrm")
            assert {table.dtype for table in card.spec.tables} == {"INT8"}
            assert (card.backend, card.precision) == ("native", "fp16")
            for count in (1, 100, 127, 129, 1_600, 4_096):
                part = rows.part(*range(count))
                assert right(client.score("dlrm", dense=part.dense, sparse=part.ids), part)


@pytest.mark.parametrize("options", [(), ("--mode", "inline"), ("--backend", "torch"), ("--precision", "bf16")])
def test_callers_at_once_get_each_their_own_scores(tmp_path: Path, options: tuple[str, ...]) -> None:
    """Whatever computes: batches are joined and split around the device."""
    model = tmp_path / "ctr"
    spec = criteo_spec("ctr", rows=5_000, dim=64, bottom=(512, 256), top=(512, 512, 256))
    write(model, quantize(random_model(spec, seed=1), "INT8"))
    rows = some_rows(model, 16 * 40)
    wide = 2e-2 if "bf16" in options else TOLERANCE

    def ask(caller: int) -> None:
        with HttpCaller(serve.http_port) as call:
            for turn in range(40):
                part = rows.part(*range(16 * turn, 16 * turn + 1 + (caller + turn) % 16))
                said = call("POST", "/v2/models/ctr/infer", infer_json(part, id=f"{caller}/{turn}")).json
                assert said["id"] == f"{caller}/{turn}"
                assert np.allclose(json_scores(said), part.scores, rtol=0, atol=wide)

    with Serve(model, tmp_path, *options) as serve, ThreadPoolExecutor(16) as threads:
        for _ in threads.map(ask, range(16)):
            pass
