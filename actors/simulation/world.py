"""The clock, the bus and the actors of one run."""

import random
from collections import Counter
from collections.abc import Callable, Iterable
from heapq import heappop, heappush
from itertools import count
from typing import Any

from narsil_stream.actors.decisions import Rules
from narsil_stream.actors.queue import ModelKey
from narsil_stream.actors.simulation.actor import Actor
from narsil_stream.actors.simulation.batcher import Batcher
from narsil_stream.actors.simulation.executor import Executor
from narsil_stream.actors.simulation.gateway import Gateway
from narsil_stream.actors.simulation.messages import Message, told
from narsil_stream.actors.simulation.referee import Referee
from narsil_stream.actors.simulation.weather import ON_TIME, Faults, Weather
from narsil_stream.schemas.internal import Batch, Grant, ModelRef, Result

BEAT_US = 25_000
LEASE_US = 100_000
LATENCY_US = 100
RULES = Rules(
    max_rows=32,
    max_bytes=32 * 40,
    queue_rows=200,
    queue_bytes=200 * 40,
    lease_us=LEASE_US,
    failover_floor_us=10_000,
    failover_factor=4.0,
)
WORK = frozenset([Batch, Result, Grant])
PRIORITIES = ((1, 128, 128), (1, 1, 1, 128), (1, 2, 128))
TENANTS = (("",), ("",), ("a", "b"), ("a", "b", "b", "b", "b", "b"), ("a", "b", "c", "c", "c"))
"""Of one run; who stands there more often asks more often."""
MODELS = {name: ModelKey(name, "1", f"digest of {name}") for name in ("m", "n")}


class World:
    """Two or three of each actor, unless told otherwise. `trace`: lines for people are appended there."""

    beat_us = BEAT_US
    round_trip_us = 2 * LATENCY_US

    def __init__(
        self,
        seed: int,
        faults: Faults | None = None,
        actors: int | None = None,
        rules: Rules = RULES,
        trace: list[str] | None = None,
    ) -> None:
        self.rng = rng = random.Random(seed)
        self.trace = trace
        self.rules = rules
        self.now = 0
        self.tally: Counter[tuple[str, str]] = Counter()
        self.events = 0
        self.poison: set[int] = set()
        self.models = {name: MODELS[name] for name in rng.choice(("m", "m", "mn"))}
        self.actors: dict[str, Actor] = {}
        self.gateways: list[Gateway] = []
        self.batchers: list[Batcher] = []
        self.executors: list[Executor] = []
        self.executors_by_name: dict[str, Executor] = {}
        self._pass_us = rng.choice((1.0, 4.0))
        self._priorities = rng.choice(PRIORITIES)
        self._tenants = rng.choice(TENANTS)
        self._queue: list[tuple[int, int, Callable[..., object], tuple[Any, ...]]] = []
        self._order = count()
        self._names = {kind: count() for kind in ("gateway", "batcher", "executor")}
        self._numbers = count(1)
        self.weather = Weather(self, Faults.drawn(rng) if faults is None else faults)
        self.referee = Referee(self)
        for kind in self._names:
            for _ in range(actors or rng.choice((2, 2, 3))):
                self.add(kind)

    # Time

    def at(self, when_us: int, do: Callable[..., object], *args: object) -> None:
        heappush(self._queue, (when_us, next(self._order), do, args))

    def run_until(self, end_us: int) -> None:
        queue, check = self._queue, self.referee.check
        while queue and queue[0][0] <= end_us:
            when_us, _, do, args = heappop(queue)
            if when_us > self.now:
                check(when_us)
                self.now = when_us
            do(*args)
            self.events += 1
        check(end_us)
        self.now = end_us

    # Bus

    def send(self, sender: Actor, to: str, message: Message) -> None:
        if self.trace is not None and (text := told(message)):
            self.note(f"{sender.name} -> {to}", text)
        message, times = self.weather.fate(sender.name, to, message)
        if type(message) in WORK:
            executor = self._served_by(to, message)
            if executor is not None:
                executor.under_way += len(times)
        for late_us in times:
            self.at(self.now + LATENCY_US + late_us, self._deliver, to, message)

    def broadcast(self, sender: Actor, actors: Iterable[Actor], message: Message) -> None:
        """A heartbeat. All whom it reaches on time get it in one event."""
        told_as = told(message) if self.trace is not None else ""
        reached: list[Actor] = []
        for actor in actors:
            if told_as:
                self.note(f"{sender.name} -> {actor.name}", told_as)
            _, times = self.weather.fate(sender.name, actor.name, message)
            if times is ON_TIME:
                reached.append(actor)
                continue
            for late_us in times:
                self.at(self.now + LATENCY_US + late_us, self._deliver, actor.name, message)
        self.at(self.now + LATENCY_US, self._deliver_all, reached, message)

    def _deliver_all(self, actors: list[Actor], message: Message) -> None:
        for actor in actors:
            actor.take(message)

    def _deliver(self, to: str, message: Message) -> None:
        if type(message) in WORK:
            executor = self._served_by(to, message)
            if executor is not None:
                executor.under_way -= 1
        actor = self.actors.get(to)
        if actor is not None:
            actor.take(message)

    def _served_by(self, to: str, message: Message) -> Executor | None:
        """The executor that a message keeps from being idle."""
        return self.executors_by_name.get(message.executor if isinstance(message, Result | Grant) else to)

    # Actors

    def add(self, kind: str) -> None:
        """A new process, which nobody knows yet."""
        name = f"{kind[0]}{next(self._names[kind])}"
        actor: Actor
        if kind == "gateway":
            actor = Gateway(self, name)
            self.gateways.append(actor)
        elif kind == "batcher":
            actor = Batcher(self, name)
            self.batchers.append(actor)
        else:
            slots = self.rng.randint(1, 3)
            lanes = 1 + int(name[1:]) % slots  # not drawn, so that seeds from before there were lanes stay as they were
            actor = Executor(self, name, slots, lanes, self._served())
            self.executors.append(actor)
            self.executors_by_name[name] = actor
        self.actors[name] = actor
        self.note(name, "starts")
        self.at(self.now + self.rng.randrange(BEAT_US), actor.wake)

    def _served(self) -> tuple[ModelRef, ...]:
        """By a new executor: all models, or at times only one while another one serves all."""
        keys = list(self.models.values())
        if self.rng.random() < 0.5 and self._all_served():
            keys = keys[:1]
        return tuple(ModelRef(*key) for key in keys)

    def _all_served(self) -> bool:
        return any(len(one.models) == len(self.models) and one.phase == "up" for one in self.executors)

    def end_actor(self, actor: Actor) -> None:
        """It is no more, and what it held in memory is gone."""
        actor.alive = False
        self.note(actor.name, "is gone")
        del self.actors[actor.name]
        if isinstance(actor, Gateway):
            self.gateways.remove(actor)
            self.referee.lost_with(actor)
        elif isinstance(actor, Batcher):
            self.batchers.remove(actor)
        elif isinstance(actor, Executor):
            self.executors.remove(actor)
            del self.executors_by_name[actor.name]

    # Load

    def pass_us(self, rows: int, slowness: float) -> int:
        """How long a forward pass takes; in bad weather now and then much longer than usual."""
        if self.weather.bad and self.rng.random() < 0.02:
            slowness = max(slowness, 8.0)
        return int((500 + 20 * rows) * self._pass_us * self.rng.uniform(0.9, 1.1) * slowness)

    def ask(self, requests: int = 1, budget_us: int = 0, rows: int = 0) -> None:
        """So many requests at once, to one gateway; some callers leave before they are answered."""
        rng, bad = self.rng, self.weather.bad
        awake = [gateway for gateway in self.gateways if not gateway.frozen()]
        gateway = rng.choice(awake or self.gateways)
        if not awake:
            self.at(gateway.thaws_us, self.ask, requests, budget_us, rows)
            return
        for _ in range(requests):
            number = next(self._numbers)
            if bad and rng.random() < self.weather.faults.poison:
                self.poison.add(number)
            budget = budget_us or rng.choice((3_000, 20_000, 60_000, 150_000))
            model = rng.choice(tuple(self.models))
            priority, tenant = rng.choice(self._priorities), rng.choice(self._tenants)
            request = gateway.ask(number, model, rows or rng.choice((1, 1, 2, 8, 32)), priority, budget, tenant)
            if bad and rng.random() < 0.05:
                self.at(self.now + rng.randrange(budget), gateway.withdraw, request)
        gateway.step()

    def load(self, start_us: int, end_us: int, requests: int, budget_us: int = 0) -> None:
        """Requests in bursts."""
        while requests > 0:
            burst = min(requests, self.rng.choice((1, 1, 3, 20)))
            self.at(self.rng.randrange(start_us, end_us), self.ask, burst, budget_us)
            requests -= burst

    # For people

    def count(self, decision: str, who: str, detail: str = "") -> None:
        self.tally["decision", decision] += 1
        if self.trace is not None:
            self.note(who, f"{decision.partition(': ')[2]} {detail}")

    def note(self, who: str, what: str) -> None:
        if self.trace is not None:
            self.trace.append(f"{self.now / 1e3:9.3f} ms  {who:<12} {what}")
