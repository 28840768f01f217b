"""Batchers and executors on a simulated bus, driven by a simulated clock and seeded faults. One seed, one run, always.

Only the policies are real (`Scheduler`, `Ledger`); the actors around them are copied here in miniature. While faults
last, messages are dropped, delayed (so that they overtake each other) and doubled, executors and batchers crash, leave
and freeze. Then all is calm: what was asked for and every slot must come back. The rules are checked after each event.
"""

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

from msgspec.structs import replace

from narsil_stream.actors.decisions import Decision, Dispatch, Drop, Plead, Rules
from narsil_stream.actors.leasing import Ledger
from narsil_stream.actors.queue import ModelKey, State, Ticket
from narsil_stream.actors.scheduling import MAX_SENDS, Scheduler
from narsil_stream.schemas.errors import Fault, Refused
from narsil_stream.schemas.internal import Batch, BatcherBeat, Demand, ExecutorBeat, Grant, ModelRef, Result

MODEL = ModelKey("m", "1", "digest")
REF = ModelRef("m", "1", "digest")
BEAT_US = 20_000
LEASE_US = 100_000
GRACE_US = 100_000
"""An end comes within the budget and this much."""
LATENCY_US = 100
NOTHING = memoryview(b"")
RULES = Rules(
    max_rows=32,
    max_bytes=32 * 40,
    queue_rows=200,
    queue_bytes=200 * 40,
    lease_us=LEASE_US,
    failover_floor_us=10_000,
    failover_factor=4.0,
)

Message = Batch | Demand | Result | Grant | ExecutorBeat | BatcherBeat


@dataclass(frozen=True)
class Faults:
    """How bad the weather is. Shares are of messages; the counts are of events over the faulty time."""

    drop: float = 0.0
    delay: float = 0.0
    double: float = 0.0
    crashes: int = 0
    goodbyes: int = 0
    freezes: int = 0
    poison: float = 0.0
    """Share of requests whose forward pass raises."""

    @staticmethod
    def drawn(rng: random.Random) -> "Faults":
        def some(most: float) -> float:
            return rng.choice((0.0, rng.uniform(0, most)))

        return Faults(
            drop=some(0.2),
            delay=some(0.3),
            double=some(0.1),
            crashes=rng.choice((0, 0, 1, 3)),
            goodbyes=rng.choice((0, 0, 1, 2)),
            freezes=rng.choice((0, 0, 1, 4)),
            poison=some(0.02),
        )


class Actor:
    """A process: it handles one message at a time, and none while it is frozen."""

    def __init__(self, world: "World", name: str) -> None:
        self.world = world
        self.name = name
        self.alive = True
        self.thaws_us = 0
        self.beat_due_us = 0
        self._alarm = 0

    def take(self, message: Message) -> None:
        self.world.when_awake(self, lambda: self._step(message))

    def wake(self) -> None:
        self.world.when_awake(self, lambda: self._step(None))

    def _step(self, message: Message | None) -> None:
        if message is not None:
            self.receive(message)
        due_us = self.turn()
        self._alarm += 1
        self.world.at(max(due_us, self.world.now), self._ring, self._alarm)

    def _ring(self, alarm: int) -> None:
        if alarm == self._alarm:
            self.wake()

    def receive(self, message: Message) -> None:
        raise NotImplementedError

    def turn(self) -> int:
        """Returns when to be called again."""
        raise NotImplementedError


class SimulatedBatcher(Actor):
    """As `actors.batcher`. A score is its ticket's id, so a swapped row would show."""

    def __init__(self, world: "World", name: str, rules: Rules) -> None:
        super().__init__(world, name)
        self.policy = Scheduler(name, rules)
        self.open: dict[int, Ticket] = {}

    def offer(self, ticket: Ticket) -> None:
        try:
            self.policy.offer(ticket, self.world.now)
        except Refused as refused:
            self.world.ended(ticket, refused.fault.name)
            return
        self.open[ticket.id] = ticket
        self.wake()

    def cancel(self, ticket: Ticket) -> None:
        if self.open.pop(ticket.id, None) is not None:
            self.policy.cancel(ticket)
            self.world.ended(ticket, Fault.CANCELLED.name)

    def receive(self, message: Message) -> None:
        policy, now = self.policy, self.world.now
        if isinstance(message, Result):
            tickets, decisions = policy.result(message, now)
            self._act(decisions)
            self._score(tickets, message)
        elif isinstance(message, ExecutorBeat):
            self._act(policy.beat(message, now))
        elif isinstance(message, Grant):
            policy.grant(message.executor, message.slot)

    def turn(self) -> int:
        now = self.world.now
        self._act(self.policy.decide(now))
        if now >= self.beat_due_us:
            self.beat_due_us = now + BEAT_US
            deadlines = [q.earliest_deadline() for q in self.policy.queues.values()]
            slack_us = max(0, min((due for due in deadlines if due is not None), default=now) - now)
            self.world.broadcast(self, BatcherBeat(self.name, (REF,), 0, self.policy.rows, slack_us))
        wake_us = self.policy.wake_us(now)
        return self.beat_due_us if wake_us is None else min(wake_us, self.beat_due_us)

    def _act(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            if isinstance(decision, Drop):
                del self.open[decision.ticket.id]
                self.world.ended(decision.ticket, decision.fault.name)
            elif isinstance(decision, Plead):
                self.world.send(decision.executor, decision.demand)
            elif isinstance(decision, Dispatch):
                self.world.dispatched(self, decision)
                self.world.send(decision.executor, self._join(decision))

    def _join(self, decision: Dispatch) -> Batch:
        rows = memoryview(b"".join(t.id.to_bytes(4, "little") * t.rows for t in decision.tickets))
        return Batch(
            decision.batch, self.name, decision.slot, *decision.model, decision.rows,
            rows, NOTHING, NOTHING, decision.budget_us, decision.demand,
        )  # fmt: skip

    def _score(self, tickets: list[Ticket], result: Result) -> None:
        at = 0
        for ticket in tickets:
            scores = result.scores[at : at + 4 * ticket.rows]
            at += 4 * ticket.rows
            if ticket.state is State.DONE:
                continue
            assert scores == ticket.id.to_bytes(4, "little") * ticket.rows, "somebody else's scores"
            ticket.state = State.DONE
            del self.open[ticket.id]
            self.world.ended(ticket, "scored")


@dataclass(frozen=True)
class Computed:
    batch: Batch
    result: Result


class SimulatedExecutor(Actor):
    """As `actors.executor`: one batch is computed at a time."""

    def __init__(self, world: "World", name: str, slots: int) -> None:
        super().__init__(world, name)
        self.ledger = Ledger(name, slots, LEASE_US)
        self.inside = 0
        self.most_inside = 0
        self.free_us = 0
        self.phase = "up"

    def receive(self, message: Message | Computed) -> None:
        now = self.world.now
        if isinstance(message, Batch):
            self._accept(message)
        elif isinstance(message, Computed):
            self._finish(message)
        elif isinstance(message, Demand):
            self.ledger.demand(message, now)
        elif isinstance(message, BatcherBeat):
            self.ledger.beat(message, now)

    def turn(self) -> int:
        now = self.world.now
        self.ledger.expire(now)
        for grant in self.ledger.assign(now):
            self.world.send(self.ledger.holder(grant.slot), grant)
        if now >= self.beat_due_us:
            self.beat_due_us = now + BEAT_US
            self.beat()
        if self.phase == "leaving" and not self.inside:
            self.phase = "gone"
            self.beat()
            self.world.end_actor(self)
        return self.beat_due_us

    def leave(self) -> None:
        self.phase = "leaving"
        self.beat_due_us = 0
        self.ledger.close()
        self.wake()

    def beat(self) -> None:
        leases = self.ledger.leases()
        self.world.broadcast(self, ExecutorBeat(self.name, (REF,), len(self.ledger.places), leases, self.phase))

    def _accept(self, batch: Batch) -> None:
        world = self.world
        if not self.ledger.accept(batch, world.now):
            world.send(batch.batcher, Result(batch.batch, self.name, NOTHING, 0))
            return
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        service_us = int(world.pass_us(batch.rows))
        self.free_us = max(self.free_us, world.now) + service_us
        poisoned = any(
            int.from_bytes(batch.dense[i : i + 4], "little") in world.poison for i in range(0, len(batch.dense), 4)
        )
        result = (
            Result(batch.batch, self.name, NOTHING, 0, Fault.INTERNAL.name)
            if poisoned
            else Result(batch.batch, self.name, batch.dense, service_us)
        )
        world.at(self.free_us, self.take, Computed(batch, result))

    def _finish(self, computed: Computed) -> None:
        self.inside -= 1
        slot, batcher = computed.batch.slot, computed.batch.batcher
        self.ledger.finish(slot)
        kept = None
        for grant in self.ledger.assign(self.world.now):
            if self.ledger.holder(grant.slot) == batcher and kept is None:
                kept = grant.slot
            else:
                self.world.send(self.ledger.holder(grant.slot), grant)
        self.world.send(batcher, replace(computed.result, grant=kept))


class World:
    """The clock, the bus, the weather, and the rules that must hold whatever happens."""

    def __init__(
        self,
        seed: int,
        faults: Faults | None = None,
        batchers: int | None = None,
        executors: int | None = None,
        rules: Rules = RULES,
    ) -> None:
        self.rng = random.Random(seed)
        self.faults = Faults.drawn(self.rng) if faults is None else faults
        self.faulty = True
        self.now = 1_000_000
        self.rules = rules
        self.poison: set[int] = set()
        self.outcomes: dict[int, str] = {}
        self.sent: set[int] = set()
        self._events: list[tuple[int, int, Callable[..., None], tuple[object, ...]]] = []
        self._order = count()
        self._names = count()
        self._tickets = count(1)
        self.actors: dict[str, Actor] = {}
        self.batchers: list[SimulatedBatcher] = []
        self.executors: list[SimulatedExecutor] = []
        for _ in range(batchers or self.rng.randint(1, 3)):
            self.add_batcher()
        for _ in range(executors or self.rng.randint(1, 3)):
            self.add_executor()

    # Time

    def at(self, when_us: int, do: Callable[..., None], *args: object) -> None:
        heapq.heappush(self._events, (when_us, next(self._order), do, args))

    def run_until(self, end_us: int) -> None:
        while self._events and self._events[0][0] <= end_us:
            self.now, _, do, args = heapq.heappop(self._events)
            do(*args)
            self.check()
        self.now = end_us

    def when_awake(self, actor: Actor, do: Callable[[], None]) -> None:
        if not actor.alive:
            return
        if actor.thaws_us > self.now:
            self.at(actor.thaws_us, self.when_awake, actor, do)
        else:
            do()

    # Bus

    def send(self, to: str, message: Message) -> None:
        for _ in range(2 if self._bad_luck(self.faults.double) else 1):
            if not self._bad_luck(self.faults.drop):
                late_us = int(self.rng.expovariate(1 / 10_000)) if self._bad_luck(self.faults.delay) else 0
                self.at(self.now + LATENCY_US + late_us, self._deliver, to, message)

    def broadcast(self, sender: Actor, message: Message) -> None:
        hearers = self.batchers if isinstance(message, ExecutorBeat) else self.executors
        for actor in hearers:
            self.send(actor.name, message)

    def _deliver(self, to: str, message: Message) -> None:
        if to in self.actors:
            self.actors[to].take(message)

    def _bad_luck(self, share: float) -> bool:
        return self.faulty and self.rng.random() < share

    # Actors

    def add_batcher(self) -> None:
        batcher = SimulatedBatcher(self, f"b{next(self._names)}", self.rules)
        self.batchers.append(batcher)
        self._start(batcher)

    def add_executor(self) -> None:
        executor = SimulatedExecutor(self, f"e{next(self._names)}", self.rng.randint(1, 3))
        self.executors.append(executor)
        self._start(executor)

    def _start(self, actor: Actor) -> None:
        self.actors[actor.name] = actor
        self.at(self.now + self.rng.randrange(BEAT_US), actor.wake)

    def end_actor(self, actor: Actor) -> None:
        """It is no more. What a batcher had taken in ends with it: whoever asked asks another."""
        actor.alive = False
        del self.actors[actor.name]
        self.batchers = [batcher for batcher in self.batchers if batcher.alive]
        self.executors = [executor for executor in self.executors if executor.alive]
        if isinstance(actor, SimulatedBatcher):
            for ticket in actor.open.values():
                self.ended(ticket, "lost with its batcher")

    # Load and weather

    def pass_us(self, rows: int) -> float:
        """How long a forward pass takes; now and then much longer than usual."""
        slow = 8 if self._bad_luck(0.02) else 1
        return (500 + 20 * rows) * self.rng.uniform(0.9, 1.1) * slow

    def ask(self, budget_us: int | None = None, rows: int | None = None) -> None:
        ticket_id = next(self._tickets)
        rows = rows or self.rng.choice((1, 1, 2, 8, 32))
        budget_us = budget_us or self.rng.choice((3_000, 20_000, 60_000, 200_000))
        priority = self.rng.choice((1, 128, 128))
        ticket = Ticket(ticket_id, MODEL, rows, rows * 40, priority, self.now, self.now + budget_us)
        if self._bad_luck(self.faults.poison):
            self.poison.add(ticket_id)
        batcher = self.rng.choice(self.batchers)
        if batcher.thaws_us <= self.now:
            batcher.offer(ticket)
            if self._bad_luck(0.05):
                self.at(self.now + self.rng.randrange(budget_us), self.cancel, batcher, ticket)

    def cancel(self, batcher: SimulatedBatcher, ticket: Ticket) -> None:
        self.when_awake(batcher, lambda: batcher.cancel(ticket))

    def load(self, start_us: int, end_us: int, requests: int, budget_us: int | None = None) -> None:
        """Requests in bursts."""
        while requests > 0:
            burst = min(requests, self.rng.choice((1, 1, 3, 20)))
            when_us = self.rng.randrange(start_us, end_us)
            for _ in range(burst):
                self.at(when_us, self.ask, budget_us)
            requests -= burst

    def misfortunes(self, start_us: int, end_us: int) -> None:
        events = [self.crash] * self.faults.crashes
        events += [self.goodbye] * self.faults.goodbyes
        events += [self.freeze] * self.faults.freezes
        for event in events:
            self.at(self.rng.randrange(start_us, end_us), event)

    def crash(self) -> None:
        actor = self.rng.choice([*self.executors, *self.batchers])
        restart = self.add_executor if isinstance(actor, SimulatedExecutor) else self.add_batcher
        if isinstance(actor, SimulatedExecutor) or len(self.batchers) > 1:
            self.end_actor(actor)
            self.at(self.now + self.rng.randrange(LEASE_US), restart)

    def goodbye(self) -> None:
        executor = self.rng.choice(self.executors) if self.executors else None
        if executor is not None and executor.phase == "up":
            executor.leave()
            self.at(self.now + self.rng.randrange(LEASE_US), self.add_executor)

    def freeze(self) -> None:
        actor = self.rng.choice([*self.executors, *self.batchers])
        actor.thaws_us = self.now + self.rng.randrange(2 * LEASE_US)

    # Rules

    def ended(self, ticket: Ticket, how: str) -> None:
        assert ticket.id not in self.outcomes, f"ticket {ticket.id} ended twice: {self.outcomes[ticket.id]}, {how}"
        assert how != "scored" or ticket.id not in self.poison
        self.outcomes[ticket.id] = how

    def dispatched(self, batcher: SimulatedBatcher, decision: Dispatch) -> None:
        rules = self.rules
        assert decision.tickets and all(ticket.state is State.IN_FLIGHT for ticket in decision.tickets)
        assert decision.rows == sum(ticket.rows for ticket in decision.tickets) <= rules.max_rows
        assert sum(ticket.bytes for ticket in decision.tickets) <= rules.max_bytes
        assert rules.coalesce or len(decision.tickets) == 1
        for ticket in decision.tickets:
            assert ticket.deadline_us > self.now, "computed for nobody"
        ids = {ticket.id for ticket in decision.tickets}
        if not ids & self.sent:
            heads = [head for q in batcher.policy.queues.values() if (head := q.head()) is not None]
            assert all(
                (t.priority, t.deadline_us) <= (head.priority, head.deadline_us)
                for t in decision.tickets
                for head in heads
            ), "something more urgent was left behind"
        self.sent |= ids

    def check(self) -> None:
        for executor in self.executors:
            ledger = executor.ledger
            assert executor.inside == ledger.busy() <= len(ledger.places)
        for batcher in self.batchers:
            if batcher.thaws_us <= self.now:
                self._check_batcher(batcher)

    def _check_batcher(self, batcher: SimulatedBatcher) -> None:
        policy = batcher.policy
        waiting = [ticket for ticket in batcher.open.values() if ticket.state is State.WAITING]
        assert policy.rows == sum(ticket.rows for ticket in waiting) <= policy.rules.queue_rows
        assert policy.bytes == sum(ticket.bytes for ticket in waiting) <= policy.rules.queue_bytes
        assert sum(queue.count for queue in policy.queues.values()) == len(waiting)
        for ticket in batcher.open.values():
            latest_us = max(ticket.deadline_us, batcher.thaws_us) + GRACE_US
            assert self.now <= latest_us, f"ticket {ticket.id} got no end: {ticket}"
        for executor in policy.executors.values():
            assert not (waiting and executor.up and executor.free and executor.models), "a free executor waits"
            assert all(flight.group.sends <= MAX_SENDS for flight in executor.flights.values())

    def check_at_rest(self) -> None:
        """Nothing is asked for any more: nothing may be left, and every slot is in somebody's hand."""
        for batcher in self.batchers:
            policy = batcher.policy
            assert policy.idle() and not batcher.open and not policy.retries
            assert policy.rows == policy.bytes == 0
            assert all(not queue.lines for queue in policy.queues.values())
            assert policy.executors.keys() == {executor.name for executor in self.executors}
            assert not any(executor.flights or executor.abandoned for executor in policy.executors.values())
        for executor in self.executors:
            in_hand = [
                (index, generation)
                for batcher in self.batchers
                for index, generation in batcher.policy.executors[executor.name].free.items()
            ]
            current = [(place.index, place.generation) for place in executor.ledger.places]
            assert sorted(in_hand) == current, "a slot is lost, or in two hands"


def run(seed: int, **options: object) -> World:
    """Faults for a while, then calm, then a burst that needs every slot."""
    world = World(seed, **options)  # type: ignore[arg-type]
    storm_us, start_us = 400_000, world.now
    world.load(start_us + 2 * BEAT_US, start_us + storm_us, world.rng.choice((20, 100, 200)))
    world.misfortunes(start_us, start_us + storm_us)
    world.run_until(start_us + storm_us)
    world.faulty = False
    world.run_until(world.now + 4 * LEASE_US)
    world.check_at_rest()
    for executor in world.executors:
        executor.most_inside = 0
    calm = set(world.outcomes)
    for _ in range(40 * len(world.executors)):
        world.ask(budget_us=2_000_000, rows=16)
    world.run_until(world.now + 4 * LEASE_US)
    world.check_at_rest()
    how_it_went = {how for ticket, how in world.outcomes.items() if ticket not in calm}
    assert how_it_went <= {"scored", "OVERLOADED"}, f"in calm weather, too: {how_it_went}"
    for executor in world.executors:
        assert executor.most_inside == len(executor.ledger.places), "a slot is not used"
    return world
