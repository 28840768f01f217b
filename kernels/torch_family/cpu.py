"""The torch family on the CPU: rows in pieces, each computed by one thread from lookup to score.

Pieces share nothing, so no thread waits for another inside the forward pass, and what a piece needs stays near the core
that computes it. oneDNN multiplies with weights packed once.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from narsil_stream.kernels.artifact import Artifact
from narsil_stream.kernels.backend import PROTOCOL, BackendInfo, RaggedBatch
from narsil_stream.kernels.cutting import pieces
from narsil_stream.kernels.torch_family.devices import DTYPES, multiplied
from narsil_stream.kernels.torch_family.network import Dot, Layer, Network, Operators
from narsil_stream.kernels.torch_family.packing import Packing
from narsil_stream.kernels.torch_family.unit import failures
from narsil_stream.schemas.compute import Capabilities
from narsil_stream.schemas.model import ModelSpec

T = TypeVar("T")
Floats = NDArray[np.float32]

_PIECE_ROWS = 1024
"""At most. More: fewer calls; less: less memory."""
_SHARE_ROWS = 200
"""For each thread beyond the second: all of them meet at Python's lock between two operators."""
_SECOND_ROWS = 128
"""Fewer rows are not worth a second thread."""
_STEP_ROWS = 16
"""Pieces are padded to multiples: oneDNN prepares code for each number of rows, once."""
_NUMPY_MACS = 2**17
"""Of a row's products. More of them are no faster in NumPy, and from 2^18 on its BLAS takes threads of its own."""


class CpuBackend:
    """One model in threads of its own, each of which computes by itself."""

    def __init__(self, artifact: Artifact, precision: str, threads: int = 0) -> None:
        """`threads` 0: as many as torch has now."""
        self._spec, self._precision = artifact.spec, precision
        self._packing = Packing(artifact.spec)
        self._network = Network(artifact, self._packing, DTYPES[precision], "cpu", Operators(_layer, _dot))
        self._threads = threads or torch.get_num_threads()
        self._pool = _single_threads(self._threads) if self._threads > 1 else None

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    @property
    def info(self) -> BackendInfo:
        return BackendInfo("torch", "cpu", self._precision)

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(PROTOCOL, "cpu", multiplied(), multi_hot=True, max_rows=0)

    @property
    def unprepared(self) -> int:
        return 0

    def warm_up(self, max_rows: int) -> None:
        """Compute every number of rows that a piece can have, once: oneDNN prepares what it needs for each."""
        one = RaggedBatch(np.zeros((1, self._spec.n_dense), np.float32), np.zeros(self._spec.n_sparse, np.int32))
        sizes = range(_STEP_ROWS, _round_up(min(max_rows, _PIECE_ROWS)) + 1, _STEP_ROWS)
        try:
            with failures(f"warm up for {max_rows:,} rows"):
                self._each(lambda rows: self._logits(one, rows), sizes)
        except BaseException:
            self.unload()
            raise

    def empty(self, rows: int) -> Floats:
        return np.empty(rows, np.float32)

    def run(self, batch: RaggedBatch, scores: Floats) -> None:
        """scores [rows] = sigmoid(logits). Raises IdOutOfRange."""
        torch.sigmoid(torch.from_numpy(self.logits(batch)), out=torch.from_numpy(scores))

    def logits(self, batch: RaggedBatch) -> Floats:
        """What goes into the last sigmoid. out [rows]."""
        if not batch.rows:
            return np.empty(0, np.float32)
        cut = pieces(batch, _piece_rows(batch.rows, self._threads), max_ids=np.iinfo(np.int32).max)
        return np.concatenate(self._each(lambda piece: self._logits(piece, _round_up(piece.rows))[: piece.rows], cut))

    def unload(self) -> None:
        if self._pool:
            self._pool.shutdown()
        vars(self).pop("_network", None)

    def _each(self, compute: Callable[[T], Floats], parts: Sequence[T]) -> list[Floats]:
        """In threads of ours; one part in the caller's, if that computes by itself too: handing over has its price."""
        if not self._pool or (len(parts) == 1 and torch.get_num_threads() == 1):
            return list(map(compute, parts))
        return list(self._pool.map(compute, parts))

    def _logits(self, batch: RaggedBatch, rows: int) -> Floats:
        packed = self._packing.pack(batch, rows)
        with torch.inference_mode():
            found: Floats = self._network.logits(*map(torch.from_numpy, packed)).numpy()
        return found


def _piece_rows(rows: int, threads: int) -> int:
    """Of equal pieces, as many for each thread: a short one at the end costs more than its share."""
    shares = min(threads, max(rows // _SHARE_ROWS, 2 if rows >= _SECOND_ROWS else 1))
    count = shares * -(-rows // (shares * _PIECE_ROWS))
    return _round_up(-(-rows // count))


def _single_threads(count: int) -> ThreadPoolExecutor:
    """Threads in which a torch operator takes no other thread. Elsewhere torch keeps the number that it had."""
    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(count, "narsil-torch", _alone)
    together = Barrier(count)
    list(pool.map(lambda _: together.wait(), range(count)))  # all have started: the setting is torch's default as well
    torch.set_num_threads(before)
    return pool


def _alone() -> None:
    """Make this thread compute by itself. torch gives a thread its default when that first asks for a number of threads
    or computes, whatever was set before: so it has to ask first."""
    torch.get_num_threads()
    torch.set_num_threads(1)


def _layer(weight: Any, bias: Any, *, relu: bool) -> Layer:
    """oneDNN's product with packed weights and ReLU in one call, where torch was built with it."""
    if not torch.backends.mkldnn.is_available():
        linear = torch.nn.functional.linear
        return lambda x: linear(x, weight, bias).relu_() if relu else linear(x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
    multiply, attribute = torch.ops.mkldnn._linear_pointwise, "relu" if relu else "none"
    return lambda x: multiply(x, packed, bias, attribute, [], "")


def _dot(used: int, packing: Packing) -> Dot:
    """Small products in FP32 by NumPy, whose BLAS is built for them: twice as fast as torch's.

    Of all vectors but the first with all but the last, so that BLAS does not see a symmetric product, which it computes
    in a slower way. Copies of whole pieces of the triangle are four times as fast as a gather.
    """

    def dot(x: Any) -> list[Any]:
        if x.dtype == torch.float32 and (used - 1) ** 2 * x.shape[2] <= _NUMPY_MACS:
            vectors = x.numpy()
            products = torch.from_numpy(np.matmul(vectors[:, 1:used], vectors[:, : used - 1].transpose(0, 2, 1)))
        else:
            products = torch.bmm(x, x.transpose(1, 2))[:, 1:]
        return [products[:, i, : i + 1] for i in range(used - 1)]

    return dot


def _round_up(rows: int) -> int:
    return -(-rows // _STEP_ROWS) * _STEP_ROWS
