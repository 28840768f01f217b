"""The executor: takes whole batches, computes them off the event loop unless that takes longer than the computing,
gives back one message each."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterator
from functools import partial
from weakref import WeakKeyDictionary

import msgspec
import numpy as np
from msgspec import Struct
from nats.micro.service import EndpointStats

from narsil_stream.actors.brevity import Brevity
from narsil_stream.actors.controls import Controls
from narsil_stream.actors.lanes import Lanes, Work
from narsil_stream.actors.leasing import Ledger
from narsil_stream.actors.peers import Peers
from narsil_stream.actors.queue import ModelKey
from narsil_stream.actors.repository import Loaded, Loader, Repository
from narsil_stream.actors.shelf import Shelf
from narsil_stream.core.actor import Actor, now_us
from narsil_stream.core.bus import Bus
from narsil_stream.core.config import Config
from narsil_stream.core.telemetry import ROWS, SECONDS, Count, Spread, gauges
from narsil_stream.kernels.backend import Backend, RaggedBatch
from narsil_stream.schemas import subjects
from narsil_stream.schemas.errors import Fault, Refused
from narsil_stream.schemas.internal import (
    Batch,
    BatcherBeat,
    Demand,
    ExecutorBeat,
    Grant,
    Result,
    ToExecutor,
)
from narsil_stream.schemas.model import ModelSpec

log = logging.getLogger(__name__)

MAILBOX = 4_096
NOTHING = memoryview(b"")

_decode = msgspec.msgpack.Decoder(ToExecutor).decode
_decode_beat = msgspec.msgpack.Decoder(BatcherBeat).decode


class Hello(Struct, frozen=True):
    """Somebody new wants to know who is here."""


class Computed(Struct, frozen=True):
    batch: Batch
    result: Result
    model: Loaded


Message = Batch | Demand | BatcherBeat | Computed | Hello


class Executor(Actor[Message]):
    """Serves models of a repository: which ones, the configuration says, and under explicit control also gateways."""

    kind = "executor"

    def __init__(self, config: Config, bus: Bus, repository: Repository, loader: Loader) -> None:
        super().__init__(MAILBOX)
        self._config = config
        self._bus = bus
        self._explicit = config.model_control == "explicit"
        self._shelf = Shelf(config, repository, loader, self._announce, self._heard)
        self._controls = Controls(bus, self.name, self._shelf, self._explicit)
        self._peers = Peers(bus, self.name, config.timing.lease_ms)
        self._following: asyncio.Task[None] | None = None
        self._beats: dict[str, BatcherBeat] = {}
        """The newest of each batcher."""
        self._ledger = self._leasing(1)
        self._lanes = Lanes(self.name)
        self._brevity = Brevity()
        self._unprepared: WeakKeyDictionary[Backend, int] = WeakKeyDictionary()
        """Of each backend, as counted last."""
        self._beat_due_us = 0
        self._phase = "up"
        self._idle = asyncio.Event()
        self._stats = EndpointStats("run", subjects.executor(self.name), "", 0, 0, 0, 0)
        registry = self.registry
        self._batches = Count("narsil_batches", "Batches by how they ended", registry, "outcome")
        self._rows = Count("narsil_rows", "Rows computed", registry)
        self._batch_rows = Spread("narsil_batch_rows", "Rows in a batch", ROWS, registry)
        self._seconds = Spread("narsil_compute_seconds", "One forward pass, copies included", SECONDS, registry)
        self._without_graph = Count(
            "narsil_batches_without_graph",
            "Batches, or pieces of them, that needed what was not prepared at warm-up",
            registry,
        )
        gauges(
            registry,
            narsil_slots=("Slots in total", lambda: len(self._ledger.places)),
            narsil_slots_busy=("Slots with a batch", lambda: self._ledger.busy()),
            narsil_batchers_alive=("Batchers heard of", lambda: len(self._ledger.batchers)),
        )

    # Life

    async def start(self) -> None:
        peers = await self._peers.look() if self._explicit else None
        await self._shelf.start(self._config.loaded_names if self._explicit else None, peers)
        self._ledger = self._leasing(self._slots())
        self._lanes.widen(self._width())
        await self._bus.listen(subjects.executor(self.name), self._take, _decode, owner=self)
        await self._bus.listen(subjects.BATCHER_BEAT, self.mailbox.put_urgent, _decode_beat, owner=self)
        await self._bus.subscribe(subjects.HELLO, lambda _: self.mailbox.put_urgent(Hello()), owner=self)
        await self._bus.respond(subjects.describe(self.name), self._describe, owner=self)
        await self._controls.start()
        await self._bus.flush()
        self._bus.signal(subjects.HELLO)
        if self._explicit:
            self._following = asyncio.create_task(self._follow(), name=f"{self.name} follows")

    async def _follow(self) -> None:
        """Controls reach this executor from now on; what was done while it started, the others know."""
        await self._shelf.follow(await self._peers.look())

    def _leasing(self, slots: int) -> Ledger:
        def near(batcher: str) -> bool:
            return self._bus.is_local(subjects.batcher(batcher))

        return Ledger(self.name, slots, self._config.timing.lease_ms * 1_000, near)

    def _width(self) -> int:
        """Batches that compute at once."""
        return max((model.card.lanes for model in self._shelf.loaded()), default=1)

    def _slots(self) -> int:
        return self._config.executor.slots or self._width() + 1

    async def drain(self) -> None:
        """Void all leases, so that batches under way to here are turned away and go elsewhere; finish what is here."""
        self._phase, self._beat_due_us = "leaving", 0
        self._ledger.close()
        self._idle.clear()
        self.mailbox.put_urgent(Hello())
        await self._idle.wait()

    async def stop(self) -> None:
        self._phase = "gone"
        self._beat(now_us())
        if self._following is not None:
            self._following.cancel()
            await asyncio.gather(self._following, return_exceptions=True)
        await self._controls.stop()
        heard = (subjects.executor(self.name), subjects.BATCHER_BEAT, subjects.HELLO, subjects.describe(self.name))
        await asyncio.gather(*(self._bus.unsubscribe(subject, owner=self) for subject in heard))
        await asyncio.to_thread(self._lanes.stop)
        await self._shelf.stop()

    def endpoints(self) -> list[EndpointStats]:
        return [self._stats]

    def detail(self) -> str:
        cards = [(model.ref, model.card) for model in self._shelf.offered.values()]
        served = (f"{r.name} {r.version} on {c.device} ({c.backend}, {c.precision})" for r, c in cards)
        return ", ".join(served) or "no model"

    # Messages in

    def _take(self, message: ToExecutor) -> None:
        if not self.mailbox.put(message) and isinstance(message, Batch):
            self._turn_away(message)

    def receive(self, message: Message) -> None:
        match message:
            case Batch():
                self._accept(message)
            case Computed():
                self._finish(message)
            case Demand():
                self._ledger.demand(message, now_us())
            case BatcherBeat():
                self._ledger.beat(message, now_us())
                self._beats[message.batcher] = message
            case Hello():
                self._beat_due_us = 0

    def turn(self) -> int | None:
        now = now_us()
        self._ledger.expire(now)
        for grant, batcher in self._grants():
            self._tell(batcher, grant)
        if now >= self._beat_due_us:
            self._beat(now)
        self._shelf.turn()
        if not self._ledger.busy():
            self._idle.set()
        return self._beat_due_us

    # Batches

    def _accept(self, batch: Batch) -> None:
        key = ModelKey(batch.model, batch.version, batch.digest)
        model = self._shelf.find(key)
        if not self._ledger.accept(batch, now_us()):
            self._turn_away(batch)
            return
        self._stats.num_requests += 1
        if model is None:
            self._ledger.finish(batch.slot)
            self._turn_away(batch)
            return
        self._shelf.running[key] += 1
        deadline_us = now_us() + batch.budget_us
        if self._brevity.expected(model.backend, batch.rows) and self._lanes.claim(key):
            result = self._result(model, batch, deadline_us)
            self._lanes.release(key)
            self._finish(Computed(batch, result, model))
            return
        compute = partial(self._compute, model, batch, deadline_us, asyncio.get_running_loop())
        self._lanes.put(Work(key, model.card.lanes, compute))

    def _compute(self, model: Loaded, batch: Batch, deadline_us: int, loop: asyncio.AbstractEventLoop) -> None:
        """In a thread. Never raises."""
        computed = Computed(batch, self._result(model, batch, deadline_us), model)
        with contextlib.suppress(RuntimeError):  # the event loop is closed: nobody waits for it
            loop.call_soon_threadsafe(self.mailbox.put_urgent, computed)

    def _result(self, model: Loaded, batch: Batch, deadline_us: int) -> Result:
        if now_us() >= deadline_us:
            detail = "the budget ran out before the batch was computed"
            return Result(batch.batch, self.name, NOTHING, 0, Fault.DEADLINE_EXCEEDED.name, detail)
        started = time.perf_counter_ns()
        try:
            memory = model.scores.take(batch.rows)
            model.backend.run(ragged(batch, model.backend.spec), memory[: batch.rows])
        except Exception:
            log.exception("a batch of %d rows failed", batch.rows)
            return Result(batch.batch, self.name, NOTHING, 0, Fault.INTERNAL.name, "the forward pass failed")
        service_us = max(1, (time.perf_counter_ns() - started) // 1_000)
        return Result(batch.batch, self.name, model.scores.lend(memory, batch.rows), service_us)

    def _finish(self, computed: Computed) -> None:
        batch, result = computed.batch, computed.result
        self._ledger.finish(batch.slot)
        self._shelf.running[ModelKey(batch.model, batch.version, batch.digest)] -= 1
        self._batches.inc(of="failed" if result.fault else "computed")
        self._count_unprepared(computed.model.backend)
        if result.fault:
            self._stats.num_errors += 1
        else:
            self._rows.inc(batch.rows)
            self._batch_rows.observe(batch.rows)
            self._seconds.observe(result.service_us / 1e6)
            self._stats.processing_time += result.service_us * 1_000
            self._brevity.observe(computed.model.backend, batch.rows, result.service_us)
        kept = None
        for grant, batcher in self._grants():
            if batcher == batch.batcher and kept is None:
                kept = grant.slot
            else:
                self._tell(batcher, grant)
        self._tell(batch.batcher, msgspec.structs.replace(result, grant=kept))

    def _count_unprepared(self, backend: Backend) -> None:
        found = backend.unprepared
        self._without_graph.inc(found - self._unprepared.get(backend, 0))
        self._unprepared[backend] = found

    def _turn_away(self, batch: Batch) -> None:
        self._batches.inc(of="turned away")
        self._tell(batch.batcher, Result(batch.batch, self.name, NOTHING, 0))

    # Messages out

    def _grants(self) -> list[tuple[Grant, str]]:
        return [(grant, self._ledger.holder(grant.slot)) for grant in self._ledger.assign(now_us())]

    def _tell(self, batcher: str, message: Result | Grant) -> None:
        try:
            self._bus.send(subjects.batcher(batcher), message)
        except Refused as refused:
            log.warning("a message to %s was not sent: %s", batcher, refused.detail)

    def _describe(self) -> bytes:
        return msgspec.json.encode([model.card for model in self._shelf.loaded()])

    def _announce(self) -> None:
        """What is served has changed."""
        self._ledger.grow(self._slots())
        self._lanes.widen(self._width())
        self._beat_due_us = 0
        self.mailbox.put_urgent(Hello())

    def _heard(self) -> Iterator[BatcherBeat | None]:
        """From each batcher that is alive."""
        return (self._beats.get(batcher) for batcher in self._ledger.batchers)

    def _beat(self, now: int) -> None:
        self._beat_due_us = now + self._config.timing.beat_ms * 1_000
        if len(self._beats) > len(self._ledger.batchers):
            self._beats = {name: beat for name, beat in self._beats.items() if name in self._ledger.batchers}
        self._bus.broadcast(
            subjects.EXECUTOR_BEAT,
            ExecutorBeat(
                self.name,
                self._shelf.refs(),
                len(self._ledger.places),
                self._ledger.leases(),
                self._phase,
                self._shelf.retiring_refs(),
                tuple(sorted(self._shelf.unloaded)),
                self._ledger.waiting(),
                tuple(model.card.lanes for model in self._shelf.offered.values()),
            ),
        )


def ragged(batch: Batch, spec: ModelSpec) -> RaggedBatch:
    """Views of the message's bytes. Raises ValueError when they do not fit the model."""
    dense = np.frombuffer(batch.dense, np.float32).reshape(batch.rows, spec.n_dense)
    ids = np.frombuffer(batch.ids, np.int32)
    if len(batch.lengths):
        return RaggedBatch(dense, ids, np.frombuffer(batch.lengths, np.int32).reshape(batch.rows, spec.n_sparse))
    if len(ids) != batch.rows * spec.n_sparse:
        raise ValueError(f"{len(ids)} ids for {batch.rows} rows of {spec.n_sparse} tables")
    return RaggedBatch(dense, ids)
