"""Passes that are over before a thread would have begun them are computed where they arrive; all others are not."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from narsil_stream.actors.brevity import BRIEF_US, SEEN, Brevity
from narsil_stream.kernels import reference
from narsil_stream.kernels.backend import Backend, RaggedBatch
from narsil_stream.schemas import codec
from narsil_stream.schemas.wire import InferRequest
from tests.asking import some_rows
from tests.door import Door
from tests.doubles import Gate, GatedBackend
from tests.support import PATIENCE_S, NatsServer, System

BACKEND, OTHER = (GatedBackend(None, Gate()) for _ in range(2))  # type: ignore[arg-type]


class Timed(GatedBackend):
    """Remembers which thread computed; a pass takes `seconds`."""

    seconds = 0.0

    def __init__(self, inner: Backend) -> None:
        super().__init__(inner, Gate())
        self.threads: list[int] = []

    def run(self, batch: RaggedBatch, scores: NDArray[np.float32]) -> None:
        self.threads.append(threading.get_ident())
        scores[:] = 0.5
        if self.seconds:
            time.sleep(self.seconds)


def ask_until(url: str, model: Path, seconds: float, enough: Callable[[list[int], int], bool]) -> tuple[list[int], int]:
    """Threads of the passes, and the event loop's; `enough` is given both."""
    loaded: list[Timed] = []

    def load(artifact: Path) -> Backend:
        loaded.append(Timed(reference.load(artifact)))
        loaded[-1].seconds = seconds
        return loaded[-1]

    async def here() -> int:
        return threading.get_ident()

    rows = some_rows(model, 1)
    request = InferRequest("", (codec.tensor("dense", rows.dense), codec.tensor("sparse", rows.ids)), 20_000_000)
    with System(url, model, loader=load) as system, Door(url) as door:
        loop = system.submit(here()).result(PATIENCE_S)
        end = time.monotonic() + PATIENCE_S
        while not enough(loaded[0].threads, loop):
            assert time.monotonic() < end
            assert not door.ask("ctr", request).result(PATIENCE_S).fault
    return loaded[0].threads, loop


def test_brief_passes_are_computed_where_they_arrive(nats_server: NatsServer, criteo_model: Path) -> None:
    """A request that is alone waits for no thread to wake up."""
    ask_until(nats_server.url, criteo_model, 0, lambda threads, loop: threads.count(loop) >= 3)


def test_longer_passes_leave_the_event_loop_free(nats_server: NatsServer, criteo_model: Path) -> None:
    """Heartbeats and refusals go on during a batch."""
    threads, loop = ask_until(nats_server.url, criteo_model, 1e-3, lambda threads, _: len(threads) >= 4 * SEEN)
    assert loop not in threads


@given(st.lists(st.integers(1, 2 * BRIEF_US), max_size=30))
def test_a_pass_counts_as_brief_when_most_of_the_last_ones_were(took: list[int]) -> None:
    """Neither one lucky pass nor one pause of the machine decides."""
    brevity = Brevity()
    for us in took:
        brevity.observe(BACKEND, 100, us)
    last = took[-SEEN:]
    assert brevity.expected(BACKEND, 100) == (len(last) == SEEN and sum(us <= BRIEF_US for us in last) > SEEN // 2)
    assert not brevity.expected(OTHER, 100)
    assert not brevity.expected(BACKEND, 1_000)
