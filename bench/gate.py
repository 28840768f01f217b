"""Whether a change made the hot path slower: `narsil bench gate`. Ratios inside one run, so any machine can judge.

Both sides of a ratio take turns, and the median of the turns' ratios counts: who shares the machine slows both.
"""

import contextlib
import statistics
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from narsil_stream.bench import serving
from narsil_stream.bench.asking import Server, load_for, run_of
from narsil_stream.bench.figures import Figures, Run, measure
from narsil_stream.bench.load import Load
from narsil_stream.bench.questions import WAYS
from narsil_stream.bench.shell import TOLERANCE, Say, questions_of, workplace

ROWS, IN_FLIGHT = 100, 64
ROUNDS, SECONDS = 5, 0.8


class Limit(NamedTuple):
    """`ratio` must be `least` or more. More is better in all of them."""

    ratio: str
    least: float
    what: str
    why: str
    """Why there: what was seen, and what the margin is for."""


LIMITS = {
    limit.ratio: limit
    for limit in (
        Limit(
            "scheduler",
            0.04,
            "tickets through `Scheduler` for each turn of a fixed loop of Python.",
            "0.057 to 0.058 alone, 0.053 to 0.055 beside a busy loop: steady, as only its own processor time counts.",
        ),
        Limit(
            "batcher",
            0.014,
            "requests of 100 rows through the batcher's actor, without sockets, for each turn of that loop.",
            "0.022 to 0.023 alone, 0.0185 to 0.0195 beside a busy loop, which takes its cache.",
        ),
        Limit(
            "nats requests",
            0.2,
            "requests/s over NATS beside the echo: catches a wait that takes no processor.",
            "0.39 to 0.63: five processes share two cores, and who gets one when is chance.",
        ),
        Limit(
            "nats processor",
            0.27,
            "the echo's processor time for a request, broker included, beside ours: catches needless work.",
            "0.39 to 0.52: batches are larger when processes wait for each other, and cost less.",
        ),
        Limit(
            "http requests",
            0.13,
            "requests/s over HTTP beside the echo over NATS.",
            "0.25 to 0.33: as over NATS; a gateway more, and the generator's HTTP in Python.",
        ),
        Limit(
            "http processor",
            0.135,
            "the echo's processor time for a request over NATS beside ours over HTTP.",
            "0.19 to 0.25: as over NATS.",
        ),
        Limit(
            "http messages",
            1.5,
            "requests over HTTP for each message that the broker receives: what is bundled in a turn.",
            "8.0 to 8.4, and below 1 with a message for each answer. Faster processors bundle less: a wide margin.",
        ),
    )
}
"""Medians of six runs on two cores, three of them beside a busy loop. What counts processor time is a quarter to 31 %
below the lowest of them, what counts requests a half, as chance has a part in it; messages: two runs. Where there are
more cores, the pipeline gains more than the echo, which is one process: limits hold there, and notice less."""

Measure = Callable[[], Mapping[str, list[float]]]
"""Ratios of each turn, by name."""


class Verdict(Struct, frozen=True):
    limit: Limit
    turns: list[float]
    again: bool = False
    """It missed, and these are the turns of the second try."""

    @property
    def ratio(self) -> float:
        return statistics.median(self.turns)

    @property
    def kept(self) -> bool:
        return self.ratio >= self.limit.least


def judge(parts: Mapping[str, tuple[tuple[str, ...], Measure]], say: Say) -> list[Verdict]:
    """`parts`: what is measured together, and the ratios that it gives. A part with a miss is measured once more.

    A ratio that missed is judged by its second try; one that held is not judged again.
    """
    verdicts: dict[str, Verdict] = {}
    for name, (ratios, measured) in parts.items():
        say(name)
        turns = measured()
        verdicts |= {ratio: Verdict(LIMITS[ratio], turns[ratio]) for ratio in ratios}
        missed = [ratio for ratio in ratios if not verdicts[ratio].kept]
        if missed:
            say(f"{name}: {', '.join(missed)} below the limit; once more")
            turns = measured()
            verdicts |= {ratio: Verdict(LIMITS[ratio], turns[ratio], again=True) for ratio in missed}
    return list(verdicts.values())


def table(verdicts: list[Verdict]) -> str:
    lines = ["| ratio | limit | found | turns | verdict |", "|---" * 5 + "|"]
    for one in verdicts:
        seen = f"{min(one.turns):.3g} to {max(one.turns):.3g}{', second try' if one.again else ''}"
        mark = "held" if one.kept else "MISSED"
        lines.append(f"| {one.limit.ratio} | {one.limit.least:.3g} | {one.ratio:.3g} | {seen} | {mark} |")
    return "\n".join(lines)


def complaint(verdicts: list[Verdict]) -> str:
    """What regressed, by how much, and what to do; "" when all limits are held."""
    missed = [one for one in verdicts if not one.kept]
    if not missed:
        return ""
    lines = [
        f"{one.limit.ratio}: {one.ratio:.3g}, {100 * (1 - one.ratio / one.limit.least):.0f} % below its limit of "
        f"{one.limit.least:.3g}, twice. It is {one.limit.what}"
        for one in missed
    ]
    return "\n".join(
        [
            "slower than the limits allow:",
            *lines,
            "Next: run `narsil bench gate` on the commit before, on this machine. If that holds, look at the change "
            "with `narsil bench broker` and `python -m narsil_stream.cli.bench_batcher --profile`; if it misses too, "
            "this machine is not like those that the limits in bench/gate.py were found on.",
        ]
    )


class Turn(NamedTuple):
    """One side in one turn."""

    figures: Figures
    processor_s: float
    """Of the processes under test; the generator's is not counted."""
    messages: int
    """That the broker received."""

    @property
    def each_s(self) -> float:
        return self.processor_s / self.figures.sent


SERVED = ("nats requests", "nats processor", "http requests", "http processor", "http messages")


def served(say: Say, rounds: int = ROUNDS) -> Mapping[str, list[float]]:
    """The pipeline around a model that costs nothing, over NATS and HTTP, against a bare echo over NATS."""
    ratios: dict[str, list[float]] = {name: [] for name in SERVED}
    with (
        workplace("shell") as (folder, model, backend),
        serving.pipeline(folder / "batch", model, "--backend", "noop") as ours,
        contextlib.ExitStack() as stack,
    ):
        pids = [pid for of in ours.processes.values() for pid in of]
        sides: dict[str, Callable[[], Turn]] = {}
        for name in ("nats", "http"):
            way = WAYS[name]
            server = Server(name, way, ours.port(way.transport), ours.broker)
            load = load_for(server, questions_of(way, backend, ROWS, "shell"), IN_FLIGHT, SECONDS, TOLERANCE["shell"])
            sides[name] = _timed(run_of(server, load, use_wrk=False), ours.broker, pids)
            if name == "nats":
                sides["echo"] = stack.enter_context(_echo(load, folder))
        for number in range(rounds):
            turns = {name: run() for name, run in sides.items()}
            speeds = ", ".join(f"{name} {turn.figures.requests_per_s:,.0f}" for name, turn in turns.items())
            say(f"  round {number + 1}/{rounds}, requests/s: {speeds}")
            echo = turns.pop("echo")
            for name, turn in turns.items():
                ratios[f"{name} requests"].append(turn.figures.requests_per_s / echo.figures.requests_per_s)
                ratios[f"{name} processor"].append(echo.each_s / turn.each_s)
            ratios["http messages"].append(turns["http"].figures.sent / turns["http"].messages)
    return ratios


@contextlib.contextmanager
def _echo(load: Load, folder: Path) -> Iterator[Callable[[], Turn]]:
    """nats-py behind a broker of its own; the bytes of `load`."""
    answer = load.answers[0]
    with serving.own_broker(folder) as broker, serving.echo("nats", answer, folder, broker.url) as (port, pid):
        same = replace(load, port=port, answers=[answer] * len(load.answers))
        yield _timed(lambda: measure("echo", same), broker, [broker.pid, pid])


def _timed(run: Run, broker: serving.Broker, pids: list[int]) -> Callable[[], Turn]:
    def timed() -> Turn:
        messages, used_s = broker.in_messages(), sum(map(serving.cpu_s, pids))
        figures = run()
        used_s = sum(map(serving.cpu_s, pids)) - used_s
        return Turn(figures, used_s, broker.in_messages() - messages)

    return timed
