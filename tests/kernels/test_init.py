import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from narsil_stream.kernels import reference
from narsil_stream.kernels.artifact import Artifact, ArtifactError, read
from narsil_stream.kernels.init import Cross, criteo_spec, demo_model, random_batch, random_model
from narsil_stream.kernels.reference import Reference
from narsil_stream.schemas.model import ModelSpec, RowType


def scores_of(model: Artifact, rows: int = 2000) -> np.ndarray[Any, Any]:
    scores = np.empty(rows, np.float32)
    Reference(model).run(random_batch(model.spec, rows, seed=99), scores)
    return scores


SHAPES: dict[str, ModelSpec] = {
    "demo": criteo_spec(),
    "one row": criteo_spec(rows=1),
    "wide": criteo_spec(rows=1000, dim=64, bottom=(512, 256), top=(512, 512, 256)),
    "cross": criteo_spec(cross=Cross()),
    "wide cross": criteo_spec(rows=1000, dim=64, bottom=(512, 256), top=(512, 256), cross=Cross(3, 512)),
    "flat": criteo_spec(rows=1000, dim=1, bottom=(), top=()),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_random_scores_differ_between_rows_and_do_not_saturate(shape: str) -> None:
    """Scores that are all equal, or all 0 or 1, would hide a row that got its neighbour's answer."""
    scores = scores_of(random_model(SHAPES[shape], seed=0))
    assert 0.1 < scores.std() < 0.3
    assert 0.3 < scores.mean() < 0.7
    assert np.quantile(scores, 0.01) > 0.005
    assert np.quantile(scores, 0.99) < 0.999


@pytest.mark.parametrize("cross", [None, Cross()])
def test_every_input_moves_the_score(cross: Cross | None) -> None:
    """A parity test on a model that ignores its tables proves nothing about tables."""
    model = random_model(criteo_spec(rows=100, cross=cross), seed=0)
    backend = Reference(model)
    batch = random_batch(model.spec, 200, seed=1)
    before = backend.logits(batch)
    for feature in range(13):
        dense = batch.dense.copy()
        dense[:, feature] += 1
        assert np.abs(backend.logits(reference.RaggedBatch(dense, batch.ids)) - before).mean() > 1e-3
    for table in range(26):
        ids = batch.ids.reshape(200, 26).copy()
        ids[:, table] = (ids[:, table] + 1) % 100
        assert np.abs(backend.logits(reference.RaggedBatch(batch.dense, ids.reshape(-1))) - before).mean() > 1e-2


@pytest.mark.parametrize("dtype", ["FP32", "FP16", "INT8"])
def test_the_same_seed_gives_the_same_model_and_another_seed_another(small_spec: Any, dtype: RowType) -> None:
    """Two machines that measure `seed 7` must measure the same model."""
    spec = small_spec(dtype)
    first, again, other = (random_model(spec, seed) for seed in (7, 7, 8))
    for name, tensor in first.tensors.items():
        np.testing.assert_array_equal(tensor, again.tensors[name])
    assert any((tensor != other.tensors[name]).any() for name, tensor in first.tensors.items())


def test_the_demo_model_is_small_quick_and_complete(tmp_path: Path) -> None:
    """The first `narsil serve` on a fresh machine waits for it."""
    started = time.perf_counter()
    demo_model(tmp_path / "dlrm")
    assert time.perf_counter() - started < 10  # under 1 s on an idle core; CI machines are not idle
    spec = read(tmp_path / "dlrm").spec
    assert (spec.name, spec.n_dense, spec.n_sparse, spec.architecture.dim) == ("dlrm", 13, 26, 16)
    assert spec.preprocessing is not None
    assert spec.top_input == 367
    assert sum(path.stat().st_size for path in (tmp_path / "dlrm").iterdir()) < 20_000_000


def test_making_the_demo_model_twice_leaves_the_first_and_a_taken_folder_is_refused(tmp_path: Path) -> None:
    """Several executors start at once on a fresh machine; none may fail, none may replace what another has loaded."""
    demo_model(tmp_path / "dlrm")
    before = (tmp_path / "dlrm").stat().st_ino
    demo_model(tmp_path / "dlrm")
    assert (tmp_path / "dlrm").stat().st_ino == before
    (tmp_path / "other").write_text("something else")
    with pytest.raises(ArtifactError):
        demo_model(tmp_path / "other")


@pytest.mark.parametrize("bag", [None, 5])
def test_random_batches_fit_their_model(small_spec: Any, bag: int | None) -> None:
    """Ids out of range would test something else than intended."""
    batch = random_batch(small_spec(), 300, seed=1, bag=bag)
    lengths = np.ones((300, 3), np.int32) if batch.lengths is None else batch.lengths
    assert batch.dense.shape == (300, 3)
    assert (batch.dense.dtype, batch.ids.dtype, lengths.dtype) == (np.float32, np.int32, np.int32)
    assert lengths.sum() == len(batch.ids)
    limit = np.repeat(np.tile([7, 1, 30], 300), lengths.reshape(-1))
    assert ((batch.ids >= 0) & (batch.ids < limit)).all()
    if bag is not None:
        assert set(lengths.reshape(-1).tolist()) == set(range(bag + 1))
