"""What the load asks: requests of heavy-tailed sizes, each with an id of its own and an answer that is known."""

from pathlib import Path

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from narsil_stream.kernels.artifact import write
from narsil_stream.kernels.init import plain_spec, random_model
from narsil_stream.kernels.noop import SCORES
from narsil_stream.schemas import codec
from narsil_stream.schemas.wire import InferAnswer, InferRequest

MODEL = "chaos"
TABLES = 2
POOL = 1 << 16


class Sizes(Struct, frozen=True):
    """Rows of a request: log-normal, as candidate lists are; rounded and cut to 1 ... `most`."""

    median: float = 12.0
    sigma: float = 1.25
    most: int = 64

    def draw(self, rng: np.random.Generator, count: int) -> NDArray[np.int64]:
        drawn = np.rint(rng.lognormal(np.log(self.median), self.sigma, count)).astype(np.int64)
        return drawn.clip(1, self.most)

    def mean(self) -> float:
        return float(self.draw(np.random.default_rng(0), 1 << 18).mean())


def write_model(folder: Path) -> None:
    """One dense feature and tables as long as the stand-in has scores."""
    spec = plain_spec(MODEL, 1, [SCORES] * TABLES, 4, (4,), (4,))
    write(folder, random_model(spec, seed=1))


class Asks:
    """Requests and their answers, the same for the same seed. `sizes`: rows of each."""

    def __init__(self, seed: int, sizes: NDArray[np.int64]) -> None:
        rng = np.random.default_rng(seed)
        self._name = f"{seed:x}"
        self._rows = sizes
        self._ids = rng.integers(0, SCORES, (POOL + int(sizes.max(initial=1)), TABLES), np.int32)
        self._scores = self._ids[:, 0] * np.float32(1 / SCORES)
        self._at = rng.integers(0, POOL, len(sizes))
        self._dense = np.zeros((int(sizes.max(initial=1)), 1), np.float32)

    def __len__(self) -> int:
        return len(self._rows)

    def rows(self, number: int) -> int:
        return int(self._rows[number])

    def request(self, number: int) -> InferRequest:
        rows, at = self.rows(number), self._at[number]
        inputs = (codec.tensor("dense", self._dense[:rows]), codec.tensor("sparse", self._ids[at : at + rows]))
        return InferRequest(self._id(number), inputs)

    def right(self, number: int, answer: InferAnswer) -> bool:
        """Whether it is the answer to that request and to no other."""
        at = self._at[number]
        if answer.id != self._id(number) or len(answer.outputs) != 1:
            return False
        return np.array_equal(codec.array(answer.outputs[0]), self._scores[at : at + self.rows(number)])

    def _id(self, number: int) -> str:
        return f"{self._name}-{number}"
