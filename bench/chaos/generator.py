"""A load generator and referee in a process of its own: `python -m narsil_stream.bench.chaos.generator`.

Reads a `Load` from stdin; says on stdout when its first second begins, and at the end what became of every request.
Open loop: each request has an intended time, drawn beforehand, and its budget and its latency count from then.
"""

import asyncio
import enum
import gc
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from typing import Any

import msgspec
import numpy as np
import uvloop
from msgspec import Struct
from numpy.typing import NDArray

from narsil_stream.bench.chaos.asks import Asks, Sizes
from narsil_stream.bench.chaos.doors import Broken, Door, door
from narsil_stream.bench.load import LoadFailed, tick
from narsil_stream.schemas.codec import UNDECODABLE
from narsil_stream.schemas.errors import Fault, Refused

GRACE_S = 3.0
"""Beyond its budget, until a request counts as never answered."""
AGAIN_S = 0.02
"""Until a request is sent again whose connection broke."""
LEAD_S = 0.3


class End(enum.IntEnum):
    """How a request ended. `RIGHT` says nothing of when."""

    RIGHT = 0
    WRONG = 1
    UNANSWERED = 2
    BROKEN = 3
    """Connections broke until the budget was out."""
    OVERLOADED = 4
    DEADLINE_EXCEEDED = 5
    UNAVAILABLE = 6
    OTHER = 7


RECORD = np.dtype([
    ("due_s", "f8"), ("took_s", "f4"), ("late_s", "f4"), ("retry_after_us", "u4"),
    ("rows", "u2"), ("way", "u1"), ("end", "u1"), ("broken", "u1"),
])  # fmt: skip
"""One request. due_s: intended time, monotonic; late_s: how much later the generator got to it; way: index in
`Load.doors`; broken: connections that broke under it."""


class Phase(Struct, frozen=True):
    seconds: float
    rate: float = 0.0
    """Requests a second, Poisson. 0: closed loop."""


class Load(Struct, frozen=True):
    doors: dict[str, str]
    """Address of each way: http, grpc, client, producer."""
    phases: list[Phase]
    sizes: Sizes
    seed: int
    budget_s: float
    shares: dict[str, float] = {}
    """Of the requests, by way; even where nothing is said."""
    in_flight: int = 0
    """Closed loop."""
    retry: bool = False
    """Whether the Python client tries again what was refused; off, refusals are seen."""

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases)


class Outcome(Struct, frozen=True):
    ways: list[str]
    start_s: float
    """Monotonic time at which the first phase began."""
    table: bytes
    """Of `RECORD`."""
    surplus: int
    """Answers beyond the first to a request."""

    @property
    def records(self) -> NDArray[Any]:
        return np.frombuffer(self.table, RECORD)


class Run:
    """A generator at work."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        assert process.stdout is not None
        self._out = process.stdout
        line = self._out.readline()
        if not line:
            raise LoadFailed(f"the load generator ended with status {process.wait()} before it began")
        self.start_s = float(line)

    def outcome(self) -> Outcome:
        """Waits for its end."""
        data = self._out.read()
        if self._process.wait():
            raise LoadFailed(f"the load generator ended with status {self._process.returncode}")
        return msgspec.msgpack.decode(data, type=Outcome)


@contextmanager
def running(load: Load) -> Iterator[Run]:
    """A generator that has its connections; its first second is about to begin."""
    command = [sys.executable, "-m", "narsil_stream.bench.chaos.generator"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None
    try:
        process.stdin.write(msgspec.msgpack.encode(load))
        process.stdin.close()
        yield Run(process)
    finally:
        process.kill()
        process.wait()


class Generator:
    """One use."""

    def __init__(self, load: Load) -> None:
        self._load = load
        rng = np.random.default_rng(load.seed)
        ends = np.cumsum([phase.seconds for phase in load.phases])
        arrivals = [
            end - phase.seconds + phase.seconds * rng.random(rng.poisson(phase.rate * phase.seconds))
            for phase, end in zip(load.phases, ends, strict=True)
        ]
        self._due: NDArray[np.float64] = np.sort(np.concatenate(arrivals))
        count = len(self._due) or 1 << 16
        self._asks = Asks(load.seed, load.sizes.draw(rng, count))
        shares = np.array([load.shares.get(way, 1.0) for way in load.doors])
        self._ways = rng.choice(len(shares), count, p=shares / shares.sum())
        self._records = np.zeros(count, RECORD)
        self._asked = 0
        self._doors: list[Door] = []

    async def run(self) -> Outcome:
        async with AsyncExitStack() as stack:
            for way, address in self._load.doors.items():
                opened = door(way, address, self._load.retry)
                await opened.open()
                stack.push_async_callback(opened.close)
                self._doors.append(opened)
            start_s = time.monotonic() + LEAD_S
            sys.stdout.buffer.write(b"%.6f\n" % start_s)
            sys.stdout.buffer.flush()
            gc.disable()  # pauses would look like the server's
            await (self._open_loop(start_s) if self._load.in_flight == 0 else self._closed_loop(start_s))
            surplus = sum(one.surplus for one in self._doors)
            return Outcome(list(self._load.doors), start_s, self._records[: self._asked].tobytes(), surplus)

    async def _open_loop(self, start_s: float) -> None:
        due = self._due + start_s
        loop, turn = asyncio.get_running_loop(), asyncio.Event()
        # `tick` sleeps by another clock that runs at the same speed.
        by_counter = due + (time.perf_counter() - time.monotonic())
        wake = lambda: loop.call_soon_threadsafe(turn.set)  # noqa: E731
        threading.Thread(target=tick, args=(by_counter, wake), daemon=True).start()
        async with asyncio.TaskGroup() as asking:  # a request that fails in a way of its own ends the run
            while self._asked < len(due):
                await turn.wait()
                turn.clear()
                now = time.monotonic()
                while self._asked < len(due) and due[self._asked] <= now:
                    asking.create_task(self._ask(self._asked, float(due[self._asked])))
                    self._asked += 1

    async def _closed_loop(self, start_s: float) -> None:
        end_s = start_s + self._load.seconds

        async def forever() -> None:
            while (now := time.monotonic()) < end_s:
                number = self._asked
                self._asked += 1
                await self._ask(number, now)

        await asyncio.sleep(start_s - time.monotonic())
        await asyncio.gather(*(forever() for _ in range(self._load.in_flight)))

    async def _ask(self, number: int, due_s: float) -> None:
        record = self._records[number]
        deadline_s = due_s + self._load.budget_s
        record["due_s"], record["late_s"] = due_s, time.monotonic() - due_s
        record["rows"], record["way"] = self._asks.rows(number), self._ways[number]
        end = End.UNANSWERED
        with suppress(TimeoutError):
            async with asyncio.timeout(max(0.0, deadline_s + GRACE_S - time.monotonic())):
                end = await self._until_ended(number, deadline_s)
        record["end"], record["took_s"] = end, time.monotonic() - due_s

    async def _until_ended(self, number: int, deadline_s: float) -> End:
        """Asks again when a connection broke, as callers do: scoring twice does no harm."""
        record, way, request = self._records[number], self._doors[self._ways[number]], self._asks.request(number)
        while True:
            try:
                answer = await way.ask(request, max(0.001, deadline_s - time.monotonic()))
                return End.RIGHT if self._asks.right(number, answer) else End.WRONG
            except Refused as refused:
                record["retry_after_us"] = refused.retry_after_us
                return ENDS.get(refused.fault, End.OTHER)
            except UNDECODABLE:
                return End.WRONG
            except Broken:
                record["broken"] = min(255, record["broken"] + 1)
                if time.monotonic() + AGAIN_S >= deadline_s:
                    return End.BROKEN
                await asyncio.sleep(AGAIN_S)


ENDS = {
    Fault.OVERLOADED: End.OVERLOADED,
    Fault.DEADLINE_EXCEEDED: End.DEADLINE_EXCEEDED,
    Fault.UNAVAILABLE: End.UNAVAILABLE,
}


def main() -> None:
    load = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Load)
    outcome = uvloop.run(Generator(load).run())
    sys.stdout.buffer.write(msgspec.msgpack.encode(outcome))


if __name__ == "__main__":
    main()
