"""How fast the families compute a forward pass: `narsil bench forward`, or `python -m narsil_stream.bench.forward`.

The reference configuration: 26 tables x 100,000 rows x 64, INT8; bottom 13-512-256-64, top 415-512-512-256-1. Results
are compared with the reference before anything is timed. Ids rotate over 64 different batches in every figure, on both
sides alike; baseline and candidate alternate in one run, and the median of the repetitions counts.

What is timed: `device` the computation alone, 64 batches back to back on one stream, inputs on the device; `copies` one
batch from pinned memory to scores in pinned memory, by the host's clock; `throughput` batches in flight on three lanes,
with copies; `run` the Backend protocol's call from ordinary arrays.
"""

import argparse
import importlib.util
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct

from narsil_stream.kernels.artifact import Artifact
from narsil_stream.kernels.backend import RaggedBatch
from narsil_stream.kernels.init import criteo_spec, random_batch, random_model
from narsil_stream.kernels.native import Unavailable, require_gpu
from narsil_stream.kernels.reference import Reference, sigmoid
from narsil_stream.schemas.model import ModelSpec

BATCHES = 64
LATENCY_ROWS = (100, 1600)
THROUGHPUT_ROWS = (256, 1600, 4096, 8192, 16_384)
TOLERANCE = 2e-3
_CHECKED_ROWS = 512


class Row(Struct, frozen=True):
    """One figure. `ratio`: how many times better than `baseline`, more is better."""

    case: str
    """forward/family/device/precision/rows[/variant]"""
    metric: str
    value: float
    unit: str
    baseline: str | None = None
    ratio: float | None = None


class Report(Struct, frozen=True):
    about: dict[str, str]
    rows: list[Row]
    absent: dict[str, str]
    """Families and baselines that this machine lacks, and why."""


class WrongScores(AssertionError):
    """A family whose scores differ from the reference: it is not timed."""


def reference_model(table_rows: int = 100_000, seed: int = 1) -> Artifact:
    """The reference configuration with random weights and INT8 rows."""
    spec = criteo_spec(rows=table_rows, dim=64, bottom=(512, 256), top=(512, 512, 256))
    tables = tuple(msgspec.structs.replace(table, dtype="INT8") for table in spec.tables)
    return random_model(msgspec.structs.replace(spec, tables=tables), seed)


def forward(model: Artifact, repeats: int = 15) -> Report:
    """Measure all families that this machine has."""
    rows: list[Row] = []
    absent: dict[str, str] = {}
    rows += _reference(model, max(3, repeats // 5))
    try:
        require_gpu()
    except Unavailable as error:
        absent["native"] = str(error)
        return Report(_about(None), rows, absent)
    baseline, why = _baseline(model)
    if why:
        absent["fbgemm"] = why
    from narsil_stream.bench import native

    ways, lacking = native.ways(model)
    absent |= lacking
    rows += native.latency(model, ways, baseline, LATENCY_ROWS, repeats)
    rows += native.throughput(model, ways, THROUGHPUT_ROWS, repeats)
    return Report(_about(_gpu()), rows, absent)


def batches(spec: ModelSpec, rows: int, count: int = BATCHES) -> list[RaggedBatch]:
    """Different random batches; the same on every call."""
    return [random_batch(spec, rows, seed) for seed in range(count)]


def check(name: str, model: Artifact, score: Callable[[RaggedBatch], Any]) -> None:
    """Raise WrongScores unless `score` gives the reference's scores."""
    batch = random_batch(model.spec, _CHECKED_ROWS, seed=99)
    apart = float(np.abs(score(batch) - sigmoid(Reference(model).logits(batch))).max())
    if not apart <= TOLERANCE:
        raise WrongScores(f"{name}: scores differ from the reference by {apart:g}, more than {TOLERANCE:g}")


def alternate(repeats: int, *measures: Callable[[], float]) -> list[float]:
    """The median of each measure; all take turns, after one round that does not count."""
    for measure in measures:
        measure()
    taken = [[measure() for measure in measures] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*taken, strict=True)]


def _reference(model: Artifact, repeats: int) -> Iterator[Row]:
    backend = Reference(model)
    for rows in LATENCY_ROWS:
        given = batches(model.spec, rows, 4)  # far larger than a core's cache as it is
        scores = np.empty(rows, np.float32)

        def once(given: list[RaggedBatch] = given, scores: Any = scores) -> float:
            start = time.perf_counter()
            for batch in given:
                backend.run(batch, scores)
            return (time.perf_counter() - start) * 1e6 / len(given)

        (value,) = alternate(repeats, once)
        yield Row(f"forward/reference/cpu/{backend.info.precision}/{rows}", "run", value, "us")


def _baseline(model: Artifact) -> tuple[Any, str]:
    for module in ("torch", "fbgemm_gpu"):
        if importlib.util.find_spec(module) is None:
            return None, f"no module {module}"
    from narsil_stream.bench.fbgemm import FbgemmDlrm

    baseline = FbgemmDlrm(model)
    check("fbgemm", model, baseline.scores)
    return baseline, ""


def _gpu() -> Any:
    import cupy

    return cupy.cuda.runtime.getDeviceProperties(0)


def _about(gpu: Any) -> dict[str, str]:
    about = {"command": " ".join(sys.argv), "python": platform.python_version(), "cpu": platform.processor()}
    if gpu is not None:
        import cupy

        about |= {"gpu": gpu["name"].decode(), "driver": str(cupy.cuda.runtime.driverGetVersion())}
    for name in ("numpy", "cupy", "torch", "fbgemm_gpu"):
        if name in sys.modules:
            about[name] = str(getattr(sys.modules[name], "__version__", "?"))
    about["commit"] = _commit()
    return about


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def text(report: Report) -> str:
    """For people: where it ran, a line for each figure, rows a second against batch size as bars."""
    lines = [f"{key}: {value}" for key, value in report.about.items()]
    lines += [f"absent: {name}: {why}" for name, why in report.absent.items()]
    lines += ["", f"{'case':44} {'metric':22} {'value':>9} unit     baseline"]
    for row in report.rows:
        versus = f"{row.ratio:.2f}x {row.baseline}" if row.ratio is not None else ""
        lines.append(f"{row.case:44} {row.metric:22} {row.value:9.1f} {row.unit:8} {versus}")
    bars = [row for row in report.rows if row.unit == "Mrows/s" and row.metric == "throughput"]
    top = max((row.value for row in bars), default=1.0)
    lines += ["", *(f"{row.case:44} {'#' * round(40 * row.value / top)} {row.value:.1f} M rows/s" for row in bars)]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="How fast the families compute a forward pass.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    parser.add_argument("--table-rows", type=int, default=100_000, help="rows of each of the 26 tables")
    parser.add_argument("--repeats", type=int, default=15, help="repetitions, of which the median counts")
    options = parser.parse_args(arguments)
    report = forward(reference_model(options.table_rows), options.repeats)
    print(text(report))
    if options.json:
        options.json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")


if __name__ == "__main__":
    main()
