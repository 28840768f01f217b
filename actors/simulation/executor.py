"""A simulated executor: as `actors.executor`, whose policy, `Ledger`, is the real one. Its device is a stopwatch."""

from heapq import heapreplace
from typing import TYPE_CHECKING

from msgspec.structs import replace

from narsil_stream.actors.leasing import Ledger
from narsil_stream.actors.simulation.actor import Actor
from narsil_stream.actors.simulation.messages import Computed, Message, requests_in
from narsil_stream.schemas.errors import Fault
from narsil_stream.schemas.internal import Batch, BatcherBeat, Demand, ExecutorBeat, ModelRef, Result

if TYPE_CHECKING:
    from narsil_stream.actors.simulation.world import World

NOTHING = memoryview(b"")


class Executor(Actor):
    kind = "executor"

    def __init__(self, world: "World", name: str, slots: int, lanes: int, models: tuple[ModelRef, ...]) -> None:
        super().__init__(world, name)
        self.slots = slots
        self.models = models
        self.ledger = Ledger(name, slots, world.rules.lease_us)
        self.inside = 0
        self.most_inside = 0
        self.under_way = 0
        """Batches on their way to here, results and slots on their way from here."""
        self.idle_us: int | None = None
        """Since when it has nothing to do although work waits for it."""
        self.still_us: int | None = None
        """Since when, beside that, nothing is under way."""
        self.slowness = 1.0
        self.slow_until_us = 0
        self._free_us = [0] * lanes
        """When each lane has done all that it has; a heap."""

    def receive(self, message: Message) -> bool:
        now = self.clock()
        if isinstance(message, Batch):
            self._accept(message)
        elif isinstance(message, Computed):
            self._finish(message)
        elif isinstance(message, Demand):
            self.ledger.demand(message, now)
        elif isinstance(message, BatcherBeat):
            self.ledger.beat(message, now)
        return True

    def turn(self) -> int:
        now, known = self.clock(), len(self.ledger.batchers)
        self.ledger.expire(now)
        if len(self.ledger.batchers) < known:
            self.world.count("executor: lease expired", self.name)
        for grant in self.ledger.assign(now):
            self.world.tally["decision", "executor: slot granted"] += 1
            self.world.send(self, self.ledger.holder(grant.slot), grant)
        if now >= self.beat_due_us:
            self.beat_due_us = now + self.world.beat_us
            self._beat()
        if self.phase == "leaving" and not self.inside:
            self.phase = "gone"
            self._beat()
            self.world.end_actor(self)
        return self.beat_due_us

    def leave(self) -> None:
        self.phase = "leaving"
        self.beat_due_us = 0
        self.ledger.close()
        self.wake()

    def _beat(self) -> None:
        ledger = self.ledger
        beat = ExecutorBeat(
            self.name, self.models, len(ledger.places), ledger.leases(), self.phase,
            waiting=ledger.waiting(), lanes=(len(self._free_us),) * len(self.models),
        )  # fmt: skip
        self.world.broadcast(self, self.world.batchers, beat)

    def _accept(self, batch: Batch) -> None:
        world = self.world
        if not self.ledger.accept(batch, self.clock()):
            world.count("executor: batch turned away", self.name, f"batch {batch.batch} of {batch.batcher}")
            world.send(self, batch.batcher, Result(batch.batch, self.name, NOTHING, 0))
            return
        self.inside += 1
        self.most_inside = max(self.most_inside, self.inside)
        start_us = max(self._free_us[0], world.now)
        service_us = world.pass_us(batch.rows, self.slowness if start_us < self.slow_until_us else 1.0)
        if start_us >= world.now + batch.budget_us:
            service_us = 0
            result = Result(batch.batch, self.name, NOTHING, 0, Fault.DEADLINE_EXCEEDED.name)
        elif world.poison and not world.poison.isdisjoint(requests_in(batch.dense)):
            result = Result(batch.batch, self.name, NOTHING, 0, Fault.INTERNAL.name)
        else:
            result = Result(batch.batch, self.name, batch.dense, service_us)
        heapreplace(self._free_us, start_us + service_us)
        world.at(start_us + service_us, self.take, Computed(batch, result))

    def _finish(self, computed: Computed) -> None:
        self.inside -= 1
        slot, batcher = computed.batch.slot, computed.batch.batcher
        self.ledger.finish(slot)
        kept = None
        for grant in self.ledger.assign(self.clock()):
            if self.ledger.holder(grant.slot) == batcher and kept is None:
                kept = grant.slot
            else:
                self.world.tally["decision", "executor: slot granted"] += 1
                self.world.send(self, self.ledger.holder(grant.slot), grant)
        if kept is not None:
            self.world.tally["decision", "executor: slot kept"] += 1
        self.world.send(self, batcher, replace(computed.result, grant=kept))

    def check(self) -> None:
        ledger, name, fail = self.ledger, self.name, self.world.referee.fail
        if self.inside > self.slots:
            fail(f"{name} computes {self.inside} batches on {self.slots} slots")
        if (busy := ledger.busy()) != self.inside:
            fail(f"{name} holds {busy} slots busy for {self.inside} batches")
        if len(ledger.places) != self.slots:
            fail(f"{name} has {len(ledger.places)} slots; it started with {self.slots}")
        if ledger.open and ledger.batchers:
            for place in ledger.places:
                if not place.holder and not place.busy:
                    fail(f"{name} keeps a slot that a batcher could have")
