"""Scores a stream of rows: parts go out through a window, lines of scores come back in the order of the input."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from narsil_stream.cli.rows import Inputs, Part
from narsil_stream.cli.window import Window
from narsil_stream.schemas.errors import Fault, Refused

Scores = NDArray[np.float32]

LAST_WORDS_S = 2.0
"""How long an interrupted run may take to write what it has."""
TOLD = 10
"""Skips that are told one by one."""
SKIPPABLE = {
    Fault.INVALID_ARGUMENT, Fault.TOO_LARGE, Fault.OVERLOADED, Fault.CANCELLED, Fault.INTERNAL, Fault.DEADLINE_EXCEEDED,
}  # fmt: skip
"""What may hit one request and spare the next. Other errors end the run, or a lost broker would empty a whole file."""


class Stopped(Exception):
    """A row or a request was not scored, and the run ends there. The message says which and why."""

    def __init__(self, reason: str, refused: Refused | None = None) -> None:
        super().__init__(reason)
        self.refused = refused


class Tally(Struct):
    """What is written so far."""

    lines: int = 0
    rows: int = 0
    """Lines with a score."""
    skipped: int = 0
    """Lines that are empty because of an error."""


class Outcome(Struct, frozen=True):
    """What became of a part: scores, or why there are none."""

    part: Part
    scores: Scores
    refused: Refused | None = None


class Scoring:
    """One run. `tally` may be read at any time, also after the run has ended badly."""

    def __init__(
        self,
        ask: Callable[[Inputs], Awaitable[Scores]],
        write: Callable[[bytes], Awaitable[None]],
        *,
        window: int,
        rows_per_request: int,
        skip: bool,
        tell: Callable[[str], None],
    ) -> None:
        """`ask` raises `Refused`. `skip`: go on after a row or request that fails. `tell` gets a line about each."""
        self._ask = ask
        self._write = write
        self._window = Window(self._answer, window)
        self._rows_per_request = rows_per_request
        self._skip = skip
        self._tell = tell
        self._told = 0
        self._writing: asyncio.Task[None] | None = None
        self.tally = Tally()

    async def run(self, parts: AsyncIterator[Part]) -> None:
        """Score all. Raises `Stopped`, and whatever `parts` and `write` raise, once all before that is written.

        Cancelled, it writes what is complete before it ends.
        """
        feeder = asyncio.create_task(self._feed(parts))
        try:
            while outcomes := await self._window.take():
                self._writing = asyncio.create_task(self._emit(outcomes))
                await asyncio.shield(self._writing)
            await feeder
        except asyncio.CancelledError:
            with suppress(TimeoutError, Stopped, OSError):
                await asyncio.wait_for(self._last_words(), LAST_WORDS_S)
            raise
        finally:
            feeder.cancel()
            await asyncio.gather(feeder, return_exceptions=True)
            await self._window.cancel()

    async def _feed(self, parts: AsyncIterator[Part]) -> None:
        try:
            async for part in parts:
                if part.bad and not self._skip:
                    await self._put(part.between(part.first, part.bad[0].line))
                    raise Stopped(str(part.bad[0]))
                await self._put(part)
        finally:
            self._window.close()

    async def _put(self, part: Part) -> None:
        for request in part.split(self._rows_per_request):
            await self._window.put(request)

    async def _answer(self, part: Part) -> Outcome:
        if not len(part.inputs):
            return Outcome(part, np.empty(0, np.float32))
        try:
            return Outcome(part, await self._ask(part.inputs))
        except Refused as refused:
            return Outcome(part, np.empty(0, np.float32), refused)

    async def _emit(self, outcomes: list[Outcome]) -> None:
        """Write outcomes up to the first that stops the run."""
        texts: list[bytes] = []
        after = Tally(self.tally.lines, self.tally.rows, self.tally.skipped)
        stop: Stopped | None = None
        for outcome in outcomes:
            part, refused = outcome.part, outcome.refused
            if refused and not (self._skip and refused.fault in SKIPPABLE):
                stop = Stopped(f"{_lines(part)}: {refused.fault.name}: {refused.detail}", refused)
                break
            self._tell_skipped(part, refused)
            texts.append(text(part, outcome.scores))
            after.lines += part.lines
            after.rows += len(outcome.scores)
            after.skipped += len(part.bad) + len(part.places) - len(outcome.scores)
        if texts:
            await self._write(b"".join(texts))
            self.tally = after
        if stop:
            raise stop

    def _tell_skipped(self, part: Part, refused: Refused | None) -> None:
        reasons = [str(row) for row in part.bad]
        if refused:
            reasons.append(f"{_lines(part)}: {refused.fault.name}: {refused.detail}")
        for reason in reasons[: TOLD - self._told]:
            self._tell(f"skipped {reason}")
            self._told += 1
            if self._told == TOLD:
                self._tell("what else is skipped is only counted")

    async def _last_words(self) -> None:
        if self._writing is not None:
            await self._writing
        await self._emit(self._window.take_ready())


def text(part: Part, scores: Scores) -> bytes:
    """A line for each of the part's: a score that gives the same FP32 when it is read, or nothing."""
    if len(scores) == part.lines:
        return (b"%.9g\n" * part.lines) % tuple(scores.tolist())
    lines = [b""] * part.lines
    if len(scores):
        for place, score in zip(part.places.tolist(), scores.tolist(), strict=True):
            lines[place] = b"%.9g" % score
    return b"\n".join(lines) + b"\n" * bool(lines)


def _lines(part: Part) -> str:
    first, last = (part.first + int(part.places[i]) for i in (0, -1))
    return f"line {first}" if first == last else f"lines {first} to {last}"
