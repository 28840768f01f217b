"""What a way to compute the forward pass offers to the engine, and what both ways share."""

from typing import Any, NamedTuple, Protocol

from narsil_stream.kernels.native.layout import round_up
from narsil_stream.schemas.model import ModelSpec


class Inputs(NamedTuple):
    """Device addresses of the parts of a packed batch; see `layout.Blob`. `offsets` is 0 when one-hot."""

    header: int
    dense: int
    ids: int
    offsets: int


class Outputs(NamedTuple):
    """Where results go: addresses that the device can write."""

    scores: int
    """[rows] FP32"""
    logits: int
    """[rows] FP32"""
    errors: int
    """[1] INT32: set to 1 + a table with an id outside it."""


class Plan(Protocol):
    """The forward pass of one model on one device."""

    name: str
    reads_inputs_once: bool
    """Whether small batches may as well be read where they are, in the host's memory."""

    def resize(self, max_rows: int) -> None:
        """Batches have up to `max_rows` rows from now on; what was prepared is void."""

    def close(self) -> None:
        """Give back what is not memory. Nothing may be in flight."""

    def prepare(self, rows: int, multi_hot: bool, lane: int, stream: Any) -> None:
        """Compile, allocate and tune for batches of up to `rows` rows. Nothing of it may happen while capturing.

        One thread at a time. Work goes to `stream`, the lane's.
        """

    def enqueue(self, stream: Any, given: Inputs, out: Outputs, rows: int, lane: int) -> None:
        """Launch what scores a batch of up to `rows` rows. Only launches: this is captured into a graph.

        `lane`: which scratch memory to use; batches of different lanes may run at the same time.
        """


def row_defines(spec: ModelSpec, row_bytes: int, multi_hot: bool) -> dict[str, object]:
    """The settings that `rows.cuh` wants."""
    return {
        "F": spec.n_sparse,
        "DIM": spec.architecture.dim,
        "ROW_BYTES": row_bytes,
        "DENSE": spec.n_dense,
        "MULTI": int(multi_hot),
        "MEAN": int(spec.architecture.pooling == "mean"),
        "KD": round_up(spec.n_dense, 16),
    }
