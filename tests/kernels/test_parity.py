"""Every family, precision and architecture against the reference, on trained weights.

Limits and measures stand in `bench/parity.py`, which prints the same as a table.
"""

import functools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from narsil_stream.bench import parity
from narsil_stream.core.criteo import Parser
from narsil_stream.kernels import torch_family
from narsil_stream.kernels.artifact import Artifact, read
from narsil_stream.kernels.backend import Backend, RaggedBatch
from narsil_stream.kernels.init import criteo_spec
from narsil_stream.kernels.quantize import quantize
from narsil_stream.kernels.reference import Reference
from narsil_stream.kernels.train import Settings, train
from narsil_stream.schemas.model import RowType

pytest.importorskip("torch", reason="torch is not installed: nothing can be trained")

GPU = pytest.mark.gpu
FAMILIES = [
    *(pytest.param(parity.torch_on("cpu", p), id=f"torch-cpu-{p}") for p in parity.LIMITS),
    *(pytest.param(parity.torch_on("cuda", p), id=f"torch-cuda-{p}", marks=GPU) for p in parity.LIMITS),
    *(pytest.param(f, id=str(f).replace(" ", "-"), marks=GPU) for f in parity.NATIVE),
]
MODELS = [(kind, rows) for kind, types in parity.KINDS.items() for rows in types]


@functools.cache
def model(kind: parity.Kind, rows: RowType) -> Artifact:
    """Trained on 20,000 synthetic clicks, when a test first asks for it."""
    return parity.trained(kind, 20_000) if rows == "FP32" else quantize(model(kind, "FP32"), rows)


@functools.cache
def questions(kind: parity.Kind, rows: RowType, bags: str) -> list[parity.Question]:
    """What the reference says is asked once, for all families."""
    return parity.questions(model(kind, rows), bags)


@pytest.fixture(params=FAMILIES, scope="module")
def family(request: pytest.FixtureRequest) -> parity.Family:
    return request.param


@pytest.fixture(params=MODELS, ids=lambda key: f"{key[0]}-{key[1]}".replace(" ", "-"), scope="module")
def key(request: pytest.FixtureRequest, family: parity.Family) -> tuple[parity.Kind, RowType]:
    if request.param[0].architecture not in family.takes:
        pytest.skip(f"{family} computes {' and '.join(family.takes)} alone")
    return request.param


@pytest.fixture(scope="module")
def backend(family: parity.Family, key: tuple[parity.Kind, RowType]) -> Iterator[Backend]:
    loaded = _load(family, model(*key))
    yield loaded
    loaded.unload()


def _load(family: parity.Family, artifact: Artifact) -> Backend:
    """Warmed up. Skips what this machine cannot compute."""
    if family.name.startswith("torch"):
        from narsil_stream.kernels.torch_family.devices import resolve

        try:
            torch_family.require_unit()
            resolve(family.name.split()[-1], family.precision)
        except torch_family.Unavailable as error:
            pytest.skip(str(error))
    loaded = family.load(artifact)
    loaded.warm_up(parity.MAX_ROWS)
    return loaded


@pytest.mark.parametrize("bags", parity.BAGS)
def test_scores_and_logits_stay_within_the_precisions_limit(
    backend: Backend, family: parity.Family, key: tuple[parity.Kind, RowType], bags: str
) -> None:
    """At and around every bucket: a wrong row, column or padding is off by far more."""
    limit = family.limit(key[1])
    for question in questions(*key, bags):
        found = parity.apart(backend, question)
        assert found.score <= limit.score, f"{question.batch.rows} rows"
        assert found.logit <= limit.logit, f"{question.batch.rows} rows"


def test_every_bucket_and_its_neighbours_are_compared() -> None:
    """Padding and cutting go wrong there."""
    for size in (128, 256, 512, 1024, 2048, 4096):
        assert {size - 1, size, size + 1} <= set(parity.SIZES)
    assert 1 in parity.SIZES


@pytest.fixture(scope="session")
def real_model(real_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    """Trained on the 300 labelled rows, INT8: 26 tables in which most ids of other rows occur, too."""
    folder = tmp_path_factory.mktemp("real") / "model"
    spec = criteo_spec(rows=500, dim=16)
    train(real_rows / "criteo_rows.tsv", folder, spec, Settings(epochs=5), lambda progress: None)
    return quantize(read(folder), "INT8")


def test_a_model_of_real_rows_gives_real_rows_the_same_scores(
    family: parity.Family, real_model: Artifact, real_rows: Path
) -> None:
    """Real counts and categories are skewed, missing and huge as no random batch is."""
    parsed = Parser([table.rows for table in real_model.spec.tables], labelled=False).feed(
        (real_rows / "criteo_unlabelled_rows.tsv").read_bytes()
    )
    batch = RaggedBatch(parsed.dense, np.ascontiguousarray(parsed.sparse).reshape(-1))
    loaded = _load(family, real_model)
    question = parity.Question(batch, Reference(real_model).logits(batch))
    found, limit = parity.apart(loaded, question), family.limit("INT8")
    loaded.unload()
    assert batch.rows == 1999
    assert found.score <= limit.score
    assert found.logit <= limit.logit


def test_empty_batches_and_empty_bags_are_no_exception(backend: Backend, family: parity.Family) -> None:
    """Users without history are common; nothing may be read for them."""
    spec = backend.spec
    backend.run(RaggedBatch(np.zeros((0, 13), np.float32), np.zeros(0, np.int32)), np.zeros(0, np.float32))
    batch = RaggedBatch(np.ones((130, 13), np.float32), np.zeros(0, np.int32), np.zeros((130, spec.n_sparse), np.int32))
    scores = np.full(130, np.nan, np.float32)
    backend.run(batch, scores)
    assert np.ptp(scores) <= parity.LIMITS[family.precision].score


@pytest.mark.parametrize("kind", parity.KINDS, ids=str)
def test_int8_rows_stay_near_fp32_scores(kind: parity.Kind) -> None:
    """What `narsil model quantize` costs on a trained model."""
    (question,) = parity.questions(model(kind, "FP32"), "one-hot", (5_000,))
    assert parity.apart(Reference(model(kind, "INT8")), question).score <= parity.INT8_TO_FP32


@pytest.mark.parametrize("kind", [kind for kind in parity.KINDS if kind.dim == 16], ids=str)
def test_int8_rows_rank_as_well_as_fp32_rows(kind: parity.Kind) -> None:
    """On 100,000 rows that neither has seen."""
    before, after = parity.auc_drift(model(kind, "FP32"), model(kind, "INT8"))
    assert before > 0.65, "the model has learned nothing: comparing it says nothing"
    assert abs(before - after) <= parity.AUC_DRIFT
