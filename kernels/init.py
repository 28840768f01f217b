"""Models with random weights: to try the pipeline, to measure it, to start training from."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from narsil_stream.kernels.artifact import MODEL, Artifact, ArtifactError, Slot, layout, write
from narsil_stream.kernels.backend import RaggedBatch
from narsil_stream.kernels.quantize import convert, quantize
from narsil_stream.kernels.reference import Reference
from narsil_stream.schemas.model import (
    CRITEO_SHAPE,
    Architecture,
    DcnV2,
    DlrmDot,
    ModelSpec,
    Pooling,
    Preprocessing,
    RowType,
    Table,
)

_CALIBRATION_ROWS = 2048


class Cross(NamedTuple):
    """A cross network."""

    layers: int = 3
    rank: int = 64


def plain_spec(
    name: str,
    dense: int,
    table_rows: Sequence[int],
    dim: int,
    bottom: tuple[int, ...],
    top: tuple[int, ...],
    dtype: RowType = "FP32",
    version: str = "1",
    *,
    cross: Cross | None = None,
    pooling: Pooling = "sum",
) -> ModelSpec:
    """A model with tables C1, C2 ... of the given rows. One of 13 dense features and 26 tables reads Criteo rows.

    `bottom` and `top` are the hidden widths; the bottom MLP ends in `dim`, the top MLP in 1. Dot interaction, or a
    cross network (DCNv2) if `cross` is given.
    """
    layers = ((*bottom, dim), (*top, 1))
    architecture: Architecture = DlrmDot(dense, dim, *layers, pooling)
    if cross is not None:
        architecture = DcnV2(dense, dim, *layers, pooling, cross_layers=cross.layers, cross_rank=cross.rank)
    return ModelSpec(
        name=name,
        architecture=architecture,
        tables=tuple(Table(name=f"C{i}", rows=rows, dtype=dtype) for i, rows in enumerate(table_rows, start=1)),
        version=version,
        preprocessing=Preprocessing() if (dense, len(table_rows)) == CRITEO_SHAPE else None,
    )


def criteo_spec(
    name: str = "dlrm",
    rows: int = 10_000,
    dim: int = 16,
    bottom: tuple[int, ...] = (64,),
    top: tuple[int, ...] = (64, 32),
    *,
    cross: Cross | None = None,
    pooling: Pooling = "sum",
) -> ModelSpec:
    """A model for Criteo rows: 13 dense features and 26 tables of `rows` rows each, FP32."""
    return plain_spec(name, 13, [rows] * 26, dim, bottom, top, cross=cross, pooling=pooling)


def demo_model(folder: Path) -> None:
    """Write the model that `narsil serve` shows on a fresh machine: random weights, INT8 rows, the same everywhere.

    Leaves an artifact that is there already: several processes may start at once. Raises ArtifactError when the folder
    holds something else or cannot be written.
    """
    try:
        write(folder, quantize(random_model(criteo_spec(), seed=0), "INT8"))
    except ArtifactError:
        if not (folder / MODEL).exists():
            raise


def random_model(spec: ModelSpec, seed: int) -> Artifact:
    """Random weights, the same for the same seed, scaled so that scores differ between rows and saturate for none.

    The last layer is set so that the logits of random rows have mean 0 and deviation 1: scores mostly in 0.05 to 0.95.
    """
    artifact = Artifact(spec, random_tensors(spec, seed))
    logits = Reference(artifact).logits(random_batch(spec, _CALIBRATION_ROWS, seed + 1))
    weight, bias = (artifact.tensors[f"top.{len(spec.architecture.top) - 1}.{part}"] for part in ("weight", "bias"))
    deviation = max(float(logits.std()), 1e-3)
    weight /= deviation
    bias[:] = -logits.mean() / deviation
    return artifact


def random_tensors(spec: ModelSpec, seed: int, row_deviation: float | None = None) -> dict[str, NDArray[Any]]:
    """Untrained weights: He's scale for the MLPs, Glorot's for a cross network, zero bias, normal rows in each table's
    type.

    `row_deviation`: of the values in the tables; by default dim^-1/4, which gives products of rows deviation 1.
    """
    rng = np.random.default_rng(seed)
    rows = spec.architecture.dim**-0.25 if row_deviation is None else row_deviation
    tensors: dict[str, NDArray[Any]] = {}
    dtypes = {table.name: table.dtype for table in spec.tables}
    for name, slot in layout(spec).items():
        part, key, kind = name.split(".")
        if part == "tables" and kind == "weight":
            tensors |= convert(key, _normal(rng, slot.shape, rows), dtypes[key])
        elif part != "tables":
            tensors[name] = _dense_layer(rng, slot, spread=sum(slot.shape) if part == "cross" else slot.shape[-1])
    return tensors


def random_batch(spec: ModelSpec, rows: int, seed: int, bag: int | None = None) -> RaggedBatch:
    """Random rows for any model: dense values as logarithms of counts have them, ids equally likely.

    One-hot, or with `bag` multi-hot: 0 to `bag` ids for each row and table.
    """
    rng = np.random.default_rng(seed)
    dense = rng.exponential(1.5, (rows, spec.n_dense)).astype(np.float32)
    table_rows = np.array([table.rows for table in spec.tables], np.int64)
    shape = (rows, spec.n_sparse)
    if bag is None:
        return RaggedBatch(dense, rng.integers(0, table_rows, shape).astype(np.int32).reshape(-1))
    lengths = rng.integers(0, bag + 1, shape).astype(np.int32)
    limits = np.repeat(np.broadcast_to(table_rows, shape).reshape(-1), lengths.reshape(-1))
    return RaggedBatch(dense, rng.integers(0, limits).astype(np.int32), lengths)


def _dense_layer(rng: np.random.Generator, slot: Slot, spread: int) -> NDArray[np.float32]:
    if len(slot.shape) == 1:
        return np.zeros(slot.shape, np.float32)
    return _normal(rng, slot.shape, (2 / spread) ** 0.5)


def _normal(rng: np.random.Generator, shape: tuple[int, ...], deviation: float) -> NDArray[np.float32]:
    values = rng.standard_normal(shape, np.float32)
    values *= np.float32(deviation)
    return values
