"""The Backend protocol over the engine."""

import contextlib
import gc
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from narsil_stream.kernels.artifact import Artifact
from narsil_stream.kernels.backend import PROTOCOL, BackendInfo, RaggedBatch, unfit
from narsil_stream.kernels.native import LANES
from narsil_stream.kernels.native.choose import PRECISIONS
from narsil_stream.kernels.native.cublaslt import CublasError
from narsil_stream.kernels.native.engine import Engine, Options
from narsil_stream.kernels.native.source import CompileError
from narsil_stream.schemas.compute import Capabilities
from narsil_stream.schemas.model import ModelSpec

DEFAULT_ROWS = 4096
"""Of the largest bucket until `warm_up` says otherwise."""
LARGEST_ROWS = 65_536
"""Of any bucket: a longer batch is cut, several pieces at a time on the device."""


class Native:
    """One model on one GPU. `engine` has the calls for callers that keep several batches in flight by themselves."""

    def __init__(self, artifact: Artifact, *, precision: str = "fp16", lanes: int = LANES) -> None:
        """Raises Unfit."""
        self._spec = artifact.spec
        self._options = Options(precision=precision, lanes=lanes, max_rows=DEFAULT_ROWS)
        self._device = _device_name()
        self._loaded = False
        with self._failures("load this model"):
            self.engine = Engine(artifact, self._options)
        self._loaded = True

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    @property
    def info(self) -> BackendInfo:
        return BackendInfo("native", self._device, self._options.precision, self._options.lanes)

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(PROTOCOL, "cuda", PRECISIONS, multi_hot=True, max_rows=self.engine.options.max_rows)

    @property
    def unprepared(self) -> int:
        return self.engine.recaptured

    def warm_up(self, max_rows: int) -> None:
        """Capture a graph for each bucket up to `max_rows` rows, one-hot and multi-hot. Longer batches are cut."""
        rows = min(max_rows, LARGEST_ROWS)
        with self._failures(f"warm up for {rows:,} rows in {self._options.lanes} lanes"):
            self.engine.resize(rows)
            self.engine.warm_up()

    def empty(self, rows: int) -> NDArray[np.float32]:
        import cupy

        return np.frombuffer(cupy.cuda.alloc_pinned_memory(max(4, 4 * rows)), np.float32, rows)

    def run(self, batch: RaggedBatch, scores: NDArray[np.float32]) -> None:
        """Score a batch of any size. Raises IdOutOfRange when the device finds an id that its table has no row for."""
        self.engine.run(batch, scores)

    def unload(self) -> None:
        if self._loaded:
            self._loaded = False
            self.engine.close()

    @contextlib.contextmanager
    def _failures(self, doing: str) -> Iterator[None]:
        """What may fail on a machine that is not as it should be, or too small, as Unfit."""
        import cupy

        errors = (
            CompileError,
            CublasError,
            cupy.cuda.runtime.CUDARuntimeError,
            cupy.cuda.driver.CUDADriverError,
            MemoryError,  # CuPy's too
            OSError,  # a library that cannot be opened, a cache that cannot be written
            ValueError,  # options that this GPU does not have
        )
        step = "another --precision, or --backend torch or reference"
        try:
            with unfit(f"the native backend could not {doing} on {self._device}", step, *errors):
                yield
        except BaseException:
            with contextlib.suppress(cupy.cuda.runtime.CUDARuntimeError):  # of a device that is lost
                self.unload()
            gc.collect()  # slots and their engine refer to each other
            cupy.get_default_memory_pool().free_all_blocks()
            cupy.get_default_pinned_memory_pool().free_all_blocks()
            raise


def _device_name() -> str:
    import cupy

    name: bytes = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"]
    return name.decode()
