"""The torch family on the CPU against TorchRec's eager model on the same weights: `narsil bench forward`'s part."""

from collections.abc import Iterator

import torch

from narsil_stream.bench.forward import Way, alternate, batches, check, scores_of, turns
from narsil_stream.bench.report import Row
from narsil_stream.bench.torchrec_eager import TorchRecEager
from narsil_stream.kernels.artifact import Artifact
from narsil_stream.kernels.torch_family.cpu import CpuBackend
from narsil_stream.kernels.torch_family.devices import resolve
from narsil_stream.kernels.torch_family.unit import Unavailable

SIZES = (16, 100, 400, 1600, 4096)
BASELINE = "torchrec-eager"
_ROWS_A_TURN = 6400
"""Computed by each side before the other takes its turn."""
_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-3}
"""Against wrong results. How exact a precision is on trained weights: tests/kernels/test_parity.py."""


def threads() -> int:
    """What both sides compute with: as many as the process may use cores."""
    return int(torch.get_num_threads())


def measure(model: Artifact, small: Artifact, repeats: int, absent: dict[str, str]) -> Iterator[Row]:
    """FP32 with FP32 rows, the baseline's own precision, and what is faster with INT8 rows (`small`)."""
    ways: dict[str, tuple[Way, Artifact]] = {"baseline": (TorchRecEager(model), model)}
    for precision, rows in (("fp32", model), ("bf16", small), ("fp16", small)):
        try:
            resolve("cpu", precision)
        except Unavailable as error:
            absent[f"torch/cpu/{precision}"] = str(error)
            continue
        backend = CpuBackend(rows, precision)
        backend.warm_up(max(SIZES))
        ways[precision] = backend, rows
    for size in SIZES:
        given = batches(model.spec, size)
        for name, (way, rows) in ways.items():
            tolerance = _TOLERANCE.get(name, _TOLERANCE["fp32"])
            check(f"torch/cpu {name}", rows, lambda batch, w=way: scores_of(w, batch), tolerance, given[0])  # type: ignore[misc]
        count = max(-(-len(given) // repeats), min(len(given), _ROWS_A_TURN // size))
        values = alternate(repeats, *(turns(way, given, count) for way, _ in ways.values()))
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
