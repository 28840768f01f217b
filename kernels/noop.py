"""A family that computes nothing, so that a benchmark measures the way of a request and not a model."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from narsil_stream.kernels.artifact import read_spec
from narsil_stream.kernels.backend import PROTOCOL, Backend, BackendInfo, RaggedBatch
from narsil_stream.schemas.compute import Capabilities
from narsil_stream.schemas.model import ModelSpec

SCORES = 1024


def load(artifact: Path) -> Backend:
    """Reads what the model takes, not its weights."""
    return Noop(read_spec(artifact))


class Noop:
    """The score of a row is its first id modulo 1,024, over 1,024: whoever asked can tell whether rows were mixed up.

    A row without ids gets 0.
    """

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec

    @property
    def spec(self) -> ModelSpec:
        return self._spec

    @property
    def info(self) -> BackendInfo:
        return BackendInfo(name="noop", device="cpu", precision="none")

    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(PROTOCOL, "cpu", ("none",), multi_hot=True, max_rows=0)

    @property
    def unprepared(self) -> int:
        return 0

    def warm_up(self, max_rows: int) -> None:
        pass

    def empty(self, rows: int) -> NDArray[np.float32]:
        return np.empty(rows, np.float32)

    def run(self, batch: RaggedBatch, scores: NDArray[np.float32]) -> None:
        np.multiply(_first(batch, self._spec.n_sparse) % SCORES, np.float32(1 / SCORES), out=scores)

    def unload(self) -> None:
        pass


def _first(batch: RaggedBatch, tables: int) -> NDArray[np.int32]:
    """The first id of each row, 0 where there is none. [rows]"""
    if batch.lengths is None:
        return batch.ids[::tables]
    counts = batch.lengths.sum(axis=1)
    starts = np.cumsum(counts) - counts
    ids = np.append(batch.ids, np.int32(0))  # a last row without ids starts behind the end
    return np.where(counts > 0, ids[starts], np.int32(0))
