"""Rows a second of `Backend.run` from several threads, as an executor calls it: what another lane is worth.

    python -m narsil_stream.bench.lanes [--backend native|torch|reference] [--table-rows 100000] [--json FILE]

The reference configuration with INT8 rows. Ids rotate over 64 batches; each thread runs its share of them, from
ordinary arrays into memory that the backend gives. Scores are compared with the reference first. A family with fixed
lanes is measured with those alone.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import msgspec

from narsil_stream.bench.forward import batches, check, reference_model
from narsil_stream.bench.report import Report, Row, machine, text
from narsil_stream.kernels.artifact import Artifact, read_spec, write
from narsil_stream.kernels.backend import Backend, Floats, RaggedBatch
from narsil_stream.kernels.families import choose
from narsil_stream.kernels.quantize import quantize

LANES = (1, 2, 3, 4)
ROWS = (128, 1600, 4096)
ROUND_S = 0.5
"""At least, of one measurement."""


def measure(model: Artifact, family: str, repeats: int) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        artifact = Path(folder) / "model"
        write(artifact, model)
        seen = set()
        for lanes in LANES:
            backend = choose(family, "int8", read_spec(artifact), lanes).load(artifact)
            threads = backend.info.lanes
            if threads not in seen:
                seen.add(threads)
                backend.warm_up(max(ROWS))
                check(f"{family}, {threads} lanes", model, lambda batch, b=backend: _scores(b, batch))  # type: ignore[misc]
                for rows in ROWS:
                    yield from _rows(backend, rows, threads, repeats)
            backend.unload()


def _rows(backend: Backend, rows: int, threads: int, repeats: int) -> Iterator[Row]:
    given = batches(backend.spec, rows)
    _round(backend, given, threads, 0.1)
    rounds = [_round(backend, given, threads, ROUND_S) for _ in range(repeats)]
    case = f"lanes/{backend.info.name}/{backend.info.precision}/{rows}/{threads}"
    yield Row(case, "throughput", statistics.median(r for r, _ in rounds), "Mrows/s")
    yield Row(case, "run", statistics.median(us for _, us in rounds), "us")


def _round(backend: Backend, given: list[RaggedBatch], threads: int, seconds: float) -> tuple[float, float]:
    """M rows a second of all threads, and the median time of one call in µs."""
    together = Barrier(threads + 1)
    rows = given[0].rows

    def work(thread: int) -> list[float]:
        share, scores = given[thread::threads], backend.empty(rows)
        times: list[float] = []
        together.wait()
        end = time.perf_counter() + seconds
        while (start := time.perf_counter()) < end:
            backend.run(share[len(times) % len(share)], scores)
            times.append((time.perf_counter() - start) * 1e6)
        return times

    with ThreadPoolExecutor(threads) as pool:
        running = [pool.submit(work, thread) for thread in range(threads)]
        together.wait()
        start = time.perf_counter()
        times = [one for done in running for one in done.result()]
        took = time.perf_counter() - start
    return len(times) * rows / took / 1e6, statistics.median(times)


def _scores(backend: Backend, batch: RaggedBatch) -> Floats:
    scores = backend.empty(batch.rows)
    backend.run(batch, scores)
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", default="native")
    parser.add_argument("--table-rows", type=int, default=100_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    model = quantize(reference_model(given.table_rows), "INT8")
    report = Report(machine(), list(measure(model, given.backend, given.repeats)), {})
    print(text(report))
    if given.json:
        given.json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")


if __name__ == "__main__":
    main()
