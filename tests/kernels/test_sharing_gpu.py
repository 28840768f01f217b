"""Models of both families on one GPU in one process: one scores while another comes and goes."""

import gc
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest

from narsil_stream.kernels import torch_family
from narsil_stream.kernels.artifact import Artifact
from narsil_stream.kernels.backend import Backend, RaggedBatch
from narsil_stream.kernels.init import criteo_spec, random_batch, random_model
from narsil_stream.kernels.quantize import quantize
from narsil_stream.kernels.reference import Reference, sigmoid

pytestmark = pytest.mark.gpu

ROWS = 256
"""Of the largest bucket."""
LOADS = 20
TOLERANCE = 5e-3
STALL_SECONDS = 0.5
MEMORY = 64 << 20
"""What may be missing in the end: allocators' own books."""


def model(seed: int) -> Artifact:
    spec = criteo_spec(rows=2000, dim=64, bottom=(512, 256), top=(512, 512, 256), pooling="mean")
    return quantize(random_model(spec, seed), "INT8")


@pytest.fixture(scope="module")
def models() -> tuple[Artifact, Artifact]:
    return model(1), model(2)


def load(family: str, artifact: Artifact) -> Backend:
    if family == "torch":
        try:
            torch_family.require_unit()
        except torch_family.Unavailable as error:
            pytest.skip(str(error))
        from narsil_stream.kernels.torch_family.devices import build, resolve

        return build(artifact, resolve("cuda", "fp16"))
    from narsil_stream.kernels.native.native import Native

    return Native(artifact, precision="bf16" if family == "native layers" else "fp16")


def traffic(artifact: Artifact) -> list[tuple[RaggedBatch, Any]]:
    """One-hot and multi-hot; then single rows with ever larger bags, for which memory has to grow."""
    sizes = [(1, None), (100, 3), (ROWS, None), (ROWS + 1, None), (40, 8), (700, 2)]
    sizes += [(1, 1500), (1, 3500), (1, 8000)]
    batches = [random_batch(artifact.spec, rows, seed, bag) for seed, (rows, bag) in enumerate(sizes)]
    return [(batch, sigmoid(Reference(artifact).logits(batch))) for batch in batches]


def check(backend: Backend, batch: RaggedBatch, expected: Any, tolerance: float) -> None:
    scores = np.full(batch.rows, np.nan, np.float32)
    backend.run(batch, scores)
    np.testing.assert_allclose(scores, expected, rtol=0, atol=tolerance)


class Scorer:
    """A thread that scores the same traffic again and again, and compares every answer."""

    def __init__(self, backend: Backend, given: list[tuple[RaggedBatch, Any]], tolerance: float) -> None:
        self._backend, self._given, self._tolerance = backend, given, tolerance
        self._stop = threading.Event()
        self._failed: BaseException | None = None
        self.batches, self.longest = 0, 0.0
        self.capture_anew = threading.Event()
        """Set: all graphs are captured again, beside whatever the other thread does."""
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                if self.capture_anew.is_set():
                    self.capture_anew.clear()
                    self._backend.warm_up(ROWS + 1 + self.batches % 64)
                    continue  # by its own doing, which is no stall
                for batch, expected in self._given:
                    start = time.perf_counter()
                    check(self._backend, batch, expected, self._tolerance)
                    self.longest = max(self.longest, time.perf_counter() - start)
                    self.batches += 1
        except BaseException as error:
            self._failed = error

    def failed(self) -> None:
        if self._failed is not None:
            raise self._failed

    def wait_for(self, batches: int) -> None:
        deadline = time.monotonic() + 30
        while self.batches < batches and self._failed is None:
            assert time.monotonic() < deadline, "the first model scores nothing any more"
            time.sleep(1e-3)
        self.failed()

    @contextmanager
    def running(self) -> Iterator["Scorer"]:
        self._thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            self._thread.join(60)
        assert not self._thread.is_alive()
        self.failed()


def come_and_go(first: str, second: str, models: tuple[Artifact, Artifact], loads: int) -> float:
    """Load and unload the second model so many times while the first scores; how long its longest batch took."""
    one, other = models
    tolerance = 3e-2 if "layers" in first else TOLERANCE  # BF16
    staying = load(first, one)
    staying.warm_up(ROWS)
    given, ((batch, expected), *_) = traffic(one), traffic(other)[1:2]
    with Scorer(staying, given, tolerance).running() as scorer:
        for number in range(loads):
            before = scorer.batches
            if number % 4 == 0:
                scorer.capture_anew.set()
            coming = load(second, other)
            coming.warm_up(128)
            check(coming, batch, expected, 3e-2 if "layers" in second else TOLERANCE)
            coming.unload()
            scorer.wait_for(before + 1)
    staying.unload()
    return scorer.longest


def used() -> int:
    import cupy

    gc.collect()
    free, total = cupy.cuda.runtime.memGetInfo()
    return int(total - free)


@pytest.mark.parametrize(
    ("first", "second"),
    [("native", "native"), ("native", "torch"), ("torch", "native"), ("torch", "torch"), ("native", "native layers")],
)
def test_a_model_scores_right_while_another_comes_and_goes(
    models: tuple[Artifact, Artifact], first: str, second: str
) -> None:
    """A model is replaced without a pause: no wrong score, no CUDA error, no stall, no memory lost."""
    come_and_go(first, second, models, loads=1)  # what libraries load and keep
    before = used()
    longest = come_and_go(first, second, models, LOADS)
    assert used() - before <= MEMORY
    print(f"{second} came and went {LOADS} times; the longest batch of {first} took {longest * 1e3:.1f} ms")
    assert longest <= STALL_SECONDS


@pytest.mark.parametrize("kernels", ["fused", "layers"])
def test_an_engine_gives_back_all_that_it_took(models: tuple[Artifact, Artifact], kernels: str) -> None:
    """Workspaces, machine code and descriptions of products too: a server that swaps models runs for months."""
    from narsil_stream.kernels.native.engine import Engine, Options

    def once() -> None:
        engine = Engine(models[0], Options(kernels=kernels, max_rows=128, lanes=1))
        engine.warm_up()
        engine.close()

    once()
    levels = []
    for _ in range(LOADS):
        once()
        levels.append(used())
    assert max(levels) - min(levels) <= 4 << 20


def test_models_of_torch_never_share_a_stream(models: tuple[Artifact, Artifact]) -> None:
    """torch gives out 32 streams in turn: after many loads one would be the stream of a model that is still there."""
    staying = load("torch", models[0])
    for _ in range(34):
        coming = load("torch", models[1])
        assert coming.stream != staying.stream  # type: ignore[attr-defined]
        coming.unload()
    staying.unload()
