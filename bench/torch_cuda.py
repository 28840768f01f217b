"""The torch family on CUDA: `narsil bench forward`'s part. Needs a GPU."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from narsil_stream.bench.forward import alternate, batches, check, scores_of, turns
from narsil_stream.bench.report import Row
from narsil_stream.kernels.artifact import Artifact
from narsil_stream.kernels.backend import RaggedBatch
from narsil_stream.kernels.torch_family.cuda import CudaBackend

_TOLERANCE = {"bf16": 2e-2, "fp16": 2e-3}
BASELINE = "fbgemm-graph"


def measure(model: Artifact, baseline: Any, sizes: tuple[int, ...], repeats: int) -> Iterator[Row]:
    """By the device's clock: `device` graphs without copies, as FBGEMM's; `graph` with them. `run`: whole calls."""
    for precision in _TOLERANCE:
        backend = CudaBackend(model, precision)
        backend.warm_up(max(sizes))
        for rows in sizes:
            given = batches(model.spec, rows)
            check(f"torch {precision}", model, lambda b, w=backend: scores_of(w, b), _TOLERANCE[precision], given[0])  # type: ignore[misc]
            case = f"forward/torch/cuda/{precision}/{rows}"
            ways = baseline.graphs(given), _device_us(backend, given), _graph_us(backend, given)
            against, device, graph = alternate(repeats, *ways)
            yield Row(case, "device", device, "us", BASELINE, against / device)
            yield Row(case, "graph", graph, "us", BASELINE, against / graph)
            (run,) = alternate(repeats, turns(backend, given, len(given)))
            yield Row(case, "run", run, "us")
            yield Row(case, "throughput", rows / run, "Mrows/s")
        backend.unload()


def _device_us(backend: CudaBackend, given: list[RaggedBatch]) -> Callable[[], float]:
    """A graph for each batch, whose inputs lie on the device: 64 in a row."""
    captured = []
    pool = torch.cuda.graph_pool_handle()
    with torch.inference_mode():
        for batch in given:
            packed = [torch.from_numpy(part).cuda() for part in backend.packed(batch)]
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=backend.stream):
                scores = torch.sigmoid(backend.forward(*packed))
            captured.append((graph, packed, scores))

    def measure() -> float:
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        with torch.cuda.stream(backend.stream):
            start.record()
            for graph, _, _ in captured:
                graph.replay()
            stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop)) * 1e3 / len(captured)

    return measure


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
