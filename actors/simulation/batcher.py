"""A simulated batcher: as `actors.batcher`, whose policy, `Scheduler`, is the real one."""

from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from narsil_stream.actors.decisions import Decision, Dispatch, Drop, Plead
from narsil_stream.actors.queue import ModelKey, State, Ticket
from narsil_stream.actors.reception import refuse_stale
from narsil_stream.actors.scheduling import FLOAT_BYTES, Scheduler
from narsil_stream.actors.simulation.actor import Actor
from narsil_stream.actors.simulation.executor import NOTHING
from narsil_stream.actors.simulation.messages import Answer, Message, Replies, Wish, Wishes, score
from narsil_stream.actors.simulation.shadow import Shadow
from narsil_stream.schemas.errors import Refused
from narsil_stream.schemas.internal import Batch, BatcherBeat, Cancel, ExecutorBeat, Grant, ModelRef, Result

if TYPE_CHECKING:
    from narsil_stream.actors.simulation.world import World

STALE_GRACE_US = 2_000_000


class Caller(NamedTuple):
    reply: str
    slot: int
    request: int


class Batcher(Actor):
    kind = "batcher"

    def __init__(self, world: "World", name: str) -> None:
        super().__init__(world, name)
        self.policy = Scheduler(name, world.rules)
        self.shadow = Shadow(self)
        self._open: dict[tuple[str, int], Ticket] = {}
        self._replies: defaultdict[str, list[Answer]] = defaultdict(list)
        self._tickets = 0
        self._leaves_us = 0

    def receive(self, message: Message) -> bool:
        policy, now = self.policy, self.clock()
        if isinstance(message, Wishes):
            for wish in message.wishes:
                self._admit(message.reply, wish)
        elif isinstance(message, Result):
            tickets, decisions = policy.result(message, now)
            self._act(decisions)
            self._score(tickets, message)
        elif isinstance(message, ExecutorBeat):
            self.shadow.heard(message.executor)
            self._act(policy.beat(message, now))
        elif isinstance(message, Grant):
            self.shadow.granted(message.executor)
            policy.grant(message.executor, message.slot, now)
        elif isinstance(message, Cancel):
            for slot in message.slots:
                self._cancel(message.reply, slot)
        return True

    def turn(self) -> int:
        now = self.clock()
        self._act(self.policy.decide(now))
        if self._replies:
            replies, self._replies = self._replies, defaultdict(list)
            for reply, answers in replies.items():
                self.world.send(self, reply, Replies(self.name, tuple(answers)))
        if now >= self.beat_due_us:
            self.beat_due_us = now + self.world.beat_us
            self._beat(now)
        if self.phase == "leaving" and now >= self._leaves_us and self.policy.idle():
            self.phase = "gone"
            self._beat(now)
            self.world.end_actor(self)
        wake_us = self.policy.wake_us(now)
        return self.beat_due_us if wake_us is None else min(wake_us, self.beat_due_us)

    def leave(self) -> None:
        self.phase = "leaving"
        self.beat_due_us = 0
        self._leaves_us = self.clock() + 2 * self.world.beat_us
        self.wake()

    def _beat(self, now: int) -> None:
        policy = self.policy
        offers: dict[ModelKey, None] = {}
        for executor in policy.executors.values():
            if executor.up:
                offers |= dict.fromkeys(sorted(executor.offers))
        beat = BatcherBeat(
            self.name,
            tuple(ModelRef(*key) for key in offers),
            max((policy.backlog_us(key, now) for key in policy.queues), default=0),
            *policy.advertised(now),
            self.phase,
            policy.rules.lease_us // 1_000,
        )
        self.world.broadcast(self, (*self.world.gateways, *self.world.executors), beat)

    # Requests

    def _admit(self, reply: str, wish: Wish) -> None:
        now, wall = self.clock(), self.wall()
        caller = Caller(reply, wish.slot, wish.request)
        self._tickets += 1
        ticket = Ticket(
            self._tickets, self.world.models[wish.model], wish.rows, wish.rows * 40, wish.priority,
            now, now + wish.budget_us, caller, tenant=wish.tenant,
        )  # fmt: skip
        try:
            refuse_stale(wall - wish.sent_us, wish.budget_us, STALE_GRACE_US)
            self.policy.offer(ticket, now)
        except Refused as refused:
            self.world.count("batcher: refused", self.name, f"r{wish.request}: {refused.fault.name}, {refused.detail}")
            self._answer(caller, refused.fault.name, b"", refused.retry_after_us, refused.by_deadline)
            return
        self.world.tally["decision", "batcher: admitted"] += 1
        self._open[reply, wish.slot] = ticket
        self.shadow.admitted(ticket, now + wish.budget_us)

    def _cancel(self, reply: str, slot: int) -> None:
        ticket = self._open.pop((reply, slot), None)
        if ticket is not None and ticket.state is not State.DONE:
            self.world.count("batcher: cancelled", self.name, f"r{ticket.payload.request}")
            self.policy.cancel(ticket)
            self.shadow.ended(ticket)

    def _answer(
        self,
        caller: Caller,
        fault: str,
        scores: bytes | memoryview = b"",
        retry_after_us: int = 0,
        by_deadline: bool = False,
    ) -> None:
        answer = Answer(caller.slot, caller.request, fault, scores, retry_after_us, by_deadline)
        self._replies[caller.reply].append(answer)

    # Decisions

    def _act(self, decisions: Iterable[Decision]) -> None:
        world = self.world
        for decision in decisions:
            if isinstance(decision, Drop):
                caller: Caller = decision.ticket.payload
                if world.trace is not None:
                    world.note(self.name, f"drops r{caller.request}: {decision.fault.name}, {decision.detail}")
                world.tally["decision", "batcher: dropped"] += 1
                self.shadow.dropped(decision)
                self._open.pop((caller.reply, caller.slot), None)
                self._answer(caller, decision.fault.name)
            elif isinstance(decision, Plead):
                world.tally["decision", "batcher: slot asked for"] += 1
                world.send(self, decision.executor, decision.demand)
            elif isinstance(decision, Dispatch):
                world.tally["decision", "batcher: sent again" if decision.again else "batcher: dispatched"] += 1
                self.shadow.dispatched(decision)
                world.send(self, decision.executor, self._joined(decision))

    def _joined(self, decision: Dispatch) -> Batch:
        rows = memoryview(b"".join(score(t.payload.request, t.rows) for t in decision.tickets))
        return Batch(
            decision.batch, self.name, decision.slot, *decision.model, decision.rows,
            rows, NOTHING, NOTHING, decision.budget_us, decision.demand,
        )  # fmt: skip

    def _score(self, tickets: list[Ticket], result: Result) -> None:
        at = 0
        for ticket in tickets:
            scores = result.scores[at : at + FLOAT_BYTES * ticket.rows]
            at += FLOAT_BYTES * ticket.rows
            if ticket.state is State.DONE:
                continue
            ticket.state = State.DONE
            self.shadow.ended(ticket)
            caller: Caller = ticket.payload
            self._open.pop((caller.reply, caller.slot), None)
            self._answer(caller, "", scores)

    def check(self) -> None:
        self.shadow.check()
