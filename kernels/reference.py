"""The `reference` backend: DLRM and DCNv2 in NumPy, written to be read. What every other backend is compared with.

Rows are read as FP32, as they are stored; all arithmetic after that is FP64, so that a score does not depend on how a
matrix product is cut, on the machine, or on which rows share a batch.
"""

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from narsil_stream.kernels.artifact import Artifact, Tensors, read
from narsil_stream.kernels.backend import PROTOCOL, Backend, BackendInfo, RaggedBatch, unfit
from narsil_stream.schemas.compute import Capabilities
from narsil_stream.schemas.model import DcnV2, ModelSpec, Pooling, Table

Floats = NDArray[np.floating]
Ids = NDArray[np.int32]

_BLOCK_ROWS = 256
"""Rows computed at a time: what a block needs stays in a core's cache, and memory does not grow with the batch."""


class Layer(NamedTuple):
    weight: Floats
    """[out, in]"""
    bias: Floats
    """[out]"""


class CrossLayer(NamedTuple):
    v: Floats
    """[rank, width]"""
    w: Floats
    """[width, rank]"""
    bias: Floats
    """[width]"""


class Rows(NamedTuple):
    """An embedding table as it is stored."""

    weight: NDArray[np.float32] | NDArray[np.float16] | NDArray[np.uint8]
    """[rows, dim]"""
    scale_bias: NDArray[np.float16] | None
    """[rows, 2] for INT8 rows."""


def load(artifact: Path) -> Backend:
    """Load an artifact's folder. Raises ArtifactError when it is unfit, Unfit without the memory for it."""
    with unfit("the reference backend could not load this model", "another machine", MemoryError):
        return Reference(read(artifact))


def lookup(table: Rows, ids: Ids) -> Floats:
    """out[n] = the row `ids[n]` as FP32. INT8: out[n, d] = weight[id, d] * scale[id] + bias[id], computed in FP32.

    ids [N], out [N, dim].
    """
    rows: Floats = table.weight.take(ids, axis=0).astype(np.float32, copy=False)
    if table.scale_bias is None:
        return rows
    scale, bias = table.scale_bias.take(ids, axis=0).astype(np.float32).T
    rows *= scale[:, None]
    rows += bias[:, None]
    return rows


def pool(rows: Floats, lengths: Ids, pooling: Pooling = "sum") -> Floats:
    """out[b] = the sum or mean of bag b, the next `lengths[b]` of `rows`; zero for an empty bag.

    rows [N, dim], lengths [B] with sum N, out [B, dim].
    """
    out = np.zeros((len(lengths), rows.shape[1]))
    full = lengths > 0
    starts = np.cumsum(lengths) - lengths
    if full.any():
        out[full] = np.add.reduceat(rows, starts[full], axis=0, dtype=np.float64)
    if pooling == "mean":
        out /= np.maximum(lengths, 1)[:, None]
    return out


def interact(x: Floats) -> Floats:
    """out[b] = [x[b, 0], then Σ_d x[b, i, d]·x[b, j, d] for 0 <= j < i <= F in the order (1,0), (2,0), (2,1) ...].

    x [B, F+1, dim], row 0 the bottom MLP's output; out [B, dim + F(F+1)/2].
    """
    products = (x @ x.transpose(0, 2, 1)).reshape(len(x), x.shape[1] ** 2)
    return np.concatenate([x[:, 0], products.take(_pairs(x.shape[1]), axis=1)], axis=1)


def cross(x: Floats, layers: list[CrossLayer]) -> Floats:
    """x_{l+1} = x_0 * (x_l·Vᵀ·Wᵀ + b) + x_l for each layer, x_0 the vectors of a row one after another.

    x [B, F+1, dim], row 0 the bottom MLP's output; out [B, (F+1) dim], the last x_l.
    """
    first = x.reshape(len(x), x.shape[1] * x.shape[2])
    out = first
    for v, w, bias in layers:
        out = first * (out @ v.T @ w.T + bias) + out
    return out


def relu_layers(x: Floats, layers: list[Layer]) -> Floats:
    """x = max(0, x·Wᵀ + b) for each layer. x [B, in of the first], out [B, out of the last]."""
    for weight, bias in layers:
        x = x @ weight.T
        x += bias
        np.maximum(x, 0, out=x)
    return x


def sigmoid(x: Floats) -> Floats:
    """1 / (1 + e^-x), by way of e^-|x| so that nothing overflows and small scores keep their digits."""
    small = np.exp(-np.abs(x))
    scores: Floats = np.where(x >= 0, 1, small) / (1 + small)
    return scores


class Reference:
    """A DLRM with dot interaction or cross network, in FP64 arithmetic, on the CPU."""

    def __init__(self, artifact: Artifact) -> None:
        """Tables are used in place: not copied, not converted."""
        spec, tensors = artifact.spec, artifact.tensors
        self._spec = spec
        self._bottom = _layers(tensors, "bottom", len(spec.architecture.bottom))
        *self._top, self._last = _layers(tensors, "top", len(spec.architecture.top))
        self._tables = [_rows(tensors, table) for table in spec.tables]
        self._interaction: Callable[[Floats], Floats] = interact
        if isinstance(spec.architecture, DcnV2):
            self._interaction = functools.partial(cross, layers=_cross(tensors, spec.architecture.cross_layers))

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    @property
    def info(self) -> BackendInfo:
        return BackendInfo(name="reference", device="cpu", precision="fp64")

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(PROTOCOL, "cpu", ("fp64",), multi_hot=True, max_rows=0)

    @property
    def unprepared(self) -> int:
        return 0

    def warm_up(self, max_rows: int) -> None:
        """One pass, which starts the threads of the linear algebra library. Nothing is kept for `max_rows`."""
        rows = min(max_rows, _BLOCK_ROWS)
        dense = np.zeros((rows, self._spec.n_dense), np.float32)
        self.logits(RaggedBatch(dense, np.zeros(rows * self._spec.n_sparse, np.int32)))

    def empty(self, rows: int) -> NDArray[np.float32]:
        return np.empty(rows, np.float32)

    def run(self, batch: RaggedBatch, scores: NDArray[np.float32]) -> None:
        """scores [rows] = sigmoid(logits)."""
        scores[:] = sigmoid(self.logits(batch))

    def logits(self, batch: RaggedBatch) -> Floats:
        """What goes into the last sigmoid. out [rows].

        bottom MLP -> x[:, 0]; pooled rows of table t -> x[:, 1 + t]; interaction; top MLP, its last layer without ReLU.
        """
        out = np.empty(batch.rows)
        shape = self._spec.architecture
        for block, dense, bags in self._blocks(batch):
            x = np.empty((len(dense), 1 + len(self._tables), shape.dim))
            x[:, 0] = relu_layers(dense.astype(np.float64), self._bottom)
            for t, (ids, lengths) in enumerate(bags):
                rows = lookup(self._tables[t], ids)
                x[:, 1 + t] = rows if lengths is None else pool(rows, lengths, shape.pooling)
            hidden = relu_layers(self._interaction(x), self._top)
            out[block] = (hidden @ self._last.weight.T)[:, 0] + self._last.bias
        return out

    def unload(self) -> None:
        self._tables, self._bottom, self._top = [], [], []

    def _blocks(self, batch: RaggedBatch) -> Iterator[tuple[slice, Floats, list[tuple[Ids, Ids | None]]]]:
        """Cut a batch into (rows, their dense features, and for each table its ids and bag lengths)."""
        ends = None if batch.lengths is None else np.cumsum(batch.lengths.sum(axis=1, dtype=np.int64))
        for start in range(0, batch.rows, _BLOCK_ROWS):
            block = slice(start, min(start + _BLOCK_ROWS, batch.rows))
            if batch.lengths is None or ends is None:
                ids = batch.ids.reshape(batch.rows, -1)[block]
                yield block, batch.dense[block], [(column, None) for column in ids.T]
            else:
                first = 0 if start == 0 else ends[start - 1]
                yield (
                    block,
                    batch.dense[block],
                    _by_table(batch.ids[first : ends[block.stop - 1]], batch.lengths[block]),
                )


@functools.cache
def _pairs(vectors: int) -> NDArray[np.intp]:
    """Where the pairs i > j stand in a flattened [vectors, vectors] matrix, in the order of `interact`."""
    i, j = np.tril_indices(vectors, k=-1)
    return i * vectors + j


def _by_table(ids: Ids, lengths: Ids) -> list[tuple[Ids, Ids | None]]:
    """Reorder bags from batch-major (row 0 table 0, row 0 table 1, ...) to (ids, lengths) of each table."""
    tables = lengths.shape[1]
    table_of_bag = np.tile(np.arange(tables, dtype=np.int16), len(lengths))
    order = np.argsort(np.repeat(table_of_bag, lengths.reshape(-1)), kind="stable")
    cuts = np.cumsum(lengths.sum(axis=0, dtype=np.int64))[:-1]
    return list(zip(np.split(ids[order], cuts), lengths.T, strict=True))


def _layers(tensors: Tensors, part: str, count: int) -> list[Layer]:
    both = ((tensors[f"{part}.{i}.weight"], tensors[f"{part}.{i}.bias"]) for i in range(count))
    return [Layer(weight.astype(np.float64), bias.astype(np.float64)) for weight, bias in both]


def _cross(tensors: Tensors, count: int) -> list[CrossLayer]:
    parts = ((tensors[f"cross.{i}.{kind}"].astype(np.float64) for kind in ("v", "w", "bias")) for i in range(count))
    return [CrossLayer(*layer) for layer in parts]


def _rows(tensors: Tensors, table: Table) -> Rows:
    return Rows(tensors[f"tables.{table.name}.weight"], tensors.get(f"tables.{table.name}.scale_bias"))
