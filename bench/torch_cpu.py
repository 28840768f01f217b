"""The torch family on the CPU against TorchRec's eager model on the same weights: `narsil bench forward`'s part."""

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from narsil_stream.bench.forward import alternate, batches, check
from narsil_stream.bench.report import Row
from narsil_stream.bench.torchrec_eager import TorchRecEager
from narsil_stream.kernels.artifact import Artifact
from narsil_stream.kernels.backend import RaggedBatch
from narsil_stream.kernels.torch_family.cpu import CpuBackend
from narsil_stream.kernels.torch_family.devices import resolve
from narsil_stream.kernels.torch_family.unit import Unavailable

SIZES = (16, 100, 400, 1600, 4096)
BASELINE = "torchrec-eager"
_ROWS_A_TURN = 6400
"""Computed by each side before the other takes its turn."""
_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-3}
"""Against wrong results. How exact a precision is on trained weights: tests/kernels/test_parity.py."""


class _Way(Protocol):
    def run(self, batch: RaggedBatch, scores: NDArray[np.float32]) -> None: ...


def measure(model: Artifact, small: Artifact, repeats: int, absent: dict[str, str]) -> Iterator[Row]:
    """FP32 with FP32 rows, the baseline's own precision, and what is faster with INT8 rows (`small`)."""
    ways: dict[str, _Way] = {"baseline": TorchRecEager(model)}
    check(BASELINE, model, lambda batch: _scores(ways["baseline"], batch), _TOLERANCE["fp32"])
    for precision, rows in (("fp32", model), ("bf16", small), ("fp16", small)):
        try:
            resolve("cpu", precision)
        except Unavailable as error:
            absent[f"torch/cpu/{precision}"] = str(error)
            continue
        backend = CpuBackend(rows, precision)
        backend.warm_up(max(SIZES))
        check(f"torch {precision}", rows, lambda batch, b=backend: _scores(b, batch), _TOLERANCE[precision])  # type: ignore[misc]
        ways[precision] = backend
    for size in SIZES:
        given = batches(model.spec, size)
        values = alternate(repeats, *(_turns(way, given) for way in ways.values()))
        yield from _rows(size, dict(zip(ways, values, strict=True)))


def _rows(size: int, values: dict[str, float]) -> Iterator[Row]:
    """`values`: µs a batch."""
    against = values.pop("baseline")
    case = f"forward/{BASELINE}/cpu/fp32/{size}"
    yield Row(case, "run", against, "us")
    yield Row(case, "throughput", size / against, "Mrows/s")
    for precision, value in values.items():
        case = f"forward/torch/cpu/{precision}/{size}"
        yield Row(case, "run", value, "us", BASELINE, against / value)
        yield Row(case, "throughput", size / value, "Mrows/s", BASELINE, against / value)


def _turns(way: _Way, given: list[RaggedBatch]) -> Callable[[], float]:
    """µs a batch, over some of the batches, the next ones in the next turn."""
    scores = np.empty(given[0].rows, np.float32)
    count = max(1, _ROWS_A_TURN // given[0].rows)
    turning = itertools.cycle(given)

    def turn() -> float:
        start = time.perf_counter()
        for batch in itertools.islice(turning, count):
            way.run(batch, scores)
        return (time.perf_counter() - start) * 1e6 / count

    return turn


def _scores(way: _Way, batch: RaggedBatch) -> NDArray[np.float32]:
    scores = np.empty(batch.rows, np.float32)
    way.run(batch, scores)
    return scores
