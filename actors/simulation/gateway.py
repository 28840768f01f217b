"""A simulated gateway: as `core.requester`, whose policies, `Router` and `Throttle`, are the real ones."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from narsil_stream.actors.simulation.actor import Actor
from narsil_stream.actors.simulation.messages import Answer, Message, Replies, Wish, Wishes
from narsil_stream.core import routing
from narsil_stream.core.routing import Router
from narsil_stream.core.throttle import LASTS_US, Asked, Flow, Throttle, kind
from narsil_stream.schemas.errors import Refused
from narsil_stream.schemas.internal import BatcherBeat, Cancel

if TYPE_CHECKING:
    from narsil_stream.actors.simulation.world import World


class Connected:
    """A broker that never goes away: what is lost on its way is the weather's part."""

    connected = True

    def is_local(self, subject: str) -> bool:
        return False


@dataclass(slots=True, eq=False, kw_only=True)
class Request(routing.Pending):
    number: int
    rows: int
    priority: int
    budget_us: int
    tenant: str
    flow: Flow


class Gateway(Actor):
    kind = "gateway"

    def __init__(self, world: "World", name: str) -> None:
        super().__init__(world, name)
        self.router: Router[Request] = Router(Connected(), self.clock())
        self._check_due_us = 0
        self._resent = 0
        self._throttle = Throttle(few=0)
        self._refused_us = -LASTS_US
        """When a batcher refused something last."""

    def ask(self, number: int, model: str, rows: int, priority: int, budget_us: int, tenant: str = "") -> Request:
        """Somebody asks. The request leaves with the next turn."""
        request = Request(
            self.router.slot(), model, "", self.clock() + budget_us, rows * 40,
            number=number, rows=rows, priority=priority, budget_us=budget_us, tenant=tenant,
            flow=self._throttle.flow(kind(model, "", tenant, priority, budget_us), self.clock()),
        )  # fmt: skip
        self.world.referee.asked(self, request)
        now = self.clock()
        try:
            self._check_throttle(request, now)
            self.router.add(request)
        except Refused as refused:
            self.world.referee.answered(self, request, refused.fault.name)
        return request

    def _check_throttle(self, request: Request, now: int) -> None:
        """Raises OVERLOADED, as batchers have lately."""
        try:
            asked = Asked(request.deadline_us, request.nbytes)
            request.flow.check_said(asked, lambda: self.router.choice(request.model, ""), now)
            request.flow.check(now)
        except Refused:
            self.world.tally["decision", "gateway: request throttled"] += 1
            if now - self._refused_us > LASTS_US:
                self.world.referee.fail(f"{self.name} throttles although no batcher has refused anything lately")
            raise

    def withdraw(self, request: Request) -> None:
        """Whoever asked has left."""
        if self.alive and not self.frozen() and self.router.end(request):
            self.world.referee.answered(self, request, "CANCELLED")
            self.world.send(self, request.batcher, Cancel(self.name, (request.slot,)))
            self.step()

    def receive(self, message: Message) -> bool:
        if isinstance(message, Replies):
            for answer in message.answers:
                request = self.router.answered(answer.slot, message.batcher, answer.fault)
                if request is None:
                    self.world.tally["decision", "gateway: answer to nobody"] += 1
                else:
                    self._learn(request, message.batcher, answer)
                    self.world.referee.answered(self, request, answer.fault or "scored", answer.scores)
        elif isinstance(message, BatcherBeat):
            self._fail(self.router.beat(message, self.clock()))
            return self.router.has_outgoing()
        return True

    def _learn(self, request: Request, batcher: str, answer: Answer) -> None:
        now = self.clock()
        if answer.fault == "OVERLOADED":
            self._refused_us = now
            request.flow.refused(answer.retry_after_us, now)
            if answer.by_deadline:
                asked = Asked(request.deadline_us, request.nbytes)
                request.flow.said(batcher, asked, answer.retry_after_us, now)
        else:
            request.flow.accepted(now)

    def turn(self) -> int:
        now, router = self.clock(), self.router
        if now >= self._check_due_us:
            self._check_due_us = now + self.world.beat_us
            for batcher in router.silent(now):
                self.world.count("gateway: batcher lost", self.name, batcher)
                self._fail(router.lose(batcher))
        self._fail(router.expired(now))
        if router.resent != self._resent:
            self.world.tally["decision", "gateway: request sent again"] += router.resent - self._resent
            self._resent = router.resent
        if router.has_outgoing():
            self._send(now)
        due_us = router.wake_us()
        return self._check_due_us if due_us is None else min(due_us, self._check_due_us)

    def _send(self, now: int) -> None:
        wall = self.wall()
        for batcher, bundle in self.router.outgoing():
            wishes = tuple(
                Wish(r.slot, r.number, r.model, r.rows, r.priority, max(1, r.deadline_us - now), wall, r.tenant)
                for r in bundle
            )
            self.world.send(self, batcher, Wishes(self.name, wishes))

    def _fail(self, failed: list[tuple[Request, Refused]]) -> None:
        for request, refused in failed:
            self.world.referee.answered(self, request, refused.fault.name)

    def check(self) -> None:
        router, fail = self.router, self.world.referee.fail
        if len(router.pending) != len(self.unended):
            fail(f"{self.name} has lost sight of a request")
        if sum([len(peer.open) for peer in router.peers.values()]) != len(router.pending):
            fail(f"{self.name}: a request is with no batcher that is alive")
