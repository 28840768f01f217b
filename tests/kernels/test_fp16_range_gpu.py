"""FP16 arithmetic of the native backend beyond FP16's range: a saturated score, or NaN for the row that it is."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest

from narsil_stream.kernels.artifact import Artifact
from narsil_stream.kernels.backend import RaggedBatch
from narsil_stream.kernels.init import Cross, criteo_spec, random_batch, random_model
from narsil_stream.kernels.native.engine import Engine, Options
from narsil_stream.kernels.reference import Reference, Rows, interact, lookup, sigmoid
from narsil_stream.schemas.model import DcnV2

pytestmark = pytest.mark.gpu

LARGEST = 65_504.0
ROWS = 120


class Computed(NamedTuple):
    logits: Any
    scale: Any
    """[rows] of what is added up to a logit: its error is measured by this."""
    peak: Any
    """[rows] the largest number of a hidden layer before it was rounded."""


class Half:
    """The forward pass with every number between layers in FP16, saturated."""

    def __init__(self, artifact: Artifact) -> None:
        self._artifact = artifact
        self._peak: Any = 0.0

    def _kept(self, values: Any, *, hidden: bool = True) -> Any:
        if hidden:
            flat = np.abs(values).reshape(len(values), -1).max(axis=1)
            self._peak = np.maximum(self._peak, np.nan_to_num(flat, nan=np.inf))
        return np.clip(values, -LARGEST, LARGEST).astype(np.float16).astype(np.float32)

    def _layer(self, x: Any, weight: str, bias: str | None, *, relu: bool) -> Any:
        tensors = self._artifact.tensors
        y = x @ tensors[weight].astype(np.float16).astype(np.float32).T
        y = y if bias is None else y + tensors[bias]
        return self._kept(np.maximum(y, 0) if relu else y)

    def compute(self, batch: RaggedBatch) -> Computed:
        spec, tensors = self._artifact.spec, self._artifact.tensors
        shape, self._peak = spec.architecture, np.zeros(batch.rows)
        x = self._kept(batch.dense, hidden=False)
        for i in range(len(shape.bottom)):
            x = self._layer(x, f"bottom.{i}.weight", f"bottom.{i}.bias", relu=True)
        ids = batch.ids.reshape(batch.rows, -1)
        names = [f"tables.{table.name}.weight" for table in spec.tables]
        vectors = [x, *(self._kept(lookup(Rows(tensors[n], None), ids[:, i])) for i, n in enumerate(names))]
        z = np.stack(vectors, axis=1)
        if isinstance(shape, DcnV2):
            start = z = z.reshape(batch.rows, -1)
            for i in range(shape.cross_layers):
                narrow = self._layer(z, f"cross.{i}.v", None, relu=False)
                wide = self._layer(narrow, f"cross.{i}.w", f"cross.{i}.bias", relu=False)
                z = self._kept(start * wide + z, hidden=False)
        else:
            z = self._kept(interact(z), hidden=False)
        for i in range(len(shape.top) - 1):
            z = self._layer(z, f"top.{i}.weight", f"top.{i}.bias", relu=True)
        head, bias = tensors[f"top.{len(shape.top) - 1}.weight"][0], tensors[f"top.{len(shape.top) - 1}.bias"][0]
        return Computed(z @ head + bias, np.abs(z) @ np.abs(head) + 1, self._peak)


@pytest.fixture(params=["fused", "fused 1", "layers", "cross"])
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    kernels, _, split = request.param.partition(" ")
    cross = Cross(2, 32) if kernels == "cross" else None
    artifact = random_model(criteo_spec(rows=300, dim=32, bottom=(256,), top=(256, 256), cross=cross), seed=1)
    artifact.tensors["bottom.0.weight"][:, 0] *= 8  # so that hidden numbers leave the range before the feature does
    way = "fused" if kernels == "fused" else "layers"
    built = Engine(artifact, Options(kernels=way, split=int(split or 0), max_rows=128, lanes=1))
    built.artifact = artifact  # type: ignore[attr-defined]
    yield built
    built.close()


def run(engine: Engine, batch: RaggedBatch) -> tuple[Any, Any]:
    """Scores and logits."""
    scores = np.empty(batch.rows, np.float32)
    engine.run(batch, scores)
    logits = engine.slots[0].logits.get()[: batch.rows]
    return scores, logits


def with_dense(engine: Engine, values: Any) -> RaggedBatch:
    """A batch whose rows have these numbers as their first dense feature."""
    batch = random_batch(engine.spec, len(values), seed=2)
    batch.dense[:, 0] = values
    return batch


def test_rows_beyond_the_range_saturate_or_say_so(engine: Engine) -> None:
    """From ordinary numbers to 10^30: never a plausible score that no rule explains."""
    batch = with_dense(engine, np.geomspace(1, 1e30, ROWS))
    scores, logits = run(engine, batch)
    expected = Half(engine.artifact).compute(batch)  # type: ignore[attr-defined]
    if engine.plan.name == "fused":
        assert np.isfinite(scores).all()
        certain = np.ones(ROWS, bool)
    else:  # cuBLASLt's sums do not saturate: such rows are NaN, but for those at the very edge
        lost = np.isnan(scores)
        assert lost[expected.peak > 1.02 * LARGEST].all()
        assert not lost[expected.peak < 0.98 * LARGEST].any()
        assert 10 < lost.sum() < ROWS - 10
        certain = ~lost
    np.testing.assert_array_less(np.abs(logits - expected.logits)[certain], 2e-2 * expected.scale[certain])
    np.testing.assert_allclose(scores[certain], sigmoid(logits.astype(np.float64))[certain], rtol=0, atol=1e-6)


def test_all_dense_features_from_the_end_of_the_range_on_score_alike(engine: Engine) -> None:
    """65,504 is FP16's largest number: 65,520 would be rounded to infinity."""
    values = np.array([65_504, 65_519, 65_520, 1e5, 1e9, 3e38], np.float32)
    batch = with_dense(engine, values)
    same = RaggedBatch(np.tile(batch.dense[:1], (len(values), 1)), np.tile(batch.ids[:26], len(values)))
    same.dense[:, 0] = values
    scores, _ = run(engine, same)
    assert np.isnan(scores).all() if engine.plan.name == "layers" else np.isfinite(scores).all()
    np.testing.assert_array_equal(scores, np.repeat(scores[:1], len(values)))


@pytest.mark.parametrize("value", [1e30, np.inf, -np.inf, np.nan])
def test_a_row_beyond_the_range_spoils_no_other(engine: Engine, value: float) -> None:
    """A batch holds rows of many callers. What is no number fails the row that has it."""
    batch = random_batch(engine.spec, ROWS, seed=3)
    batch.dense[40, 5] = value
    scores, _ = run(engine, batch)
    expected = sigmoid(Reference(engine.artifact).logits(RaggedBatch(np.nan_to_num(batch.dense), batch.ids)))  # type: ignore[attr-defined]
    np.testing.assert_allclose(np.delete(scores, 40), np.delete(expected, 40), rtol=0, atol=4e-3)
    if not np.isfinite(value):
        assert np.isnan(scores[40])
