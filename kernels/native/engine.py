"""Batches on their way through one GPU: packed pinned slots, a graph for each bucket, several lanes at the same time.

A slot is the memory of one batch, pinned on the host and mirrored on the device. A lane is a stream. Slot i belongs to
lane i % lanes, so consecutive slots run side by side, and the copy of one overlaps the computation of another. Submit
slot k + 1 while k runs; wait for them in any order.

`run` comes from any threads, each takes free slots. Whoever uses slots by hand (`fill`, `submit`, `wait`) may do so in
several threads too, each with slots of its own, but not beside `run`. All other calls come alone.

Engines, and models of the torch family, share a GPU without waiting for each other: all work is on streams of the
engine's own, none of which waits for the default stream, and nothing waits for the whole device.
"""

import threading
from collections import deque
from typing import Any

import numpy as np
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from narsil_stream.kernels.artifact import Artifact
from narsil_stream.kernels.backend import IdOutOfRange, RaggedBatch
from narsil_stream.kernels.cutting import buckets, pieces
from narsil_stream.kernels.exclusive import ON_DEVICE
from narsil_stream.kernels.native.choose import choose
from narsil_stream.kernels.native.layout import HEADER_BYTES, Blob, pack, round_up
from narsil_stream.kernels.native.memory import Memory
from narsil_stream.kernels.native.plan import Inputs, Outputs
from narsil_stream.kernels.native.slots import Pool
from narsil_stream.kernels.native.source import load_module
from narsil_stream.kernels.native.tables import upload

Floats = NDArray[np.float32]
_IDS_A_BAG = 4
"""Of a multi-hot batch: memory taken at first. More ids make a slot's memory grow, and its graphs are captured anew."""


class Options(Struct, frozen=True):
    """How an engine runs. More lanes and slots: more batches at once, more memory."""

    precision: str = "fp16"
    """Of the MLPs and the interaction: fp16, bf16, tf32 or fp32."""
    max_rows: int = 4096
    """Of one batch; longer ones are cut."""
    lanes: int = 3
    slots: int = 0
    """0: one more than lanes."""
    kernels: str = "auto"
    """auto, fused (one kernel; Hopper, fp16, hidden widths up to 512) or layers (any)."""
    split: int = 0
    """Of the fused kernel: blocks that score the same rows. 0: by the bucket's size. 1: most rows a second. 4: lowest
    latency for up to 2048 rows."""
    direct_rows: int = 256
    """One-hot buckets up to this are not copied at all by the fused kernel: it reads them in the host's memory."""
    pull_bytes: int = 1 << 20
    """One-hot batches up to this size are copied by a kernel, larger ones by the copy engine."""
    copies: bool = True
    """False leaves the copy to the device out of the graphs: to measure computation alone."""
    buckets: tuple[int, ...] = ()
    """Batch sizes with a graph of their own, rising, the last max_rows. Empty: powers of two from 128."""


class Slot:
    """The memory of one batch. Fill it with `Engine.fill`, or in place through `dense` and `ids` after `begin`."""

    def __init__(self, engine: "Engine", index: int, stream: Any) -> None:
        import cupy

        self._engine, self.index, self.stream = engine, index, stream
        self.lane = index % engine.options.lanes
        self.graphs: dict[tuple[int, bool], Any] = {}
        self.rows = self.bucket = 0
        self.multi_hot = False
        self.event = cupy.cuda.Event(disable_timing=True)
        rows = engine.options.max_rows
        self._results = engine.memory.pinned(4 * rows + 64)
        results = np.frombuffer(self._results, np.int32, rows + 16)
        self.errors = results[:1]
        self._scores = results[16:].view(np.float32)
        self.logits = engine.memory.zeros(rows, np.float32)
        """[max_rows] FP32 on the device: what went into the sigmoid."""
        self._results_ptr = int(self._results.ptr)
        self.nbytes = 0
        self.reserve(engine.blob(rows, None).nbytes)

    def reserve(self, nbytes: int) -> None:
        """Take memory for packed batches of `nbytes`; graphs that were captured for the old memory go.

        What there was doubles at least: batches that grow little by little seldom pay for it.
        """
        if nbytes <= self.nbytes:
            return
        nbytes = round_up(max(nbytes, 2 * self.nbytes), 16)
        with ON_DEVICE:
            self.graphs.clear()
        self._pinned = self._engine.memory.pinned(nbytes)
        self.memory = np.frombuffer(self._pinned, np.uint8, nbytes)
        self.memory[:] = 0
        self.device = self._engine.memory.zeros(nbytes, np.uint8)
        self.nbytes = nbytes

    def begin(self, rows: int) -> tuple[Floats, NDArray[np.int32]]:
        """For a one-hot batch of `rows` rows: where its dense features [rows, n_dense] and ids [rows, n_sparse] go.

        Both are views of pinned memory, valid until the slot's next `begin` or `fill`. Not while the slot is in flight.
        """
        spec = self._engine.spec
        self.rows, self.bucket = rows, self._engine.bucket(rows)
        self.multi_hot, self.blob = False, self._engine.blob(self.bucket, None)
        self.memory[:4].view(np.int32)[0] = rows
        dense = self.memory[self.blob.dense :][: 4 * rows * spec.n_dense].view(np.float32)
        ids = self.memory[self.blob.ids :][: 4 * rows * spec.n_sparse].view(np.int32)
        return dense.reshape(rows, spec.n_dense), ids.reshape(rows, spec.n_sparse)

    def fill(self, batch: RaggedBatch) -> None:
        self.rows, self.bucket = batch.rows, self._engine.bucket(batch.rows)
        self.multi_hot = batch.lengths is not None
        self.blob = self._engine.blob(self.bucket, batch.ids.size if self.multi_hot else None)
        self.reserve(self.blob.nbytes)
        pack(self.memory, self.blob, batch)

    @property
    def scores(self) -> Floats:
        """[rows] of the last batch, pinned. Valid from `wait` until the slot is submitted again."""
        return self._scores[: self.rows]

    @property
    def outputs(self) -> Outputs:
        return Outputs(self._results_ptr + 64, int(self.logits.data.ptr), self._results_ptr)

    def inputs(self, blob: Blob, *, direct: bool = False) -> Inputs:
        """Where the device finds the parts of a batch: its own copy, or `direct` the host's pinned memory."""
        start = int(self._pinned.ptr if direct else self.device.data.ptr)
        offsets = start + blob.offsets if blob.offsets != blob.ids else 0
        return Inputs(start, start + blob.dense, start + blob.ids, offsets)

    def copy(self, nbytes: int, stream: Any = None) -> None:
        """Enqueue the copy of a packed batch to the device, by the copy engine, on the lane unless elsewhere."""
        import cupy

        runtime = cupy.cuda.runtime
        to = (stream or self.stream).ptr
        runtime.memcpyAsync(self.device.data.ptr, self._pinned.ptr, nbytes, runtime.memcpyHostToDevice, to)

    def pull(self, kernel: Any, nbytes: int, stream: Any) -> None:
        """Enqueue the same copy as the kernel of `pull.cu`."""
        words = -(-nbytes // 16)
        with stream:
            kernel((-(-words // 256),), (256,), (int(self._pinned.ptr), self.device, np.int32(words)))


class Engine:
    """One model on the current GPU."""

    def __init__(self, artifact: Artifact, options: Options) -> None:
        """Upload the model. Slots and graphs come with `warm_up`, or when a batch needs them.

        Raises `ValueError` for options that this GPU or model cannot satisfy, CompileError, CublasError.
        """
        import cupy

        self.spec, self.options = artifact.spec, options
        self.memory = Memory()
        self._tables = upload(artifact, self.memory)
        self.plan = choose(artifact, self._tables, options, self.memory)
        self._streams = [cupy.cuda.Stream(non_blocking=True) for _ in range(options.lanes)]
        self._pull = load_module("pull.cu", {}, f"sm_{cupy.cuda.Device().compute_capability}").get_function("pull")
        self._no_rows = self.memory.zeros(HEADER_BYTES, np.uint8)
        self._last: list[Slot | None] = [None] * options.lanes
        self.lock = threading.Lock()
        """Held for `_last` and while work is enqueued; never while the device is waited for."""
        self._preparing = threading.Lock()
        """Held while the plan is prepared and a graph is captured: others' batches run meanwhile."""
        self._capturing = cupy.cuda.Stream(non_blocking=True)
        """Graphs are captured here: what other threads enqueue on a lane must not get into one."""
        self.slots: list[Slot] = []
        self._pool = Pool(self.slots, options.lanes)
        self.recaptured = 0
        """Graphs captured because a live batch asked for them."""
        self.resize(options.max_rows)

    def resize(self, max_rows: int) -> None:
        """Hold batches of up to `max_rows` rows. Nothing may be in flight; slots are new and have no graphs."""
        if self.slots and max_rows == self.options.max_rows:
            return
        given = self.options.buckets
        self._buckets = given if given and given[-1] == max_rows else buckets(max_rows)
        self.options = replace(self.options, max_rows=max_rows)
        with ON_DEVICE:  # graphs and memory go here
            self._last = [None] * self.options.lanes
            self._pool = Pool([], self.options.lanes)
            self.slots.clear()
            self.plan.resize(max_rows)
            self.memory.release()
        count = self.options.slots or self.options.lanes + 1
        self.slots = [Slot(self, i, self._streams[i % len(self._streams)]) for i in range(count)]
        self._pool = Pool(self.slots, self.options.lanes)

    def bucket(self, rows: int) -> int:
        """The smallest bucket that holds `rows` rows."""
        return next(size for size in self._buckets if size >= rows)

    def blob(self, rows: int, n_ids: int | None) -> Blob:
        """Layout of a bucket: one-hot, or multi-hot with `n_ids` ids."""
        if n_ids is None:
            return Blob.one_hot(rows, self.spec.n_dense, self.spec.n_sparse)
        return Blob.multi_hot(rows, self.spec.n_dense, self.spec.n_sparse, n_ids)

    def warm_up(self, max_rows: int | None = None, *, multi_hot: bool = True) -> None:
        """Capture the graphs of all buckets up to the one that holds `max_rows`, for all slots, and run each once."""
        rows = self.options.max_rows if max_rows is None else min(max_rows, self.options.max_rows)
        largest = self.bucket(max(rows, 1))
        for slot in self.slots:
            if multi_hot:
                slot.reserve(self.blob(largest, largest * self.spec.n_sparse * _IDS_A_BAG).nbytes)
            for size in self._buckets[: self._buckets.index(largest) + 1]:
                for bags in (False, True) if multi_hot else (False,):
                    self._capture(slot, size, bags)
                    slot.fill(_empty(self.spec.n_dense, self.spec.n_sparse, bags))
                    slot.bucket = size
                    self.submit(slot)
                    self.wait(slot)
        self.recaptured = 0

    def submit(self, slot: Slot) -> None:
        """Enqueue the slot's batch: copy, compute, scores back into pinned memory. Returns at once."""
        graph = slot.graphs.get((slot.bucket, slot.multi_hot))
        captured = graph is None
        if graph is None:
            graph = self._capture(slot, slot.bucket, slot.multi_hot)
        slot.errors[0] = 0
        with self.lock:
            self.recaptured += captured
            if (before := self._last[slot.lane]) is not None:
                before.event.record(slot.stream)
            if slot.multi_hot:
                slot.copy(slot.blob.nbytes)
            graph.launch(slot.stream)
            self._last[slot.lane] = slot

    def wait(self, slot: Slot) -> Floats:
        """Block until the slot's batch is done and return its scores [rows], a view of the slot's pinned memory.

        Raises IdOutOfRange.
        """
        with self.lock:
            is_last = self._last[slot.lane] is slot
        if is_last:  # the last of its lane needs no event
            slot.stream.synchronize()
            with self.lock:
                if self._last[slot.lane] is slot:  # no other thread has submitted meanwhile
                    self._last[slot.lane] = None
        else:
            slot.event.synchronize()
        if table := int(slot.errors[0]):
            raise IdOutOfRange(f"an id is outside table {self.spec.tables[table - 1].name}")
        return slot.scores

    def cut(self, batch: RaggedBatch) -> list[RaggedBatch]:
        """Into pieces that fit a slot."""
        max_ids = self.options.max_rows * self.spec.n_sparse * _IDS_A_BAG
        return pieces(batch, self.options.max_rows, max_ids) if batch.rows else []

    def run(self, batch: RaggedBatch, scores: Floats) -> None:
        """Score a batch of any size into `scores` [rows], in pieces that overlap. Raises IdOutOfRange."""
        flying: deque[tuple[Slot, int]] = deque()
        failed: Exception | None = None

        def land() -> None:
            nonlocal failed
            slot, at = flying.popleft()
            try:
                scores[at : at + slot.rows] = self.wait(slot)
            except Exception as error:  # the others of this batch are waited for all the same
                failed = error
            finally:
                self._pool.give_back(slot)

        start = 0
        try:
            for piece in self.cut(batch):
                while (slot := self._pool.take(wait=not flying)) is None:
                    land()
                try:
                    slot.fill(piece)
                    self.submit(slot)
                except BaseException:
                    self._pool.give_back(slot)
                    raise
                flying.append((slot, start))
                start += piece.rows
        finally:
            while flying:
                land()
        if failed is not None:
            raise failed

    def close(self) -> None:
        """Wait for what is in flight and free the device's memory."""
        for stream in self._streams:
            stream.synchronize()
        with ON_DEVICE:  # graphs, machine code and memory go here, with the last reference to them
            self.slots.clear()
            self._last.clear()
            self.plan.close()
            del self.plan, self._tables, self._pool, self._pull, self._no_rows
            self.memory.release()

    def _capture(self, slot: Slot, size: int, multi_hot: bool) -> Any:
        """A graph for one slot and bucket. Multi-hot batches vary in length: their copy stays outside."""
        import cupy

        with self._preparing:
            self.plan.prepare(size, multi_hot, slot.lane, slot.stream)
            with ON_DEVICE:  # a first launch loads a kernel, which no capture may do
                self._enqueue(slot, slot.stream, size, multi_hot, idle=True)
            slot.stream.synchronize()
            with ON_DEVICE:
                self._capturing.begin_capture(cupy.cuda.runtime.streamCaptureModeThreadLocal)
                try:
                    self._enqueue(slot, self._capturing, size, multi_hot)
                finally:
                    graph = self._capturing.end_capture()
            graph.upload(slot.stream)
        slot.graphs[size, multi_hot] = graph
        return graph

    def _enqueue(self, slot: Slot, stream: Any, size: int, multi_hot: bool, *, idle: bool = False) -> None:
        """What scores the batch in the slot's memory, of up to `size` rows. `idle`: as if it had no rows at all."""
        blob = self.blob(size, 0 if multi_hot else None)
        copies = self.options.copies and not multi_hot
        direct = copies and self.plan.reads_inputs_once and size <= self.options.direct_rows
        if copies and not direct:
            if blob.nbytes <= self.options.pull_bytes:
                slot.pull(self._pull, blob.nbytes, stream)
            else:
                slot.copy(blob.nbytes, stream)
        given = slot.inputs(blob, direct=direct)
        if idle:
            given = given._replace(header=int(self._no_rows.data.ptr))
        self.plan.enqueue(stream, given, slot.outputs, size, slot.lane)


def _empty(n_dense: int, n_sparse: int, bags: bool) -> RaggedBatch:
    """One row to warm up with."""
    lengths = np.zeros((1, n_sparse), np.int32) if bags else None
    return RaggedBatch(np.zeros((1, n_dense), np.float32), np.zeros(0 if bags else n_sparse, np.int32), lengths)
