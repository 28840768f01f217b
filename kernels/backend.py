"""The one protocol between the pipeline and whatever computes. Adding compute touches only this folder."""

from pathlib import Path
from typing import Protocol

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from narsil_stream.schemas.model import ModelSpec


class RaggedBatch(Struct, frozen=True, gc=False):
    """Rows of one or many requests, joined. Arrays are C order; they may be read-only views of a message.

    One-hot when `lengths` is None: `ids` holds rows * n_sparse values, batch-major. Otherwise multi-hot: `ids` holds
    the bags of row 0 table 0, row 0 table 1, ... and `lengths[b, t]` says how many ids belong to row b and table t.
    Ids are already checked: 0 <= id < rows of its table.
    """

    dense: NDArray[np.float32]
    """[rows, n_dense]"""
    ids: NDArray[np.int32]
    """[N]"""
    lengths: NDArray[np.int32] | None = None
    """[rows, n_sparse]"""

    @property
    def rows(self) -> int:
        return int(self.dense.shape[0])


class BackendInfo(Struct, frozen=True):
    """What a loaded backend says of itself, for logs, tables and metadata."""

    name: str
    """Family: reference, torch, native ..."""
    device: str
    """For people: "cpu", "NVIDIA H100 80GB HBM3" ..."""
    precision: str
    """Of the arithmetic, e.g. "fp32"; embedding rows keep the artifact's type."""
    lanes: int = 1
    """Batches that compute at the same time. An executor leases lanes + 1 slots."""


class Backend(Protocol):
    """One model on one device. Calls come from one thread at a time; `run` must not keep references to arguments."""

    @property
    def spec(self) -> ModelSpec:
        """The model that is loaded."""

    @property
    def info(self) -> BackendInfo: ...

    def warm_up(self, max_rows: int) -> None:
        """Allocate and compile all that batches of 1 to `max_rows` rows need, so that no live batch pays for it."""

    def run(self, batch: RaggedBatch, scores: NDArray[np.float32]) -> None:
        """Write one score in [0, 1] for each row into `scores` [rows]. Rows are independent of each other.

        A row that overflows the arithmetic, as 65,520 does FP16, may get NaN: it fails its own request, no other.
        """

    def unload(self) -> None:
        """Free device memory. `run` must not be called again."""


class Loader(Protocol):
    """How a family loads an artifact's folder. Raises `ArtifactError` when the artifact is unfit."""

    def __call__(self, artifact: Path) -> Backend: ...
