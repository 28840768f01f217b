"""How fast the families compute a forward pass: `narsil bench forward`.

The reference configuration: 26 tables x 100,000 rows x 64; bottom 13-512-256-64, top 415-512-512-256-1. Results are
compared with the reference before anything is timed, at every batch size. Ids rotate over 64 different batches in every
figure, on both sides alike; baseline and candidate alternate in one run, and the median of the repetitions counts.
`METRICS` says what is timed.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from narsil_stream.bench.report import Report, Row, machine
from narsil_stream.kernels import native, torch_family
from narsil_stream.kernels.artifact import Artifact
from narsil_stream.kernels.backend import RaggedBatch
from narsil_stream.kernels.init import criteo_spec, random_batch, random_model
from narsil_stream.kernels.quantize import quantize
from narsil_stream.kernels.reference import Reference, sigmoid
from narsil_stream.schemas.model import ModelSpec

BATCHES = 64
LATENCY_ROWS = (100, 1600)
THROUGHPUT_ROWS = (256, 1600, 4096, 8192, 16_384)
TOLERANCE = 2e-3
METRICS = {
    "run": "the Backend protocol's call, from ordinary arrays to scores in an ordinary array; packing included",
    "throughput": "rows a second of `run`; native: batches in flight on three lanes, with copies, packed before",
    "throughput-packed": "the same, packed in the timed loop, from a message's bytes to pinned memory, by the thread "
    "that launches, as in an executor",
    "device": "the computation alone: 64 batches back to back on one stream, inputs on the device, the device's clock",
    "copies": "one batch from pinned memory to scores in pinned memory, the host's clock",
    "copies-p99": "the same, 99th percentile",
    "graph": "a CUDA graph with its copies, the device's clock",
}
_CHECKED_ROWS = 512

Device = Literal["all", "cpu", "cuda"]


class Way(Protocol):
    """Something that scores: a backend, or a baseline."""

    def run(self, batch: RaggedBatch, scores: NDArray[np.float32]) -> None: ...


class WrongScores(AssertionError):
    """A family whose scores differ from the reference: it is not timed."""


def reference_model(table_rows: int = 100_000, seed: int = 1) -> Artifact:
    """The reference configuration with random weights and FP32 rows."""
    return random_model(criteo_spec(rows=table_rows, dim=64, bottom=(512, 256), top=(512, 512, 256)), seed)


def forward(model: Artifact, repeats: int = 15, device: Device = "all") -> Report:
    """Measure all families that this machine has on `device`. `model`: FP32 rows; INT8 rows are made of it."""
    absent: dict[str, str] = {}
    notes: dict[str, str] = {}
    small = quantize(model, "INT8")
    rows: list[Row] = []
    if device != "cuda":
        rows += _reference(small, max(3, repeats // 5))
        rows += _torch_cpu(model, small, repeats, absent, notes)
    if device != "cpu":
        rows += _cuda(small, repeats, absent)
    measured = {row.metric for row in rows}
    return Report(machine(), rows, absent, notes=notes | {k: v for k, v in METRICS.items() if k in measured})


def _torch_cpu(
    model: Artifact, small: Artifact, repeats: int, absent: dict[str, str], notes: dict[str, str]
) -> Iterator[Row]:
    try:
        torch_family.require_unit()
    except torch_family.Unavailable as error:
        absent["torch"] = absent["torchrec-eager"] = str(error)
        return
    from narsil_stream.bench import torch_cpu

    notes["torch/cpu"] = (
        f"{torch_cpu.threads()} threads on both sides; fp32: FP32 rows, as the baseline; others: INT8 rows"
    )
    yield from torch_cpu.measure(model, small, repeats, absent)


def _cuda(small: Artifact, repeats: int, absent: dict[str, str]) -> Iterator[Row]:
    """The families that compute on a GPU, each with FBGEMM's graph as baseline where torch is here too."""
    baseline = _fbgemm(small, absent)
    try:
        native.require_gpu()
    except native.Unavailable as error:
        absent["native"] = str(error)
    else:
        from narsil_stream.bench import native as own

        ways, lacking = own.ways(small)
        absent |= lacking
        yield from own.latency(small, ways, baseline, LATENCY_ROWS, repeats)
        yield from own.throughput(small, ways, THROUGHPUT_ROWS, repeats)
    if baseline is not None:
        from narsil_stream.bench import torch_cuda

        yield from torch_cuda.measure(small, baseline, LATENCY_ROWS, repeats)


def _fbgemm(small: Artifact, absent: dict[str, str]) -> Any:
    """The baseline on a GPU, None without one."""
    try:
        torch_family.require_unit()
        from narsil_stream.kernels.torch_family.devices import resolve

        resolve("cuda", "fp16")
    except torch_family.Unavailable as error:
        absent["torch on CUDA"] = absent["fbgemm-graph"] = str(error)
        return None
    from narsil_stream.bench.fbgemm import FbgemmDlrm

    baseline = FbgemmDlrm(small)
    check("fbgemm", small, baseline.scores)
    return baseline


def batches(spec: ModelSpec, rows: int, count: int = BATCHES) -> list[RaggedBatch]:
    """Different random batches; the same on every call."""
    return [random_batch(spec, rows, seed) for seed in range(count)]


def check(
    name: str,
    model: Artifact,
    score: Callable[[RaggedBatch], Any],
    tolerance: float = TOLERANCE,
    batch: RaggedBatch | None = None,
) -> None:
    """Raise WrongScores unless `score` gives the reference's scores, of a one-hot `batch` or of one that is made here.

    Of large batches 512 rows are compared, from the first to the last.
    """
    batch = batch or random_batch(model.spec, _CHECKED_ROWS, seed=99)
    rows = np.linspace(0, batch.rows - 1, min(batch.rows, _CHECKED_ROWS)).astype(int)
    asked = RaggedBatch(batch.dense[rows], batch.ids.reshape(batch.rows, -1)[rows].reshape(-1))
    apart = float(np.abs(score(batch)[rows] - sigmoid(Reference(model).logits(asked))).max())
    if not apart <= tolerance:
        raise WrongScores(
            f"{name}, {batch.rows} rows: scores differ from the reference by {apart:g}, more than {tolerance:g}"
        )


def scores_of(way: Way, batch: RaggedBatch) -> NDArray[np.float32]:
    scores = np.full(batch.rows, np.nan, np.float32)
    way.run(batch, scores)
    return scores


def turns(way: Way, given: list[RaggedBatch], count: int) -> Callable[[], float]:
    """A measure, µs a batch: `count` batches, the next ones in the next turn."""
    scores = np.empty(given[0].rows, np.float32)
    turning = itertools.cycle(given)

    def turn() -> float:
        start = time.perf_counter()
        for batch in itertools.islice(turning, count):
            way.run(batch, scores)
        return (time.perf_counter() - start) * 1e6 / count

    return turn


def alternate(repeats: int, *measures: Callable[[], float]) -> list[float]:
    """The median of each measure; all take turns, after one round that does not count."""
    for measure in measures:
        measure()
    taken = [[measure() for measure in measures] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*taken, strict=True)]


def _reference(model: Artifact, repeats: int) -> Iterator[Row]:
    backend = Reference(model)
    for rows in LATENCY_ROWS:
        given = batches(model.spec, rows)
        (value,) = alternate(repeats, turns(backend, given, -(-len(given) // repeats)))
        yield Row(f"forward/reference/cpu/{backend.info.precision}/{rows}", "run", value, "us")
