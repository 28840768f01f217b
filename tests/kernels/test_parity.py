"""Every family, precision and architecture against the reference, on trained weights.

Limits and measures stand in `bench/parity.py`, which prints the same as a table.
"""

from collections.abc import Iterator

import numpy as np
import pytest

from narsil_stream.bench import parity
from narsil_stream.kernels import torch_family
from narsil_stream.kernels.artifact import Artifact
from narsil_stream.kernels.backend import Backend, RaggedBatch
from narsil_stream.kernels.init import random_batch
from narsil_stream.kernels.quantize import quantize
from narsil_stream.kernels.reference import Reference
from narsil_stream.schemas.model import RowType

pytest.importorskip("torch", reason="torch is not installed: nothing can be trained")

GPU = pytest.mark.gpu
FAMILIES = [
    *(pytest.param(parity.torch_on("cpu", p), id=f"torch-cpu-{p}") for p in ("fp32", "bf16", "fp16")),
    *(pytest.param(parity.torch_on("cuda", p), id=f"torch-cuda-{p}", marks=GPU) for p in ("fp32", "bf16", "fp16")),
    *(pytest.param(parity.native_in(p), id=f"native-{p}", marks=GPU) for p in ("fp32", "bf16", "fp16")),
]
Models = dict[tuple[str, RowType], Artifact]


@pytest.fixture(scope="session")
def models() -> Models:
    """Trained on 20,000 synthetic clicks, in each row type."""
    full = {architecture: parity.trained(architecture, 20_000) for architecture in parity.ARCHITECTURES}
    return {(a, kind): m if kind == "FP32" else quantize(m, kind) for a, m in full.items() for kind in parity.ROWS}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> parity.Family:
    return request.param


@pytest.fixture(params=parity.ROWS)
def rows(request: pytest.FixtureRequest) -> RowType:
    return request.param


@pytest.fixture(params=parity.ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def backend(family: parity.Family, models: Models, architecture: str, rows: RowType) -> Iterator[Backend]:
    if family.name.startswith("torch"):
        from narsil_stream.kernels.torch_family.devices import resolve

        try:
            torch_family.require_unit()
            resolve(family.name.split()[-1], family.precision)
        except torch_family.Unavailable as error:
            pytest.skip(str(error))
    loaded = family.load(models[architecture, rows])
    loaded.warm_up(2048)
    yield loaded
    loaded.unload()


@pytest.mark.parametrize("bags", parity.BAGS)
def test_scores_and_logits_stay_within_the_precisions_limit(
    backend: Backend, family: parity.Family, models: Models, architecture: str, rows: RowType, bags: str
) -> None:
    """At and around every bucket: a wrong row, column or padding is off by far more."""
    expected, limit = models[architecture, rows], parity.LIMITS[family.precision]
    for size in parity.SIZES:
        batch = random_batch(expected.spec, size, seed=size, bag=parity.BAGS[bags])
        found = parity.apart(backend, expected, batch)
        assert found.score <= limit.score, f"{size} rows"
        assert found.logit <= limit.logit, f"{size} rows"


def test_empty_batches_and_empty_bags_are_no_exception(backend: Backend, family: parity.Family) -> None:
    """Users without history are common; nothing may be read for them."""
    spec = backend.spec
    backend.run(RaggedBatch(np.zeros((0, 13), np.float32), np.zeros(0, np.int32)), np.zeros(0, np.float32))
    batch = RaggedBatch(np.ones((130, 13), np.float32), np.zeros(0, np.int32), np.zeros((130, spec.n_sparse), np.int32))
    scores = np.full(130, np.nan, np.float32)
    backend.run(batch, scores)
    assert np.ptp(scores) <= parity.LIMITS[family.precision].score


def test_int8_rows_stay_near_fp32_scores(models: Models, architecture: str) -> None:
    """What `narsil model quantize` costs on a trained model."""
    full, small = models[architecture, "FP32"], models[architecture, "INT8"]
    found = parity.apart(Reference(small), full, random_batch(full.spec, 5_000, seed=1))
    assert found.score <= parity.INT8_TO_FP32


def test_int8_rows_rank_as_well_as_fp32_rows(models: Models, architecture: str) -> None:
    """On 100,000 rows that neither has seen."""
    before, after = parity.auc_drift(models[architecture, "FP32"], models[architecture, "INT8"])
    assert before > 0.65, "the model has learned nothing: comparing it says nothing"
    assert abs(before - after) <= parity.AUC_DRIFT
