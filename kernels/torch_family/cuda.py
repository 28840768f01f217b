"""The torch family on CUDA: a graph for each bucket of rows, captured at warm-up on a stream of its own.

Everything that a graph touches was allocated before: pinned staging, its mirror on the device, the weights. All work of
a backend is on its stream, so CuPy or another torch model in the same process may use the same GPU meanwhile: nothing
here waits for the whole device.
"""

import contextlib
import threading
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from narsil_stream.kernels.artifact import Artifact
from narsil_stream.kernels.backend import PROTOCOL, BackendInfo, RaggedBatch
from narsil_stream.kernels.cutting import buckets, pieces
from narsil_stream.kernels.exclusive import ON_DEVICE
from narsil_stream.kernels.torch_family.devices import DTYPES
from narsil_stream.kernels.torch_family.network import Dot, Layer, Network, Operators
from narsil_stream.kernels.torch_family.packing import Packed, Packing
from narsil_stream.kernels.torch_family.unit import failures
from narsil_stream.schemas.compute import Capabilities
from narsil_stream.schemas.model import ModelSpec

LARGEST_ROWS = 65_536
"""Of any bucket: a longer batch is cut."""
_ALIGN = 8
"""Widths that are multiples of it go to the tensor cores in FP16 and BF16 as they are."""
_IDS_A_BAG = 4
"""Of a multi-hot batch, on average: memory taken for its ids. Batches with more are cut."""
_streams: list[Any] = []
"""Of models that are gone. torch has 32 streams and gives them out in turn, so that one that came and went often would
share a stream with one that stayed: its captures would then record what the other enqueues."""


class Staging(NamedTuple):
    """A batch's memory on the host, pinned, and on the device."""

    host: Packed
    """Views of the pinned tensors."""
    pinned: tuple[Any, Any, Any]
    device: tuple[Any, Any, Any]
    scores: Any
    """[rows] FP32, pinned."""


class Filled(NamedTuple):
    """A batch in the staging memory."""

    rows: int
    """Of its bucket."""
    ids: int | None
    """Multi-hot: how many."""


class CudaBackend:
    """One model on the current GPU, one batch at a time: threads that come together wait for each other."""

    def __init__(self, artifact: Artifact, precision: str) -> None:
        self._spec, self._precision = artifact.spec, precision
        self._packing = Packing(artifact.spec, _ALIGN)
        self.stream = _streams.pop() if _streams else torch.cuda.Stream()
        self._buckets: tuple[int, ...] = ()
        self._graphs: dict[tuple[int, bool], Any] = {}
        self.eager = 0
        """Pieces of batches that no graph was there for."""
        self._eager_before = 0
        self._lock = threading.Lock()
        """There is one staging memory."""
        with torch.cuda.stream(self.stream):
            self._network = Network(artifact, self._packing, DTYPES[precision], "cuda", Operators(_layer, _dot))
        self.stream.synchronize()

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    @property
    def info(self) -> BackendInfo:
        return BackendInfo("torch", torch.cuda.get_device_name(), self._precision)

    @property
    def capabilities(self) -> Capabilities:
        rows = self._buckets[-1] if self._buckets else LARGEST_ROWS
        return Capabilities(PROTOCOL, "cuda", tuple(DTYPES), multi_hot=True, max_rows=rows)

    @property
    def unprepared(self) -> int:
        return self.eager - self._eager_before

    def warm_up(self, max_rows: int) -> None:
        """Capture a graph for each bucket up to `max_rows` rows, one-hot and multi-hot. Longer batches are cut."""
        rows = min(max_rows, LARGEST_ROWS)
        try:
            with failures(f"warm up for {rows:,} rows on {self.info.device}"):
                self._prepare(rows)
        except BaseException:
            with contextlib.suppress(RuntimeError):  # of a device that is lost
                self.unload()
            raise
        self._eager_before = self.eager

    def _prepare(self, max_rows: int) -> None:
        self._graphs.clear()
        self._buckets = tuple(buckets(max_rows))
        self._staging = self._allocate(self._buckets[-1])
        pool = torch.cuda.graph_pool_handle()
        for rows in reversed(self._buckets):  # the largest first: smaller ones find room in its memory
            for multi_hot in (False, True):
                self._graphs[rows, multi_hot] = self._capture(rows, multi_hot, pool)

    def empty(self, rows: int) -> NDArray[np.float32]:
        memory: NDArray[np.float32] = torch.empty(rows, pin_memory=True).numpy()
        return memory

    def run(self, batch: RaggedBatch, scores: NDArray[np.float32]) -> None:
        """Score a batch of any size into `scores` [rows]. Raises IdOutOfRange."""
        with self._lock:
            self._run(batch, scores)

    def _run(self, batch: RaggedBatch, scores: NDArray[np.float32]) -> None:
        start = 0
        most_rows = self._buckets[-1] if self._buckets else LARGEST_ROWS
        for piece in pieces(batch, most_rows, self._most_ids(most_rows)) if batch.rows else []:
            part = scores[start : start + piece.rows]
            if self._buckets and piece.ids.size <= self._most_ids(most_rows):
                self._run_graph(piece, part)
            else:
                self._run_eagerly(piece, part)
            start += piece.rows

    def logits(self, batch: RaggedBatch) -> NDArray[np.float32]:
        """What goes into the last sigmoid, computed without a graph. out [rows]."""
        with torch.inference_mode(), torch.cuda.stream(self.stream):
            on_device = [torch.from_numpy(part).cuda() for part in self.packed(batch)]
            found: NDArray[np.float32] = self.forward(*on_device).cpu().numpy()
        return found

    def packed(self, batch: RaggedBatch) -> Packed:
        """What `forward` takes, on the host."""
        return self._packing.pack(batch, batch.rows)

    def forward(self, dense: Any, values: Any, offsets: Any) -> Any:
        """Logits [rows] FP32 on the device, enqueued on the current stream."""
        return self._network.logits(dense, values, offsets)

    def unload(self) -> None:
        self.stream.synchronize()
        with ON_DEVICE:
            self._graphs.clear()
            for held in ("_network", "_staging"):
                vars(self).pop(held, None)
            torch.cuda.empty_cache()
        if self.stream not in _streams:
            _streams.append(self.stream)

    def fill(self, batch: RaggedBatch) -> Filled:
        """Pack a batch, which fits the largest bucket, into the staging memory. Raises IdOutOfRange."""
        rows = next(size for size in self._buckets if size >= batch.rows)
        packed = self._packing.pack(batch, rows, self._staging.host)
        return Filled(rows, None if batch.lengths is None else len(packed.values))

    def launch(self, filled: Filled) -> None:
        """Enqueue what scores the batch in the staging memory. Returns at once."""
        with torch.cuda.stream(self.stream):
            if filled.ids is not None:  # their number varies: this copy cannot be in the graph
                here, there = self._staging.pinned[1], self._staging.device[1]
                there[: filled.ids].copy_(here[: filled.ids], non_blocking=True)
            self._graphs[filled.rows, filled.ids is not None].replay()

    def _run_graph(self, batch: RaggedBatch, scores: NDArray[np.float32]) -> None:
        self.launch(self.fill(batch))
        self.stream.synchronize()
        scores[:] = self._staging.scores[: batch.rows].numpy()

    def _run_eagerly(self, batch: RaggedBatch, scores: NDArray[np.float32]) -> None:
        self.eager += 1
        scores[:] = torch.from_numpy(self.logits(batch)).sigmoid().numpy()

    def _capture(self, rows: int, multi_hot: bool, pool: Any) -> Any:
        """`torch.cuda.graph` would wait for the whole device first, which another model keeps busy."""
        with torch.inference_mode(), torch.cuda.stream(self.stream):
            fixed = None if multi_hot else torch.from_numpy(self._packing.one_hot_offsets(rows)).cuda()
            self._enqueue(rows, fixed)  # libraries choose and allocate in a first run
            self.stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with ON_DEVICE:
                graph.capture_begin(pool=pool, capture_error_mode="thread_local")
                try:
                    self._enqueue(rows, fixed)
                finally:
                    graph.capture_end()
        return _Graph(graph, fixed)

    def _enqueue(self, rows: int, fixed_offsets: Any) -> None:
        """Copy in, compute, copy scores out, for a batch in the staging memory. `fixed_offsets` None: multi-hot."""
        (dense_host, values_host, offsets_host), (dense, values, offsets) = self._staging.pinned, self._staging.device
        dense[:rows].copy_(dense_host[:rows], non_blocking=True)
        if fixed_offsets is None:
            bags = rows * self._packing.vectors + 1
            offsets[:bags].copy_(offsets_host[:bags], non_blocking=True)
            logits = self.forward(dense[:rows], values, offsets[:bags])
        else:
            ids = rows * self._spec.n_sparse
            values[:ids].copy_(values_host[:ids], non_blocking=True)
            logits = self.forward(dense[:rows], values[:ids], fixed_offsets)
        self._staging.scores[:rows].copy_(torch.sigmoid(logits), non_blocking=True)

    def _most_ids(self, rows: int) -> int:
        return rows * self._spec.n_sparse * _IDS_A_BAG

    def _allocate(self, rows: int) -> Staging:
        room = self._packing.room(rows, self._most_ids(rows))
        dense, values, offsets = pinned = tuple(torch.from_numpy(part).pin_memory() for part in room)
        host = Packed(dense.numpy(), values.numpy(), offsets.numpy())
        with torch.cuda.stream(self.stream):
            device = dense.cuda(), values.cuda(), offsets.cuda()
        self.stream.synchronize()
        return Staging(host, pinned, device, torch.zeros(rows).pin_memory())


class _Graph(NamedTuple):
    """A captured graph, and what it reads besides the staging memory: kept alive."""

    graph: Any
    offsets: Any

    def replay(self) -> None:
        self.graph.replay()


def _layer(weight: Any, bias: Any, *, relu: bool) -> Layer:
    """cuBLASLt's product with bias and ReLU in one launch."""
    turned = weight.t()
    if bias is None:
        return lambda x: torch.mm(x, turned)
    if relu:
        return lambda x: torch._addmm_activation(bias, x, turned)
    return lambda x: torch.addmm(bias, x, turned)


def _dot(used: int, packing: Packing) -> Dot:
    """All products in one launch, the chosen ones in another."""
    i, j = torch.tril_indices(used, used, offset=-1, device="cuda")
    pairs = i * packing.vectors + j
    return lambda x: [torch.bmm(x, x.transpose(1, 2)).flatten(1).index_select(1, pairs)]
