"""A batcher by itself: `python -m narsil_stream.cli.bench_batcher [--profile]`.

The real actor with a bus that goes nowhere and an executor that answers at once. Processor time of this thread for each
request, in µs, best of several runs: what our own code costs, with neither sockets nor nats-py.
"""

import argparse
import asyncio
import cProfile
import pstats
import time
from collections.abc import Callable
from itertools import count
from typing import Any, NamedTuple

import msgspec
import numpy as np

from narsil_stream.actors.batcher import Batcher
from narsil_stream.bench.questions import MODEL, msgpack
from narsil_stream.core.config import Config, TimingConfig
from narsil_stream.core.memory import keep_freed_memory
from narsil_stream.kernels.init import criteo_spec, random_batch
from narsil_stream.schemas import codec, subjects
from narsil_stream.schemas.internal import Ask, Batch, Bundle, ExecutorBeat, Lease, ModelCard, ModelRef, Result, Slot

SPEC = criteo_spec(MODEL, rows=1_000, dim=4, bottom=(8,), top=(8,))
REF = ModelRef(MODEL, "1", "digest")
IN_FLIGHT = 64
IN_A_BUNDLE = 16
SLOTS = 2
TURNS, WARM_TURNS, RUNS = 200, 20, 5
INBOX = "_INBOX.narsil.bench"

_encode = msgspec.msgpack.Encoder().encode


class Said(NamedTuple):
    """A message of nats-py, as far as a batcher looks at it."""

    subject: str
    reply: str
    data: bytes


class Nowhere:
    """A bus. What executors get is kept by reference, as in one process; what callers get is encoded and counted."""

    def __init__(self) -> None:
        self.max_payload = 8 << 20
        self.on_lost: list[Any] = []
        self.heard: dict[str, tuple[Callable[[Any], None], Callable[[bytes], Any]]] = {}
        self.batches: list[Batch] = []
        self.messages = 0

    async def listen(self, subject: str, handler: Any, decode: Any, owner: object = None) -> None:
        self.heard[subject] = handler, decode

    async def subscribe(self, subject: str, handler: Any, queue: str = "", owner: object = None) -> None:
        self.heard[subject] = handler, bytes

    async def request(self, subject: str) -> bytes:
        return msgspec.json.encode([ModelCard(REF.digest, SPEC)])

    async def respond(self, *_: object, **__: object) -> None: ...

    async def unsubscribe(self, *_: object, **__: object) -> None: ...

    async def flush(self) -> None: ...

    def is_local(self, subject: str) -> bool:
        return False

    def signal(self, subject: str) -> None: ...

    def broadcast(self, subject: str, message: object) -> None: ...

    def send(self, subject: str, message: object) -> None:
        if isinstance(message, Batch):
            self.batches.append(message)
        else:
            self.messages += bool(_encode(message))

    def publish(self, subject: str, payload: bytes, headers: Any = None) -> None:
        assert not headers, payload
        self.messages += 1


class Bench:
    """A batcher that serves the model, and requests of so many rows."""

    def __init__(self, kind: str, rows: int) -> None:
        self.bus = Nowhere()
        patient = Config(timing=TimingConfig(lease_ms=600_000))  # a busy machine is no reason to lose the executor
        self.batcher = Batcher(patient, self.bus)  # type: ignore[arg-type]
        self._generations = count()
        self._slots = [Slot(index, next(self._generations)) for index in range(SLOTS)]
        self._scores = memoryview(np.ones(IN_FLIGHT * rows, np.float32).tobytes())
        bodies = [msgpack(random_batch(SPEC, rows, seed)) for seed in range(8)]
        self._asked = [bodies[at % 8] for at in range(IN_FLIGHT)]
        self._bundled = kind == "bundle"
        if self._bundled:
            asks = [Ask(at, MODEL, "", codec.decode_request(one)) for at, one in enumerate(self._asked)]
            parts = [tuple(asks[at : at + IN_A_BUNDLE]) for at in range(0, IN_FLIGHT, IN_A_BUNDLE)]
            self._asked = [_encode(Bundle(INBOX, part)) for part in parts]

    async def serve(self) -> None:
        """Returns once it takes requests."""
        await self.batcher.start()
        while f"{subjects.INFER}.>" not in self.bus.heard:
            self.beat()
            self._work()
            await asyncio.sleep(0.001)

    def beat(self) -> None:
        leases = tuple(Lease(self.batcher.name, slot, False) for slot in self._slots)
        handler, _ = self.bus.heard[subjects.EXECUTOR_BEAT]
        handler(ExecutorBeat("e", (REF,), SLOTS, leases))

    def turn(self) -> None:
        """All requests come, are sent, computed and answered."""
        if self._bundled:
            handler, decode = self.bus.heard[subjects.ask(self.batcher.name)]
            for one in self._asked:
                handler(decode(bytes(bytearray(one))))
        else:
            handler, _ = self.bus.heard[f"{subjects.INFER}.>"]
            for at, one in enumerate(self._asked):
                handler(Said(subjects.infer(MODEL), f"{INBOX}.{at}", bytes(bytearray(one))))
        self._work()
        while self.bus.batches:
            batches, self.bus.batches = self.bus.batches, []
            for batch in batches:
                slot = self._slots[batch.slot.index] = Slot(batch.slot.index, next(self._generations))
                self.batcher.receive(Result(batch.batch, "e", self._scores[: 4 * batch.rows], 1_000, grant=slot))
            self.batcher.turn()

    def _work(self) -> None:
        for _ in range(len(self.batcher.mailbox)):
            self.batcher.receive(self.batcher.mailbox.pop())
        self.batcher.turn()


async def measured(kind: str, rows: int, profile: cProfile.Profile | None = None) -> float:
    """µs a request."""
    bench = Bench(kind, rows)
    await bench.serve()
    for _ in range(WARM_TURNS):
        bench.turn()
    used = 0.0
    for turn in range(TURNS):
        if turn % 8 == 0:
            bench.beat()
        if profile is not None:
            profile.enable()
        started = time.thread_time()
        bench.turn()
        used += time.thread_time() - started
        if profile is not None:
            profile.disable()
    await bench.batcher.stop()
    return used / TURNS / IN_FLIGHT * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--profile", action="store_true", help="Say where the time goes, by cProfile.")
    wanted = parser.parse_args()
    keep_freed_memory()
    for kind in ("bundle", "plain"):
        for rows in (100, 1):
            best = min(asyncio.run(measured(kind, rows)) for _ in range(RUNS))
            print(f"{kind}, {rows} row{'s' * (rows > 1)}: {best:.1f} us a request")
            if wanted.profile:
                profile = cProfile.Profile()
                asyncio.run(measured(kind, rows, profile))
                pstats.Stats(profile).sort_stats("tottime").print_stats(30)


if __name__ == "__main__":
    main()
