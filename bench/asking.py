"""One server under test: asked once for checks, then loaded."""

import asyncio
from collections.abc import Callable
from typing import NamedTuple

import uvloop
from msgspec.structs import replace

from narsil_stream.bench import wrk
from narsil_stream.bench.callers import CALLERS, CONNECT_S, within
from narsil_stream.bench.figures import Figures, measure
from narsil_stream.bench.load import Load
from narsil_stream.bench.questions import Asked, Question, Way, WrongAnswer, check
from narsil_stream.bench.serving import Broker

CHECK_S = 0.5


class Server(NamedTuple):
    name: str
    way: Way
    port: int
    broker: Broker | None = None
    """That all requests must cross."""


def answers(server: Server, questions: list[Question], patience_s: float = CONNECT_S) -> list[bytes | None]:
    """Each question asked once, None for an error. Raises OSError (TimeoutError) for a server that does not answer."""

    async def ask() -> list[bytes | None]:
        caller = CALLERS[server.way.transport](server.port, questions, 1)
        async with within(patience_s, f"connection to {server.name} on port {server.port}"):
            await caller.open()
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[bytes | None]] = [loop.create_future() for _ in questions]
        for which, future in enumerate(futures):
            caller.ask(which, future.set_result)
        try:
            async with within(patience_s, f"answer from {server.name}"):
                return await asyncio.gather(*futures)
        finally:
            caller.close()

    found: list[bytes | None] = uvloop.run(ask())
    return found


def load_for(server: Server, asked: list[Asked], in_flight: int, seconds: float, tolerance: float) -> Load:
    """A closed loop for a server whose answers are right, to each question alone and to many at once.

    wrk compares no bytes: what mixes up rows of a batch must show here. Raises WrongAnswer, BadRun.
    """
    questions = [one.question for one in asked]
    got = []
    try:
        answered = answers(server, questions)
    except OSError as error:
        raise WrongAnswer(server.name, f"no answer over {server.way.name}: {error}") from error
    for one, answer in zip(asked, answered, strict=True):
        if answer is None:
            raise WrongAnswer(server.name, f"a question over {server.way.name} was refused or not answered")
        check(server.name, server.way, one, answer, tolerance)
        got.append(answer)
    rows = len(asked[0].scores)
    at = got[0].rfind(server.way.scores(got[0], rows).tobytes())  # not in JSON, where every byte must be the same
    load = Load(
        server.port,
        questions,
        got,
        in_flight,
        seconds,
        tolerance=tolerance,
        scores_at=max(at, 0),
        rows=rows if at >= 0 else 0,
        tensor_bytes=asked[0].tensor_bytes,
    )
    measure(server.name, replace(load, seconds=CHECK_S, warm_s=0.0))
    return load


def run_of(server: Server, load: Load, generators: int = 1, use_wrk: bool | None = None) -> Callable[[], Figures]:
    """A run, which raises Bypassed when requests did not cross the server's broker. `use_wrk` None: if it is there."""

    def run() -> Figures:
        before = server.broker.in_bytes() if server.broker else 0
        figures = measure(server.name, load, generators, wrk.available() if use_wrk is None else use_wrk)
        if server.broker:
            server.broker.since(server.name, before, (figures.sent - figures.failed) * load.tensor_bytes)
        return figures

    return run
