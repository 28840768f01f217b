"""Smaller embedding rows: FP32 to FP16 or INT8, and what that does to the scores."""

from typing import Any

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from narsil_stream.kernels.artifact import Artifact, ArtifactError
from narsil_stream.kernels.backend import Backend, RaggedBatch
from narsil_stream.kernels.reference import Rows, lookup
from narsil_stream.schemas.model import RowType, Table

_STEP_ROWS = 1 << 16
"""Rows converted at a time: the temporaries of a big table stay small."""
_FP16_MAX = float(np.finfo(np.float16).max)


class Drift(Struct, frozen=True):
    """How far the scores of two backends lie apart on the same rows, as absolute differences of probabilities."""

    rows: int
    max_abs: float
    mean_abs: float


def quantize(artifact: Artifact, dtype: RowType) -> Artifact:
    """The same model with every table in `dtype`; the MLPs stay as they are. Metrics become `source_...`: they were
    measured before.

    Raises ArtifactError: the rows are INT8 already (converting twice would add up the loss), or do not fit FP16.
    """
    spec = artifact.spec
    tensors = {name: t for name, t in artifact.tensors.items() if not name.startswith("tables.")}
    for table in spec.tables:
        if table.dtype == "INT8" and dtype == "INT8":
            raise ArtifactError(
                f"table {table.name}", "INT8 rows", "FP32 or FP16 rows", "quantize the model that it was made from"
            )
        tensors |= convert(table.name, _as_fp32(artifact, table), dtype)
    metrics = {key if key.startswith("source_") else f"source_{key}": v for key, v in spec.metrics.items()}
    tables = tuple(msgspec.structs.replace(table, dtype=dtype) for table in spec.tables)
    return Artifact(msgspec.structs.replace(spec, tables=tables, metrics=metrics, files={}), tensors)


def convert(table: str, rows: NDArray[np.float32], dtype: RowType) -> dict[str, NDArray[Any]]:
    """The tensors of a table of FP32 rows [rows, dim] stored as `dtype`. Raises ArtifactError: a value beyond FP16."""
    if dtype == "FP32":
        return {f"tables.{table}.weight": rows}
    largest = float(max(rows.max(), -rows.min()))
    if not largest <= _FP16_MAX:
        raise ArtifactError(f"table {table}", f"the value {largest:g}", "finite values up to 65504", "keep it FP32")
    if dtype == "FP16":
        return {f"tables.{table}.weight": rows.astype(np.float16)}
    q, scale_bias = quantize_rows(rows)
    return {f"tables.{table}.weight": q, f"tables.{table}.scale_bias": scale_bias}


def quantize_rows(rows: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float16]]:
    """q [rows, dim] and (scale, bias) [rows, 2] with value ≈ q * scale + bias, bit for bit as FBGEMM makes INT8 rows.

    bias = FP16(min of the row), scale = FP16((max - bias) / 255), q = round((value - bias) / scale) in 0 ... 255.
    A row whose scale or its inverse FP16 cannot tell from zero or infinity (all values equal) gets scale 1.
    """
    q = np.empty(rows.shape, np.uint8)
    scale_bias = np.empty((len(rows), 2), np.float16)
    for start in range(0, len(rows), _STEP_ROWS):
        block = rows[start : start + _STEP_ROWS]
        bias = block.min(axis=1).astype(np.float16)
        scale = ((block.max(axis=1) - bias.astype(np.float32)) / np.float32(255)).astype(np.float16)
        scale[scale == 0] = 1
        wide_scale, wide_bias = scale.astype(np.float32)[:, None], bias.astype(np.float32)[:, None]
        steps = np.rint((block - wide_bias) * (1 / wide_scale))
        q[start : start + _STEP_ROWS] = np.clip(steps, 0, 255)
        scale_bias[start : start + _STEP_ROWS] = np.stack([scale, bias], axis=1)
    return q, scale_bias


def drift(one: Backend, other: Backend, batch: RaggedBatch) -> Drift:
    """Score the same rows twice and compare."""
    first, second = np.empty(batch.rows, np.float32), np.empty(batch.rows, np.float32)
    one.run(batch, first)
    other.run(batch, second)
    apart = np.abs(first - second)
    return Drift(batch.rows, float(apart.max(initial=0)), float(apart.mean()) if batch.rows else 0.0)


def _as_fp32(artifact: Artifact, table: Table) -> NDArray[np.float32]:
    weight = artifact.tensors[f"tables.{table.name}.weight"]
    if weight.dtype == np.float32:
        return weight
    stored = Rows(weight, artifact.tensors.get(f"tables.{table.name}.scale_bias"))
    return lookup(stored, np.arange(table.rows, dtype=np.int32))
