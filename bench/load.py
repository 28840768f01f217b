"""Load generators in processes of their own: closed loop, and open loop with Poisson arrivals.

`python -m narsil_stream.bench.load` reads a `Load` from stdin and writes an `Outcome` to stdout, both msgpack; whatever
else is printed there goes to stderr.

Open loop: a request has an intended time, drawn beforehand. Its latency counts from then, whether the generator, a free
connection or the server was late, so that a server which stands still cannot hide the requests that it kept away.
"""

import asyncio
import contextlib
import gc
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from typing import IO

import msgspec
import numpy as np
import uvloop
from msgspec import Struct
from msgspec.structs import replace
from numpy.typing import NDArray

from narsil_stream.bench.callers import CALLERS, Caller
from narsil_stream.bench.questions import Question

LINGER_S = 10.0
"""How long answers may take after the last request of an open loop."""


class Load(Struct, frozen=True):
    """What one generator does."""

    port: int
    questions: list[Question]
    answers: list[bytes]
    """The right answers."""
    in_flight: int
    """Closed loop: so many requests at all times. HTTP: so many connections."""
    seconds: float
    warm_s: float = 0.3
    """Before that, what is sent does not count."""
    rate: float = 0.0
    """Open loop: requests a second. 0: closed loop."""
    seed: int = 1
    tolerance: float = 0.0
    """By so much scores may differ from those in `answers`; all other bytes must be the same."""
    scores_at: int = 0
    rows: int = 0
    """Where an answer's scores lie, FP32, and how many."""
    tensor_bytes: int = 0
    """What a question weighs without framing, for whoever checks that it crossed the broker."""


class Outcome(Struct, frozen=True):
    """What generators saw. Only what was answered rightly in the measured time counts as `good`."""

    sent: int
    """All that went out, warm-up included."""
    good: int
    wrong: int
    """Answers that differ from the right ones."""
    failed: int
    """Refused, or never answered."""
    seconds: float
    latencies_ms: bytes
    """FP32, of `good`."""
    lateness_ms: bytes = b""
    """FP32; open loop: how long after its intended time a request left the generator's own timer."""

    @property
    def latencies(self) -> NDArray[np.float32]:
        return np.frombuffer(self.latencies_ms, np.float32)


class LoadFailed(RuntimeError):
    """A generator ended without an outcome; says what it said last."""


def run(load: Load, processes: int = 1) -> Outcome:
    """Run generators at the same time, which share connections and rate; their outcomes are joined.

    Never more of them than requests in flight. Raises LoadFailed.
    """
    shares = _shares(load, min(processes, load.in_flight))
    command = [sys.executable, "-m", "narsil_stream.bench.load"]
    with contextlib.ExitStack() as stack:
        said = [stack.enter_context(tempfile.TemporaryFile()) for _ in shares]
        running = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=file) for file in said
        ]
        for process in running:
            stack.callback(_end, process)
        for process, share in zip(running, shares, strict=True):
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError), process.stdin:  # one that ended says why
                process.stdin.write(msgspec.msgpack.encode(share))
        return joined([_outcome(process, file) for process, file in zip(running, said, strict=True)])


def _shares(load: Load, processes: int) -> list[Load]:
    each, more = divmod(load.in_flight, processes)
    return [
        replace(load, in_flight=each + (number < more), rate=load.rate / processes, seed=load.seed + number)
        for number in range(processes)
    ]


def _outcome(process: subprocess.Popen[bytes], said: IO[bytes]) -> Outcome:
    """A process without an outcome failed whatever its status, which reads 0 where SIGCHLD is ignored."""
    assert process.stdout is not None
    data = process.stdout.read()
    status = process.wait()
    try:
        outcome = msgspec.msgpack.decode(data, type=Outcome)
    except msgspec.DecodeError as error:
        problem = f"an outcome of {len(data)} bytes ({error})" if data else "no outcome"
    else:
        if not status:
            return outcome
        problem = "its outcome written"
    said.seek(0)
    last = said.read().decode(errors="replace").strip()[-1500:] or "nothing"
    raise LoadFailed(f"a load generator ended with status {status} and {problem}. It said: {last}")


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def joined(outcomes: list[Outcome]) -> Outcome:
    return Outcome(
        sent=sum(one.sent for one in outcomes),
        good=sum(one.good for one in outcomes),
        wrong=sum(one.wrong for one in outcomes),
        failed=sum(one.failed for one in outcomes),
        seconds=max(one.seconds for one in outcomes),
        latencies_ms=b"".join(one.latencies_ms for one in outcomes),
        lateness_ms=b"".join(one.lateness_ms for one in outcomes),
    )


class Generator:
    """Asks by a caller and keeps count. One use."""

    def __init__(self, load: Load, caller: Caller) -> None:
        self._load = load
        self._caller = caller
        self._sent = self._wrong = self._failed = 0
        self._open = 0
        self._latencies: list[float] = []
        self._lateness: list[float] = []
        self._last_done = 0.0
        self._quiet = asyncio.Event()

    async def run(self) -> Outcome:
        await self._caller.open()
        gc.disable()  # a short life, and pauses would look like the server's
        try:
            seconds = await (self._open_loop() if self._load.rate else self._closed_loop())
        finally:
            gc.enable()
            self._caller.close()
        return Outcome(
            self._sent,
            len(self._latencies),
            self._wrong,
            self._failed + self._open,
            seconds,
            np.array(self._latencies, np.float32).tobytes(),
            np.array(self._lateness, np.float32).tobytes(),
        )

    async def _closed_loop(self) -> float:
        start = time.perf_counter() + self._load.warm_s
        end = start + self._load.seconds

        def again() -> None:
            now = time.perf_counter()
            if now < end:
                self._ask(now, start, end, again)

        for _ in range(self._load.in_flight):
            again()
        await asyncio.sleep(end - time.perf_counter())
        await self._until_quiet()
        return self._load.seconds

    async def _open_loop(self) -> float:
        load = self._load
        gaps = np.random.default_rng(load.seed).exponential(
            1 / load.rate, int(load.rate * (load.seconds + load.warm_s))
        )
        first = time.perf_counter() + 0.01
        due = first + np.cumsum(gaps)
        start, at = first + load.warm_s, 0
        loop, turn = asyncio.get_running_loop(), asyncio.Event()
        clock = threading.Thread(target=tick, args=(due, lambda: loop.call_soon_threadsafe(turn.set)), daemon=True)
        clock.start()
        while at < len(due):
            await turn.wait()
            turn.clear()
            now = time.perf_counter()
            while at < len(due) and due[at] <= now:
                self._lateness.append((now - due[at]) * 1e3)
                self._ask(float(due[at]), start, float("inf"), _nothing)
                at += 1
        await self._until_quiet()
        # What arrived in the measured time counts however late its answer was; a server that lags takes longer.
        return max(float(due[-1]), self._last_done) - start if len(due) else load.seconds

    def _ask(self, since: float, start: float, end: float, then: Callable[[], None]) -> None:
        """Its latency counts from `since`; it counts at all when it was due after `start` and answered before `end`."""
        which = self._sent % len(self._load.questions)
        self._sent += 1
        self._open += 1

        def done(answer: bytes | None) -> None:
            now = self._last_done = time.perf_counter()
            self._open -= 1
            if answer is None:
                self._failed += 1
            elif answer != self._load.answers[which] and not self._close_enough(answer, self._load.answers[which]):
                self._wrong += 1
            elif since >= start and now <= end:
                self._latencies.append((now - since) * 1e3)
            if not self._open:
                self._quiet.set()
            then()

        self._caller.ask(which, done)

    def _close_enough(self, answer: bytes, right: bytes) -> bool:
        """A real engine's scores depend on the batch in their last bits."""
        start, end = self._load.scores_at, self._load.scores_at + 4 * self._load.rows
        if len(answer) != len(right) or answer[:start] != right[:start] or answer[end:] != right[end:]:
            return False
        found, expected = (np.frombuffer(one[start:end], np.float32) for one in (answer, right))
        return bool((np.abs(found - expected) <= self._load.tolerance).all())

    async def _until_quiet(self) -> None:
        """What never comes is counted as failed."""
        try:
            async with asyncio.timeout(LINGER_S):
                while self._open:
                    self._quiet.clear()
                    await self._quiet.wait()
        except TimeoutError:
            pass


def _nothing() -> None:
    pass


def tick(due: NDArray[np.float64], wake: Callable[[], object]) -> None:
    """The event loop's own timers are a millisecond coarse; a thread's sleep is not."""
    at = 0
    while at < len(due):
        wait = due[at] - time.perf_counter()
        if wait > 0:
            time.sleep(wait)
        at = int(np.searchsorted(due, time.perf_counter(), side="right"))
        try:
            wake()
        except RuntimeError:  # the loop is closed
            return


def main() -> None:
    """The outcome is out before the interpreter ends: what a library's threads do at that time cannot cost it."""
    outcome_to = os.dup(1)
    os.dup2(2, 1)
    load = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Load)

    async def generate() -> Outcome:
        caller = CALLERS[load.questions[0].transport](load.port, load.questions, load.in_flight)
        return await Generator(load, caller).run()

    outcome = uvloop.run(generate())
    with os.fdopen(outcome_to, "wb") as out:
        out.write(msgspec.msgpack.encode(outcome))


if __name__ == "__main__":
    main()
