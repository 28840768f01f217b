from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from narsil_stream.kernels.artifact import Artifact, ArtifactError
from narsil_stream.kernels.init import Cross, criteo_spec, random_batch, random_model
from narsil_stream.kernels.quantize import drift, quantize, quantize_rows
from narsil_stream.kernels.reference import Reference, Rows, lookup
from narsil_stream.schemas.model import RowType

matrices = arrays(
    np.float32, array_shapes(min_dims=2, max_dims=2, max_side=12), elements=st.floats(-60000, 60000, width=32)
)


@given(rows=matrices)
def test_an_int8_row_stays_within_a_step_of_its_values(rows: Any) -> None:
    """The promise of row-wise INT8: half a step, and what FP16 rounds off the row's smallest value and scale."""
    q, scale_bias = quantize_rows(rows)
    back = lookup(Rows(q, scale_bias), np.arange(len(rows), dtype=np.int32))
    scale, bias = scale_bias.astype(np.float32).T
    slack = 0.5 * scale + np.abs(bias) * 2**-10 + 255 * scale * 2**-10 + 1e-4
    assert (np.abs(back - rows) <= slack[:, None]).all()


def test_int8_rows_are_those_of_fbgemm_bit_for_bit() -> None:
    """Tables quantized here and by FBGEMM must be interchangeable."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("fbgemm_gpu", reason="fbgemm is not installed")
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((4000, 16)).astype(np.float32)
    rows *= np.exp(rng.uniform(-20, 8, (4000, 1))).astype(np.float32)
    rows[:4] = np.array([0.7, 0, 1e-9, -1e-30], np.float32)[:, None]
    fused = torch.ops.fbgemm.FloatOrHalfToFusedNBitRowwiseQuantizedSBHalf(torch.from_numpy(rows), 8).numpy()
    q, scale_bias = quantize_rows(rows)
    np.testing.assert_array_equal(q, fused[:, :16])
    np.testing.assert_array_equal(scale_bias, fused[:, 16:].copy().view(np.float16))


def test_rows_of_equal_values_survive(small_spec: Any) -> None:
    """Untrained rows are often all zero: a scale of zero must not make them NaN."""
    q, scale_bias = quantize_rows(np.zeros((3, 4), np.float32))
    assert not q.any()
    np.testing.assert_array_equal(scale_bias, [[1, 0]] * 3)


@pytest.mark.parametrize("cross", [None, Cross()])
@pytest.mark.parametrize(("dtype", "limit"), [("FP32", 0.0), ("FP16", 0.002), ("INT8", 0.03)])
def test_smaller_rows_change_scores_little_and_the_report_says_how_much(
    dtype: RowType, limit: float, cross: Cross | None
) -> None:
    """Whoever halves the memory must see the price."""
    model = random_model(criteo_spec(rows=500, cross=cross), seed=1)
    smaller = quantize(model, dtype)
    report = drift(Reference(model), Reference(smaller), random_batch(model.spec, 3000, seed=2))
    assert {table.dtype for table in smaller.spec.tables} == {dtype}
    assert report.rows == 3000
    assert report.mean_abs <= report.max_abs <= limit
    assert (report.max_abs > 0) == (dtype != "FP32")


def test_converting_in_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Big tables are converted a block at a time."""
    rows = np.random.default_rng(0).standard_normal((10, 4)).astype(np.float32)
    whole = quantize_rows(rows)
    monkeypatch.setattr("narsil_stream.kernels.quantize._STEP_ROWS", 3)
    for one, other in zip(whole, quantize_rows(rows), strict=True):
        np.testing.assert_array_equal(one, other)


def test_quantizing_int8_again_is_refused(small_spec: Any) -> None:
    """The loss would add up in silence."""
    with pytest.raises(ArtifactError, match=r"table t0: found INT8 rows.*quantize the model that it was made from"):
        quantize(random_model(small_spec("INT8"), seed=1), "INT8")


@pytest.mark.parametrize("dtype", ["FP16", "INT8"])
def test_values_beyond_fp16_are_refused_by_table(small_spec: Any, dtype: RowType) -> None:
    """Infinity in a table would make every score that touches it NaN."""
    model = random_model(small_spec(), seed=1)
    model.tensors["tables.t2.weight"][3, 1] = -1e6
    with pytest.raises(ArtifactError, match=r"table t2: found the value 1e\+06"):
        quantize(model, dtype)


def test_metrics_of_the_source_are_marked_as_such(small_spec: Any) -> None:
    """An AUC measured in FP32 must not pose as the INT8 model's."""
    model = random_model(small_spec(), seed=1)
    measured = Artifact(msgspec.structs.replace(model.spec, metrics={"auc": 0.8}), model.tensors)
    twice = quantize(quantize(measured, "FP16"), "INT8")
    assert twice.spec.metrics == {"source_auc": 0.8}
