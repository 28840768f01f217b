"""What every peer serves: the callable that our executors call, behind the wire's msgpack."""

import os
from pathlib import Path
from typing import Protocol

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from narsil_stream.kernels import families
from narsil_stream.kernels.artifact import read, read_spec
from narsil_stream.kernels.backend import RaggedBatch
from narsil_stream.schemas import codec

VARIABLE = "PEER_ORDER"
EAGER = "torchrec-eager"


class Settings(Struct, frozen=True):
    """What a peer's users tune."""

    batch: int
    """Most requests in a batch."""
    wait_ms: int
    """How long a batch waits for more."""
    workers: int = 1
    threads: int = 1
    """Of each worker's arithmetic; the environment says it to its libraries."""

    def __str__(self) -> str:
        return f"batch {self.batch}, wait {self.wait_ms} ms, workers {self.workers}, threads {self.threads}"


class Order(Struct, frozen=True):
    """How to start."""

    port: int
    model: str
    """Folder of the artifact."""
    engine: str
    """A family's name, noop, auto, or `EAGER`."""
    rows: int
    """Most rows in a request."""
    settings: Settings


class Runs(Protocol):
    def run(self, batch: RaggedBatch, scores: NDArray[np.float32]) -> None: ...


def order() -> Order:
    return msgspec.json.decode(os.environ[VARIABLE], type=Order)


class Engine:
    """Ids are not checked, which is to the peers' credit: our batchers check theirs."""

    def __init__(self, given: Order) -> None:
        self._backend = _load(given)

    def __call__(self, dense: NDArray[np.float32], ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """dense [B, n_dense], ids [B, n_sparse]; scores [B]."""
        scores = np.empty(len(dense), np.float32)
        self._backend.run(RaggedBatch(dense, ids.reshape(-1)), scores)
        return scores

    def score(self, bodies: list[bytes]) -> list[bytes]:
        """One batch of requests as they came; the bytes of each one's scores."""
        parts = [[codec.array(one) for one in codec.decode_request(body).inputs] for body in bodies]
        dense, ids = (column[0] if len(column) == 1 else np.concatenate(column) for column in zip(*parts, strict=True))
        scores, at, found = self(dense, ids).tobytes(), 0, []
        for part in parts:
            end = at + 4 * len(part[0])
            found.append(scores[at:end])
            at = end
        return found


def _load(given: Order) -> Runs:
    folder = Path(given.model)
    if given.engine == EAGER:
        from narsil_stream.bench.torchrec_eager import TorchRecEager

        return TorchRecEager(read(folder))
    backend = families.choose(given.engine, "auto", read_spec(folder)).load(folder)
    backend.warm_up(given.settings.batch * given.rows)
    return backend
