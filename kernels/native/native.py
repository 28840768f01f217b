"""The Backend protocol over the engine."""

import numpy as np
from numpy.typing import NDArray

from narsil_stream.kernels.artifact import Artifact
from narsil_stream.kernels.backend import BackendInfo, RaggedBatch
from narsil_stream.kernels.native.engine import Engine, Options
from narsil_stream.schemas.model import ModelSpec

DEFAULT_ROWS = 4096
"""Of the largest bucket until `warm_up` says otherwise."""
LARGEST_ROWS = 65_536
"""Of any bucket: a longer batch is cut, several pieces at a time on the device."""


class Native:
    """One model on one GPU. `engine` has the calls for callers that keep several batches in flight."""

    def __init__(self, artifact: Artifact, *, precision: str = "fp16", lanes: int = 3) -> None:
        self._spec = artifact.spec
        self._options = Options(precision=precision, lanes=lanes, max_rows=DEFAULT_ROWS)
        self._device = _device_name()
        self.engine = Engine(artifact, self._options)

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    @property
    def info(self) -> BackendInfo:
        return BackendInfo("native", self._device, self._options.precision, self._options.lanes)

    def warm_up(self, max_rows: int) -> None:
        """Capture a graph for each bucket up to `max_rows` rows, one-hot and multi-hot. Longer batches are cut."""
        self.engine.resize(min(max_rows, LARGEST_ROWS))
        self.engine.warm_up()

    def run(self, batch: RaggedBatch, scores: NDArray[np.float32]) -> None:
        """Score a batch of any size. Raises IdOutOfRange when the device finds an id that its table has no row for."""
        self.engine.run(batch, scores)

    def unload(self) -> None:
        self.engine.close()


def _device_name() -> str:
    import cupy

    name: bytes = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)["name"]
    return name.decode()
