"""The one protocol between the pipeline and whatever computes. Adding compute touches only this folder.

Frozen: docs/families.md says what a new family must do, and how this may change.
"""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from narsil_stream.schemas.compute import Capabilities
from narsil_stream.schemas.model import ModelSpec

PROTOCOL = "1.0"
"""Semantic versioning. Minor: more is offered or allowed, backends of an older one still work. Major: they do not."""

Floats = NDArray[np.float32]

_MORE_MEMORY = (
    "unload another model (one that is replaced stays until the new one is ready), lower --batch-max-rows or "
    "--executor-lanes, or serve INT8 rows: narsil model quantize"
)


class IdOutOfRange(ValueError):
    """A batch held an id that its table has no row for. No other row was read in its place; the scores are void."""


class Unfit(Exception):
    """A family, precision or model that cannot be had here: says what failed, where, and what to do next."""

    def __init__(self, message: str, told: str = "") -> None:
        """`told`: to callers, where a library's own words are in the message, which may name anything."""
        super().__init__(message)
        self.told = told or message


class RaggedBatch(Struct, frozen=True, gc=False):
    """Rows of one or many requests, joined. Arrays are C order; they may be read-only views of a message.

    One-hot when `lengths` is None: `ids` holds rows * n_sparse values, batch-major. Otherwise multi-hot: `ids` holds
    the bags of row 0 table 0, row 0 table 1, ... and `lengths[b, t]` says how many ids belong to row b and table t.
    Ids are already checked: 0 <= id < rows of its table.
    """

    dense: Floats
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
    """One model on one device.

    Threads: `run` comes from up to `info.lanes` threads at the same time, the rest from one, and never while a `run`
    is under way. Other backends of the process are loaded, warmed up, run and unloaded meanwhile by other threads.
    """

    @property
    def spec(self) -> ModelSpec:
        """The model that is loaded."""

    @property
    def info(self) -> BackendInfo: ...

    @property
    def capabilities(self) -> Capabilities: ...

    @property
    def unprepared(self) -> int:
        """Pieces of batches since `warm_up` that needed what it had not prepared, such as a graph. Only rises."""

    def warm_up(self, max_rows: int) -> None:
        """Allocate and compile all that batches of 1 to `max_rows` rows need, so that no live batch pays for it.

        Raises Unfit; what was allocated is free again by then, and only `unload` may be called.
        """

    def empty(self, rows: int) -> Floats:
        """Memory for `rows` scores that this device writes fastest: pinned where there is a GPU. From any thread.

        It may outlive the backend.
        """

    def run(self, batch: RaggedBatch, scores: Floats) -> None:
        """Write one score in [0, 1] for each row into `scores` [rows], contiguous, from `empty` or any other.

        A batch may have any number of rows, 0 too; rows are independent of each other. Once this returns or raises,
        nothing refers to the arguments any more. A row that overflows the arithmetic, as 65,520 does FP16, may get NaN:
        it fails its own request, no other. Raises IdOutOfRange; whatever else it raises fails this batch alone.
        """

    def unload(self) -> None:
        """Free device memory. `run` must not be called again, `unload` may."""


class Loader(Protocol):
    """How a family loads an artifact's folder. Raises ArtifactError: unfit artifact; Unfit: all else that may fail."""

    def __call__(self, artifact: Path) -> Backend: ...


def speaks(protocol: str) -> bool:
    """Whether a backend of this version of the protocol works here."""
    major, _, minor = protocol.partition(".")
    ours = PROTOCOL.split(".")
    return major == ours[0] and minor.isdecimal() and int(minor) <= int(ours[1])


@contextmanager
def unfit(what: str, step: str, *errors: type[Exception]) -> Iterator[None]:
    """Tell `errors`, which a family knows to expect, as Unfit: `what` failed, why, and the next `step`.

    What the failed calls held in their variables is free again.
    """
    try:
        yield
    except Unfit:
        raise
    except errors as error:
        traceback.clear_frames(error.__traceback__)
        kind = type(error).__name__
        why = str(error).strip() or kind
        if isinstance(error, MemoryError) or "out of memory" in why.lower():
            step = _MORE_MEMORY
        message = f"{what}: {why}" + ("" if "Next:" in why else f". Next: {step}")
        raise Unfit(message, f"{what}: {kind}. Next: {step}") from error
