"""The rows of the table: loads around what the system carries, and processes killed or frozen under load."""

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from msgspec.structs import replace

from narsil_stream.bench import serving
from narsil_stream.bench.chaos import monkey
from narsil_stream.bench.chaos.asks import write_model
from narsil_stream.bench.chaos.generator import End, Load, Phase, running
from narsil_stream.bench.chaos.plan import Plan, Row, Table
from narsil_stream.bench.chaos.refusing import AIM_S, Refusing
from narsil_stream.bench.chaos.seen import Processors, Seen, percentile
from narsil_stream.bench.report import machine

CAPACITY_S = 8.0
IN_FLIGHT = 128
LOAD_S = {80: 30.0, 100: 20.0, 200: 15.0, 500: 10.0}
"""How long the loads last, by per cent of capacity."""
SPIKE_S = (5.0, 5.0, 8.0)
"""Before, during, after."""
BASE, SPIKE = 0.6, 3.0
"""Load under which faults strike, as part of capacity; a spike is so many times it."""
KILL_S = 60.0
FREEZE_S = (3.0, 5.0, 4.0)
FREEZE_LEAST = 0.3
"""Length below which there would be no time to find out."""
CALM = 0.4
"""Load under which processes are frozen: what is measured is the wait for them, not for a device."""
PROMPT = 0.99
"""Of refusals, those that gateways have to give within `AIM_S`."""
SHARES = {"http": 0.4, "grpc": 0.3, "client": 0.3, "producer": 0.05}

Show = Callable[[float, str], None]
"""Seconds of load done since the last time, and what runs."""


def chaos(plan: Plan, show: Show, say: Callable[[str], None]) -> Table:
    """Run all rows of the plan against one system."""
    with tempfile.TemporaryDirectory(prefix="narsil-chaos-") as folder:
        model = Path(folder) / "model"
        write_model(model)
        with serving.pipeline(Path(folder) / "serve", model, *plan.options()) as pipeline:
            return Stage(plan, pipeline, show, say).table()


def seconds(plan: Plan) -> float:
    """Of load, in all."""
    rows = {str(part): plan.length * length for part, length in LOAD_S.items()}
    rows |= {"spike": plan.length * sum(SPIKE_S), "kill": plan.length * KILL_S, "kill-gateways": plan.length * KILL_S}
    frozen_s = max(plan.length, FREEZE_LEAST) * sum(FREEZE_S)
    rows |= {"freeze-batcher": frozen_s, "freeze-executor": frozen_s}
    return sum(rows[row] for row in plan.rows) + (0 if plan.capacity else CAPACITY_S)


class Stage:
    """A running system and what was found on it."""

    def __init__(self, plan: Plan, pipeline: serving.Pipeline, show: Show, say: Callable[[str], None]) -> None:
        self._plan = plan
        self._pipeline = pipeline
        self._show = show
        self._say = say
        self._capacity = plan.capacity
        self._goodput: dict[int, tuple[float, float]] = {}
        self._doors = {
            "http": f"127.0.0.1:{pipeline.http}",
            "grpc": f"127.0.0.1:{pipeline.grpc}",
            "client": pipeline.broker.url,
        }

    def table(self) -> Table:
        plan = self._plan
        monkey.wait_all_up(self._pipeline, plan.processes)
        measured = "" if plan.capacity else f", measured by {IN_FLIGHT} requests in flight"
        self._capacity = plan.capacity or self._measured_capacity()
        rows: list[Row] = []
        for name in plan.rows:
            rows += self._row(name)
            self._say(f"{rows[-1].what}: {rows[-1].result}")
        setting = [
            f"seed {plan.seed}; {plan.executors} executors, {plan.batchers} batchers, {plan.doors} HTTP gateways and "
            f"{plan.doors} for gRPC, a process each, over one broker on this machine",
            f"**no GPU: each executor {plan.pace}**; batches of up to {plan.max_rows} rows",
            f"requests of 1 to {plan.sizes.most} rows, log-normal, {plan.sizes.mean():.1f} on average; over HTTP, gRPC "
            f"and the Python client; budget {plan.budget_s:g} s from the intended time, Poisson arrivals",
            f"capacity {self._capacity:,.0f} requests/s{measured} ({plan.ceiling:,.0f} if every batch were full)",
        ]
        return Table(machine(), setting, rows)

    def _row(self, name: str) -> list[Row]:
        if name.isdecimal():
            return self._loaded(int(name))
        if name == "spike":
            return [self._spike()]
        if name.startswith("kill"):
            return [self._killed(with_gateways=name == "kill-gateways")]
        return [self._frozen(name.partition("-")[2])]

    # Loads

    def _load(self, phases: Sequence[Phase], budget_s: float, *, retry: bool = False, producers: bool = False) -> Load:
        doors = self._doors | ({"producer": self._pipeline.broker.url} if producers else {})
        return Load(doors, list(phases), self._plan.sizes, self._plan.seed, budget_s, SHARES, retry=retry)

    def _measured_capacity(self) -> float:
        self._show(0, "capacity")
        load = self._load([Phase(CAPACITY_S)], 60.0)
        with running(replace(load, in_flight=IN_FLIGHT)) as run:
            self._watch(run.start_s, CAPACITY_S, "capacity")
            outcome = run.outcome()
        records = outcome.records
        done = records["due_s"] + records["took_s"] - outcome.start_s
        counted = (done > CAPACITY_S / 4) & (done <= CAPACITY_S) & (records["end"] == End.RIGHT)
        # By rows: which requests were answered in so short a time is left to luck.
        return float(records["rows"][counted].sum()) / (CAPACITY_S * 3 / 4) / self._plan.sizes.mean()

    def _watch(self, start_s: float, length_s: float, what: str) -> None:
        """Shows how it goes on until that part of a load is over."""
        end_s, shown_s = start_s + length_s, time.monotonic()
        while (now := time.monotonic()) < end_s:
            time.sleep(min(0.5, end_s - now))
            self._show(time.monotonic() - shown_s, what)
            shown_s = time.monotonic()

    def _loaded(self, part: int) -> list[Row]:
        plan, length_s = self._plan, LOAD_S[part] * self._plan.length
        processors, refusing = Processors(), Refusing(self._pipeline.metrics)
        with running(self._load([Phase(length_s, self._capacity * part / 100)], plan.budget_s)) as run:
            self._watch(run.start_s, length_s, f"{part} % of capacity")
            seen = Seen(run.outcome(), plan.budget_s)
        requests, rows = self._goodput[part] = seen.goodput(length_s)
        details = [*told(seen, processors), f"{requests:,.0f} requests/s and {rows:,.0f} rows/s in time"]
        answered = seen.count(End.UNANSWERED, End.WRONG) == seen.double == 0
        what = f"Poisson at {part} % of capacity"
        if part <= 100:
            bar, missed = (0.001 if part < 100 else 0.003), seen.missed
            text = f"{100 - 100 * missed:.2f} % of {seen.admitted:,} admitted in time"
            kept = answered and missed <= bar
            return [Row(what, f">= {100 - 100 * bar:g} % in time", text, kept, details, seen.figures())]
        best = [max(one[at] for one in self._goodput.values()) for at in (0, 1)]
        share = min(requests / best[0], rows / best[1])
        text = (
            f"{100 * share:.0f} % of the best goodput; {100 * seen.missed:.2f} % of {seen.admitted:,} admitted missed"
        )
        kept = answered and share >= 0.9
        load = Row(what, ">= 90 % of the best goodput at any load", text, kept, details, seen.figures())
        refusing.wait(len(seen.refusals_ms("http")) + len(seen.refusals_ms("grpc")))
        return [load, refusals(what, seen, refusing)]

    def _spike(self) -> Row:
        plan = self._plan
        before, during, after = (plan.length * length for length in SPIKE_S)
        base = BASE * self._capacity
        processors = Processors()
        phases = [Phase(before, base), Phase(during, SPIKE * base), Phase(after, base)]
        with running(self._load(phases, plan.budget_s)) as run:
            self._watch(run.start_s, before + during + after, "spike")
            seen = Seen(run.outcome(), plan.budget_s)
        over_s = before + during
        starts = over_s + np.arange(0.0, after - 1.0, 0.1)
        tails = np.array([seen.tail_s(at, at + 1.0) for at in starts])
        bad = np.flatnonzero(tails > plan.target_s)
        back_s = 0.1 * (int(bad[-1]) + 1) if len(bad) else 0.0
        answered = seen.count(End.UNANSWERED, End.WRONG) == seen.double == 0
        return Row(
            f"{SPIKE:g}x spike of {during:g} s on {100 * BASE:.0f} % load",
            f"p99 back inside {1e3 * plan.target_s:.0f} ms within 1 s",
            f"back after {back_s:.1f} s",
            answered and back_s <= 1.0 and math.isfinite(float(tails[-1])),
            [
                *told(seen, processors),
                f"p99 {1e3 * seen.tail_s(0.5, before):.0f} ms before, {1e3 * seen.tail_s(before, over_s):.0f} ms "
                f"during, {1e3 * seen.tail_s(over_s + 1, over_s + after):.0f} ms from 1 s after it on",
            ],
            seen.figures() | {"back_s": back_s},
        )

    # Faults

    def _killed(self, with_gateways: bool) -> Row:
        plan, length_s = self._plan, KILL_S * self._plan.length
        kinds = ("batcher", "executor", *(("http gateway", "grpc gateway") if with_gateways else ()))
        monkey.wait_all_up(self._pipeline, plan.processes)
        processors = Processors()
        load = self._load([Phase(length_s, BASE * self._capacity)], plan.budget_s, retry=True, producers=True)
        with running(load) as run:
            what = f"kill -9 of {', '.join(kinds)}"
            killed = monkey.kill(
                self._pipeline, kinds, run.start_s + length_s - 1, plan.seed, lambda: self._show(monkey.EVERY_S, what)
            )
            seen = Seen(run.outcome(), plan.budget_s)
        unanswered, in_time = seen.count(End.UNANSWERED), 1 - seen.missed
        result = f"{unanswered} unanswered, {seen.wrong} wrong, {seen.double} double; {100 * in_time:.2f} % in time"
        details = [*told(seen, processors), f"killed: {killed}", lost(seen)]
        if with_gateways:
            result += f"; {seen.broken} connections broken"
            kept = seen.wrong == seen.double == 0
            return Row("the same with gateways killed too", "0 wrong, 0 double", result, kept, details, seen.figures())
        kept = unanswered == seen.wrong == seen.double == 0 and in_time >= 0.995
        return Row(
            f"kill -9 of a random batcher or executor each second for {length_s:g} s at {100 * BASE:.0f} % load",
            "0 unanswered, 0 wrong, 0 double; >= 99.5 % in time", result, kept, details, seen.figures(),
        )  # fmt: skip

    def _frozen(self, kind: str) -> Row:
        plan = self._plan
        before, during, after = (max(plan.length, FREEZE_LEAST) * length for length in FREEZE_S)
        monkey.wait_all_up(self._pipeline, plan.processes)
        victims = sorted(one.pid for one in monkey.up(self._pipeline) if one.kind == kind)
        victim = victims[plan.seed % len(victims)]
        processors = Processors()
        phases = [Phase(before + during + after, CALM * self._capacity)]
        with running(self._load(phases, plan.patient_s, producers=True)) as run:
            self._watch(run.start_s, before, f"{kind} frozen")
            with monkey.frozen(victim):
                since_s = time.monotonic() - run.start_s
                self._watch(time.monotonic(), during, f"{kind} frozen")
            self._watch(time.monotonic(), after, f"{kind} frozen")
            seen = Seen(run.outcome(), plan.patient_s)
        clean = seen.count(End.UNANSWERED) == seen.wrong == seen.double == 0
        held_ms = 1e3 * seen.tail_s(since_s + 1.0, since_s + during)
        return Row(
            f"one {kind} of {len(victims)} frozen for {during:g} s at {100 * CALM:.0f} % load",
            "nobody waits more than 1 s; 0 unanswered, wrong or double",
            f"the slowest took {seen.slowest_s:.2f} s; {seen.double} double after it woke up",
            clean and seen.slowest_s <= 1.0,
            [*told(seen, processors), f"p99 {held_ms:.0f} ms from 1 s after it froze until it woke up", lost(seen)],
            seen.figures(),
        )


def told(seen: Seen, processors: Processors) -> list[str]:
    """What must be known to read a row."""
    took_ms = [1e3 * percentile(seen.records["took_s"][seen.records["end"] == End.RIGHT], part) for part in (50, 99)]
    return [
        f"{len(seen.records):,} requests, p50 {took_ms[0]:.0f} ms, p99 {took_ms[1]:.0f} ms; not right and in time: "
        f"{seen.ends()}",
        f"the generator was late by {seen.late_ms:.1f} ms (p99); {processors}",
    ]


def refusals(what: str, seen: Seen, refusing: Refusing) -> Row:
    """As callers see them, whose own time shares the processors with all else, and as gateways do."""
    said = []
    for way in seen.ways:
        took_ms = seen.refusals_ms(way)
        said.append(f"{way} {percentile(took_ms, 50):.1f} and {percentile(took_ms, 99):.1f} ms")
    refused_ms = seen.refusals_ms()
    half, most = percentile(refused_ms, 50), percentile(refused_ms, 99)
    text = (
        f"{len(refused_ms):,}: half of them within {half:.1f} ms, 99 % within {most:.1f} ms; in gateways "
        f"{refusing.percentile_ms(50):g} and {refusing.percentile_ms(99):g} ms"
    )
    details = [f"half and 99 % of callers within, {', '.join(said)}", str(refusing)]
    kept = seen.refused_without_time == 0 and refusing.share(AIM_S) >= PROMPT
    bar = f">= {100 * PROMPT:g} % within {1e3 * AIM_S:g} ms in gateways; all say when to come back"
    figures = {
        "without_time": seen.refused_without_time,
        "callers_p50_ms": half,
        "callers_p99_ms": most,
        "gateways_within_5_ms": refusing.share(AIM_S),
        "refused_at_door": refusing.at_door / max(1, refusing.count),
    }
    return Row(f"refusals, {what}", bar, text, kept, details, figures)


def lost(seen: Seen) -> str:
    ends = seen.producers["end"]
    silent = int((ends == End.UNANSWERED).sum())
    return f"plain producers, who are promised one answer at most: {silent} of {len(ends):,} got none"
