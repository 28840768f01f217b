"""The batcher: takes requests in, lets the policy decide, sends batches to executors and answers to the callers.

Everything that decides is in `scheduling`; here are the clock, the messages and the joining of rows. How requests end
is in `endings`.
"""

import asyncio
import contextlib
import logging
import time
from collections.abc import Iterable
from operator import attrgetter

import msgspec
from msgspec import Struct
from nats.aio.msg import Msg
from nats.micro.service import EndpointStats

from narsil_stream.actors.answering import Caller
from narsil_stream.actors.batcher_metrics import BatcherMetrics
from narsil_stream.actors.catalogue import Catalogue, Described
from narsil_stream.actors.decisions import Decision, Dispatch, Drop, Plead, rules
from narsil_stream.actors.endings import Endings
from narsil_stream.actors.joining import join
from narsil_stream.actors.reception import Published, Reception
from narsil_stream.actors.scheduling import FLOAT_BYTES, Scheduler
from narsil_stream.core.actor import Actor, now_us
from narsil_stream.core.bus import Bus
from narsil_stream.core.config import Config
from narsil_stream.schemas import subjects
from narsil_stream.schemas.errors import Fault, Refused
from narsil_stream.schemas.internal import (
    Asking,
    Batch,
    BatcherBeat,
    Bundle,
    Cancel,
    ExecutorBeat,
    Grant,
    Result,
    ToBatcher,
)
from narsil_stream.schemas.wire import InferRequest

log = logging.getLogger(__name__)

BATCH_HEADER = 1_024
"""Bytes of a batch message beside its rows."""
MAILBOX = 65_536

_decode = msgspec.msgpack.Decoder(ToBatcher).decode
_decode_asking = msgspec.msgpack.Decoder(Asking).decode
_decode_beat = msgspec.msgpack.Decoder(ExecutorBeat).decode
_parts = attrgetter("slot", "model", "version", "request")


class Hello(Struct, frozen=True):
    """Somebody new wants to know who is here."""


class BrokerLost(Struct, frozen=True):
    """Gateways and clients have told their callers by now."""


Message = Bundle | Cancel | Result | Grant | ExecutorBeat | Described | Published | Hello | BrokerLost


class Batcher(Actor[Message]):
    kind = "batcher"
    tunable = True

    def __init__(self, config: Config, bus: Bus) -> None:
        super().__init__(MAILBOX)
        self._config = config
        self._bus = bus
        near = lambda executor: bus.is_local(subjects.executor(executor))  # noqa: E731
        self.policy = Scheduler(self.name, rules(config, bus.max_payload - BATCH_HEADER), near)
        self._catalogue = Catalogue(bus, self.mailbox.put_urgent)
        self._metrics = BatcherMetrics(self.registry, self.policy, self.mailbox)
        self._reception = Reception(config.batch, self._catalogue, self.policy, self._metrics)
        self._endings = Endings(bus, self.name, self._metrics)
        self._beat_due_us = 0
        self._phase = "up"
        self._idle = asyncio.Event()
        self._served = asyncio.Event()
        self._joining: asyncio.Task[None] | None = None
        self._joined = False

    # Life

    async def start(self) -> None:
        await self._bus.listen(subjects.ask(self.name), self._take_asking, _decode_asking, owner=self)
        await self._bus.listen(subjects.batcher(self.name), self.mailbox.put_urgent, _decode, owner=self)
        await self._bus.listen(subjects.EXECUTOR_BEAT, self.mailbox.put_urgent, _decode_beat, owner=self)
        await self._bus.subscribe(subjects.HELLO, lambda _: self.mailbox.put_urgent(Hello()), owner=self)
        await self._bus.respond(subjects.describe(self.name), self._catalogue.described, owner=self)
        await self._bus.respond(subjects.statistics(self.name), self._endings.counts.report, owner=self)
        await self._bus.flush()
        self._bus.signal(subjects.HELLO)
        self._bus.on_lost.append(self._on_lost)
        self._joining = asyncio.create_task(self._join_public(), name=f"{self.name} joins")

    async def _join_public(self) -> None:
        """Take from the public subjects once it is known what is served: others of the group may know already.

        Alone it takes them all the same, after two leases, so that producers are told UNAVAILABLE.
        """
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._served.wait(), 2 * self._config.timing.lease_ms / 1e3)
        await self._bus.subscribe(f"{subjects.INFER}.>", self._take_published, subjects.QUEUE_GROUP, owner=self)
        await self._bus.flush()
        self._joined = True
        self.mailbox.put_urgent(Hello())

    def _on_lost(self) -> None:
        self.mailbox.put_urgent(BrokerLost())

    async def drain(self) -> None:
        """Leave the queue group, tell those who send here, and wait until all is answered and no more comes."""
        await self._leave_public()
        self._phase, self._beat_due_us = "leaving", 0
        self.mailbox.put_urgent(Hello())
        await asyncio.sleep(2 * self._config.timing.beat_ms / 1e3)
        self._idle.clear()
        self.mailbox.put_urgent(Hello())
        await self._idle.wait()

    async def _leave_public(self) -> None:
        if self._joining is not None:
            self._joining.cancel()
            await asyncio.gather(self._joining, return_exceptions=True)
        await self._bus.unsubscribe(f"{subjects.INFER}.>", owner=self)

    async def stop(self) -> None:
        """Askers with a slot ask another batcher once they hear that this one is gone; plain callers cannot."""
        self._phase = "gone"
        for drop in self.policy.abandon_all():
            if drop.ticket.payload.caller.slot < 0:
                self._act([drop])
        for message in self.mailbox.leftovers():
            if isinstance(message, Published):
                self._admit_published(message)
        self._endings.send()
        self._beat(now_us())
        self._catalogue.stop()
        if self._on_lost in self._bus.on_lost:
            self._bus.on_lost.remove(self._on_lost)
        own = (
            subjects.ask(self.name),
            subjects.batcher(self.name),
            subjects.describe(self.name),
            subjects.statistics(self.name),
        )
        heard = (*own, subjects.EXECUTOR_BEAT, subjects.HELLO)
        await self._leave_public()
        await asyncio.gather(*(self._bus.unsubscribe(subject, owner=self) for subject in heard))

    def tune(self, config: Config) -> None:
        self._config = config
        self.policy.rules = rules(config, self._bus.max_payload - BATCH_HEADER)
        self._reception.limits = config.batch
        self.mailbox.put_urgent(Hello())

    def endpoints(self) -> list[EndpointStats]:
        return [self._endings.stats]

    def detail(self) -> str:
        executors = len(self.policy.executors)
        return f"{executors} executor{'s' * (executors != 1)}, {self.policy.rows} rows waiting"

    # Messages in

    def _take_asking(self, message: Asking) -> None:
        if isinstance(message, Cancel):
            self.mailbox.put_urgent(message)
        elif subjects.reserved(message.reply):
            self._metrics.no_answer.labels("reserved subject").inc()
        elif not self.mailbox.put(message):
            for ask in message.asks:
                self._refuse_unseen(Caller(message.reply, ask.slot, ask.request.id))

    def _take_published(self, message: Msg) -> None:
        if subjects.reserved(message.reply) or not message.reply:
            self._metrics.no_answer.labels("reserved subject" if message.reply else "no reply subject").inc()
            return
        published = Published(message.subject, message.reply, message.data)
        if not self.mailbox.put(published):
            self._refuse_unseen(published.caller())

    def _refuse_unseen(self, caller: Caller) -> None:
        self._metrics.requests.offered.inc()
        self._endings.turned_down(caller, Refused(Fault.OVERLOADED, "too many messages at once", 10_000))
        self._endings.send()

    def receive(self, message: Message) -> None:
        match message:
            case Bundle():
                self._admit_bundle(message)
            case Published():
                self._admit_published(message)
            case Result():
                self._take_result(message)
            case ExecutorBeat():
                self._act(self.policy.beat(self._catalogue.known_only(message), now_us()))
                if self._catalogue.changed or not self._served.is_set():
                    self._catalogue.changed = False
                    self._beat_due_us = 0
            case Grant():
                self.policy.grant(message.executor, message.slot, now_us())
            case Cancel():
                for slot in message.slots:
                    self._cancel(message.reply, slot)
            case Described():
                self._catalogue.add(message)
                self._ask_for_beats()
            case Hello():
                self._beat_due_us = 0
            case BrokerLost():
                self._forget_askers()

    def turn(self) -> int | None:
        now = now_us()
        self._act(self.policy.decide(now))
        self._tell_steps()
        self._catalogue.keep(self.policy.executors)
        self._forget_withdrawn()
        self._endings.send()
        if now >= self._beat_due_us:
            self._beat(now)
        if self.policy.idle():
            self._idle.set()
        wake = self.policy.wake_us(now)
        return self._beat_due_us if wake is None else min(wake, self._beat_due_us)

    def _tell_steps(self) -> None:
        for step in self.policy.tuner.steps:
            self._metrics.tuned.labels(step.knob, step.direction).inc()
            log.debug("tuned batches, %s %s: %s", step.knob, step.direction, step.why)
        self.policy.tuner.steps.clear()

    def _forget_withdrawn(self) -> None:
        """Their executors wait for the beat that says so."""
        if self._catalogue.withdrawn:
            for key in self._catalogue.forget(self.policy.finishing()):
                self.policy.forget(key)
                self._beat_due_us = 0

    def _ask_for_beats(self) -> None:
        """What was just described is served from the next beat of its executor on."""
        self._bus.signal(subjects.HELLO)

    def _forget_askers(self) -> None:
        for ticket in self._endings.forsaken(self._bus.is_local):
            self.policy.cancel(ticket)

    # Admission

    def _admit_bundle(self, bundle: Bundle) -> None:
        self._endings.offered(len(bundle.asks))
        for slot, model, version, request in map(_parts, bundle.asks):
            self._admit(Caller(bundle.reply, slot, request.id), model, version, request, 0)

    def _admit_published(self, message: Published) -> None:
        self._endings.offered(1)
        model, version = message.target()
        try:
            request = message.read()
        except Refused as refused:
            self._turn_down(message.caller(), model, version, refused)
        except Exception:
            self._unreadable(message.caller(), model, version)
        else:
            self._admit(message.caller(request.id), model, version, request, len(message.payload))

    def _admit(self, caller: Caller, model: str, version: str, request: InferRequest, held: int) -> None:
        """`held`: bytes of the message that views of its tensors keep in memory."""
        try:
            if self._phase == "gone":
                raise Refused(Fault.UNAVAILABLE, "the batcher is stopping", 1_000)
            ticket = self._reception.ticket(caller, model, version, request, held)
            self.policy.offer(ticket, ticket.arrived_us)
            if request.tenant:
                self._metrics.tenants.admitted(request.tenant, ticket.rows)
        except Refused as refused:
            if request.tenant and refused.fault is Fault.OVERLOADED:
                self._metrics.tenants.refused(request.tenant)
            self._turn_down(caller, model, version, refused)
        except Exception:
            self._unreadable(caller, model, version)
        else:
            self._endings.admitted(ticket)

    def _unreadable(self, caller: Caller, model: str, version: str) -> None:
        log.exception("a request could not be read")
        self._turn_down(caller, model, version, Refused(Fault.INTERNAL, "the request could not be read"))

    def _turn_down(self, caller: Caller, model: str, version: str, refused: Refused) -> None:
        key = None
        with contextlib.suppress(Refused):
            key, _ = self._catalogue.find(model, version, self.policy.executors.values())
        self._endings.turned_down(caller, refused, key)

    def _cancel(self, reply: str, slot: int) -> None:
        ticket = self._endings.withdrawn(reply, slot)
        if ticket is not None:
            self.policy.cancel(ticket)

    # Decisions

    def _act(self, decisions: Iterable[Decision]) -> None:
        for decision in decisions:
            match decision:
                case Dispatch():
                    self._dispatch(decision)
                case Drop():
                    self._endings.dropped(decision)
                case Plead():
                    with contextlib.suppress(Refused):  # asked again soon
                        self._bus.send(subjects.executor(decision.executor), decision.demand)

    def _dispatch(self, decision: Dispatch) -> None:
        now, waited = now_us(), self._metrics.queue_wait.observe
        for ticket in decision.tickets:
            waited((now - ticket.arrived_us) / 1e6)
        self._metrics.batch_rows.observe(decision.rows)
        self._metrics.batch_fill.observe(decision.rows / self.policy.rules.max_rows)
        if decision.again:
            self._metrics.resent.inc()
        try:
            self._bus.send(subjects.executor(decision.executor), self._joined_batch(decision))
        except Refused as refused:
            log.warning("a batch was not sent (%s); it goes again", refused.detail)
            if refused.fault is Fault.TOO_LARGE:
                self._act(self.policy.too_large(decision, refused.detail))

    def _joined_batch(self, decision: Dispatch) -> Batch:
        started = time.perf_counter_ns()
        batch, unsound = join(self.name, decision, self._catalogue.admission(decision.model))
        for ticket, refused in unsound:
            self.policy.cancel(ticket)
            self._endings.unsound(ticket, refused)
        flight = self.policy.executors.flight(decision.executor, decision.batch)
        if flight is not None:
            flight.joined_ns = time.perf_counter_ns() - started
        return batch

    def _take_result(self, result: Result) -> None:
        flight = self.policy.executors.flight(result.executor, result.batch)
        tickets, decisions = self.policy.result(result, now_us())
        self._act(decisions)
        if flight is not None and result.scores.nbytes == FLOAT_BYTES * flight.rows:
            self._endings.scored(flight, tickets, result)

    # Liveness

    def _beat(self, now: int) -> None:
        self._beat_due_us = now + self._config.timing.beat_ms * 1_000
        policy = self.policy
        served = self._catalogue.served(policy.executors.values())
        unloaded = self._catalogue.unloaded()
        if served or unloaded:
            self._served.set()
        self._bus.broadcast(
            subjects.BATCHER_BEAT,
            BatcherBeat(
                self.name,
                served if self._joined else (),
                max((policy.backlog_us(key, now) for key in policy.queues), default=0),
                *policy.advertised(now),
                self._phase,
                self._config.timing.lease_ms,
                tuple(key.digest for key in policy.finishing()),
                unloaded and self._joined,
                any(executor.near for executor in policy.executors.values()),
            ),
        )
