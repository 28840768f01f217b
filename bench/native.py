"""The native engine's part of `narsil bench forward`. Needs a GPU."""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from narsil_stream.bench.forward import BATCHES, alternate, batches, check, scores_of
from narsil_stream.bench.report import Row
from narsil_stream.kernels.artifact import Artifact
from narsil_stream.kernels.backend import RaggedBatch
from narsil_stream.kernels.native.engine import Engine, Options
from narsil_stream.schemas.model import ModelSpec

WAYS: dict[str, dict[str, Any]] = {
    "fused": {"kernels": "fused"},
    "fused-split1": {"kernels": "fused", "split": 1},
    "layers": {"kernels": "layers"},
}
"""Ways to compute, as options of an engine: the fused kernel as it chooses itself; with one block for each 64 rows,
which gives most rows a second; kernels around cuBLASLt."""
_EAGER_ROWS = 1600


class Message(NamedTuple):
    """What an executor gets of a one-hot batch."""

    dense: bytes
    ids: bytes

    def batch(self, spec: ModelSpec) -> RaggedBatch:
        """Views of the bytes."""
        dense = np.frombuffer(self.dense, np.float32).reshape(-1, spec.n_dense)
        return RaggedBatch(dense, np.frombuffer(self.ids, np.int32))


def ways(model: Artifact) -> tuple[list[str], dict[str, str]]:
    """Those that this GPU has, their scores checked, and why it lacks the others."""
    found, absent = [], {}
    for way, options in WAYS.items():
        try:
            engine = Engine(model, Options(max_rows=4096, lanes=1, **options))
        except ValueError as error:
            absent[f"native {way}"] = str(error)
            continue
        check(f"native {way}", model, lambda batch, e=engine: scores_of(e, batch))  # type: ignore[misc]
        engine.close()
        found.append(way)
    return found, absent


def latency(model: Artifact, found: list[str], baseline: Any, sizes: tuple[int, ...], repeats: int) -> Iterator[Row]:
    """One batch at a time: the computation alone, and with copies. `baseline`: FbgemmDlrm or None."""
    for rows in sizes:
        given = batches(model.spec, rows)
        named: dict[str, Callable[[], float]] = {}
        if baseline is not None:
            named["fbgemm-graph"] = baseline.graphs(given)
            if rows == _EAGER_ROWS:
                named["fbgemm-eager"] = baseline.eager(given)
        engines = {way: _engine(model, rows, given, lanes=1, copies=False, **WAYS[way]) for way in found}
        named |= {way: _device_us(engine) for way, engine in engines.items()}
        values = dict(zip(named, alternate(repeats, *named.values()), strict=True))
        against = values.get("fbgemm-graph")
        for name, value in values.items():
            family = "torch" if name.startswith("fbgemm") else "native"
            case = f"forward/{family}/cuda/fp16/{rows}/{name}"
            if against is None or name == "fbgemm-graph":
                yield Row(case, "device", value, "us")
            else:
                yield Row(case, "device", value, "us", "fbgemm-graph", against / value)
        for engine in engines.values():
            engine.close()
        for way in found:
            engine = _engine(model, rows, given, lanes=1, **WAYS[way])
            case = f"forward/native/cuda/fp16/{rows}/{way}"
            times = _host_us(engine, repeats)
            yield Row(case, "copies", float(np.median(times)), "us")
            yield Row(case, "copies-p99", float(np.percentile(times, 99)), "us")
            yield Row(case, "run", float(np.median(_run_us(engine, given, repeats))), "us")
            engine.close()


def throughput(model: Artifact, found: list[str], sizes: tuple[int, ...], repeats: int) -> Iterator[Row]:
    """Batches in flight on three lanes, with copies: packed before the clock starts, and packed while it runs."""
    for rows in sizes:
        given = batches(model.spec, rows)
        messages = [Message(batch.dense.tobytes(), batch.ids.tobytes()) for batch in given]
        for way in found:
            engine = _engine(model, rows, given, lanes=3, **WAYS[way])
            ready, packed = alternate(
                max(5, repeats // 3),
                lambda e=engine: _stream(e),  # type: ignore[misc]
                lambda e=engine, m=messages: _stream(e, m),  # type: ignore[misc]
            )
            case = f"forward/native/cuda/fp16/{rows}/{way}"
            yield Row(case, "throughput", ready, "Mrows/s")
            yield Row(case, "throughput-packed", packed, "Mrows/s")
            engine.close()


def _engine(model: Artifact, rows: int, given: list[RaggedBatch], **options: Any) -> Engine:
    """An engine with one bucket and a slot for each batch, filled and run once, the first one's scores checked."""
    engine = Engine(model, Options(max_rows=rows, buckets=(rows,), slots=len(given), **options))
    engine.warm_up(multi_hot=False)
    for slot, batch in zip(engine.slots, given, strict=True):
        slot.fill(batch)
        slot.copy(slot.blob.nbytes)
        engine.submit(slot)
        engine.wait(slot)
    check(f"native {options}", model, lambda batch: engine.slots[0].scores, batch=given[0])
    return engine


def _device_us(engine: Engine) -> Callable[[], float]:
    """µs a batch: all slots back to back on one stream, between two events."""
    import cupy

    stream = engine.slots[0].stream
    graphs = [slot.graphs[slot.bucket, False] for slot in engine.slots]

    def measure() -> float:
        stream.synchronize()
        start, stop = cupy.cuda.Event(), cupy.cuda.Event()
        start.record(stream)
        for graph in graphs:
            graph.launch(stream)
        stop.record(stream)
        stop.synchronize()
        return float(cupy.cuda.get_elapsed_time(start, stop)) * 1e3 / len(graphs)

    return measure


def _host_us(engine: Engine, repeats: int) -> list[float]:
    """From submit to the end of wait, one batch at a time; the first round does not count."""
    times = []
    for round_ in range(repeats + 1):
        for slot in engine.slots:
            start = time.perf_counter()
            engine.submit(slot)
            engine.wait(slot)
            if round_:
                times.append((time.perf_counter() - start) * 1e6)
    return times


def _run_us(engine: Engine, given: list[RaggedBatch], repeats: int) -> list[float]:
    """The whole call from ordinary arrays, packing included."""
    scores = np.empty(given[0].rows, np.float32)
    times = []
    for _ in range(repeats):
        for batch in given:
            start = time.perf_counter()
            engine.run(batch, scores)
            times.append((time.perf_counter() - start) * 1e6)
    return times[len(given) :]


def _stream(engine: Engine, messages: list[Message] | None = None) -> float:
    """M rows a second: every slot in turn, two batches of each lane submitted before the oldest is waited for.

    `messages`: packed into the slots meanwhile; without, slots hold their batches already.
    """
    rows, slots = engine.options.max_rows, engine.slots
    depth = 2 * engine.options.lanes
    total = 4 * BATCHES
    start = time.perf_counter()
    for k in range(total + depth):
        if k >= depth:
            engine.wait(slots[(k - depth) % len(slots)])
        if k < total:
            slot = slots[k % len(slots)]
            if messages:
                slot.fill(messages[k % len(messages)].batch(engine.spec))
            engine.submit(slot)
    return total * rows / (time.perf_counter() - start) / 1e6
