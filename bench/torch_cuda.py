"""The torch family on CUDA: `narsil bench forward`'s part. Needs a GPU."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from narsil_stream.bench.forward import alternate, batches, check
from narsil_stream.bench.report import Row
from narsil_stream.kernels.artifact import Artifact
from narsil_stream.kernels.backend import RaggedBatch
from narsil_stream.kernels.torch_family.cuda import CudaBackend

_TOLERANCE = {"bf16": 2e-2, "fp16": 2e-3}
BASELINE = "fbgemm-graph"


def measure(model: Artifact, baseline: Any, sizes: tuple[int, ...], repeats: int) -> Iterator[Row]:
    """Graphs with their copies by the device's clock, against FBGEMM's graphs without copies; then whole calls."""
    for precision in _TOLERANCE:
        backend = CudaBackend(model, precision)
        backend.warm_up(max(sizes))
        check(f"torch {precision}", model, lambda batch, b=backend: _scores(b, batch), _TOLERANCE[precision])  # type: ignore[misc]
        for rows in sizes:
            given = batches(model.spec, rows)
            case = f"forward/torch/cuda/{precision}/{rows}"
            against, graph = alternate(repeats, baseline.graphs(given), _graph_us(backend, given))
            yield Row(case, "graph", graph, "us", BASELINE, against / graph)
            (run,) = alternate(repeats, _run_us(backend, given))
            yield Row(case, "run", run, "us")
            yield Row(case, "throughput", rows / run, "Mrows/s")
        backend.unload()


def _graph_us(backend: CudaBackend, given: list[RaggedBatch]) -> Callable[[], float]:
    def measure() -> float:
        total = 0.0
        for batch in given:
            filled = backend.fill(batch)
            start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record(backend.stream)
            backend.launch(filled)
            stop.record(backend.stream)
            stop.synchronize()
            total += float(start.elapsed_time(stop))
        return total * 1e3 / len(given)

    return measure


def _run_us(backend: CudaBackend, given: list[RaggedBatch]) -> Callable[[], float]:
    scores = np.empty(given[0].rows, np.float32)

    def measure() -> float:
        start = time.perf_counter()
        for batch in given:
            backend.run(batch, scores)
        return (time.perf_counter() - start) * 1e6 / len(given)

    return measure


def _scores(backend: CudaBackend, batch: RaggedBatch) -> Any:
    scores = np.empty(batch.rows, np.float32)
    backend.run(batch, scores)
    return scores
