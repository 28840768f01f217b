"""The referee's own record of a batcher: what waits there and what is under way, kept beside the policy's."""

from typing import TYPE_CHECKING

from narsil_stream.actors.decisions import Dispatch, Drop
from narsil_stream.actors.leasing import Place
from narsil_stream.actors.queue import ModelKey, State, Ticket
from narsil_stream.actors.retrying import MAX_SENDS
from narsil_stream.actors.simulation.fairness import Fairness
from narsil_stream.actors.simulation.referee import TICKET_GRACE_US
from narsil_stream.schemas.errors import Fault

if TYPE_CHECKING:
    from narsil_stream.actors.simulation.batcher import Batcher

RECOUNT_EVERY = 64


class Shadow:
    """See the module. Adds and subtracts as things happen, and counts again from the start every 64 events."""

    def __init__(self, batcher: "Batcher") -> None:
        self._batcher = batcher
        self._policy = batcher.policy
        self._referee = batcher.world.referee
        self._waiting: dict[int, Ticket] = {}
        self._fairness = Fairness(batcher, self._waiting)
        self._deadlines: dict[int, int] = {}
        self._under_way: dict[int, tuple[str, int]] = {}
        """Executor and batch of each ticket's last sending."""
        self._announced: dict[str, int] = {}
        """Executors that gave a slot before their heartbeat was heard, and until when that counts."""
        self.rows = 0
        self._bytes = 0
        self._checks = 0

    def admitted(self, ticket: Ticket, deadline_us: int) -> None:
        """The deadline is what the request says, by the batcher's clock."""
        batcher = self._batcher
        batcher.unended[ticket.id] = ticket
        self._deadlines[ticket.id] = deadline_us
        self._referee.watch(batcher, ticket.id, deadline_us - batcher.skew_us, TICKET_GRACE_US)
        self._waiting[ticket.id] = ticket
        self._fairness.joined(ticket, deadline_us)
        self.rows += ticket.rows
        self._bytes += ticket.bytes

    def ended(self, ticket: Ticket) -> None:
        if self._batcher.unended.pop(ticket.id, None) is None:
            self._referee.fail(f"{self._batcher.name} ended r{ticket.payload.request} twice")
        self._under_way.pop(ticket.id, None)
        if ticket.id in self._waiting:
            self._left(ticket)

    def granted(self, executor: str) -> None:
        """A slot came. From an executor that is not known yet, it announces one."""
        if executor not in self._policy.executors:
            self._announced[executor] = self._batcher.clock() + self._policy.rules.lease_us

    def dropped(self, drop: Drop) -> None:
        """Not for want of an executor while one is known to come."""
        self.ended(drop.ticket)
        if self._announced and drop.fault is Fault.UNAVAILABLE and drop.detail.startswith("no executor"):
            now, batcher, number = self._batcher.clock(), self._batcher, drop.ticket.payload.request
            for name, until_us in self._announced.items():
                executor = batcher.world.executors_by_name.get(name)
                unheard = name not in self._policy.executors and executor is not None and executor.phase == "up"
                if unheard and now < until_us:
                    self._referee.fail(f"{batcher.name} drops r{number} although {name} has just given it a slot")

    def heard(self, executor: str) -> None:
        """Its heartbeat came."""
        self._announced.pop(executor, None)

    def _left(self, ticket: Ticket) -> None:
        del self._waiting[ticket.id]
        self._fairness.left(ticket)
        self.rows -= ticket.rows
        self._bytes -= ticket.bytes

    def dispatched(self, decision: Dispatch) -> None:
        """Within the limits, for somebody who still waits, not twice at once, and nothing more urgent left behind."""
        rules, name, fail = self._policy.rules, self._batcher.name, self._referee.fail
        tickets = decision.tickets
        if not tickets or decision.rows != sum(ticket.rows for ticket in tickets):
            fail(f"{name}: batch {decision.batch} does not hold its rows")
        if decision.rows > rules.max_rows or sum(ticket.bytes for ticket in tickets) > rules.max_bytes:
            fail(f"{name}: batch {decision.batch} of {decision.rows} rows is too large")
        if not rules.coalesce and len(tickets) > 1:
            fail(f"{name}: batch {decision.batch} joins requests although each should go alone")
        now = self._batcher.clock()
        fresh = [ticket for ticket in tickets if ticket.id in self._waiting]
        for ticket in tickets:
            if ticket.state is not State.IN_FLIGHT or ticket.id not in self._batcher.unended:
                fail(f"{name} computes r{ticket.payload.request} for nobody")
            if self._deadlines[ticket.id] <= now:
                fail(f"{name} computes r{ticket.payload.request} although its budget has run out")
            self._check_alone(ticket)
            self._under_way[ticket.id] = (decision.executor, decision.batch)
        if fresh:
            self._fairness.serves(decision.model, fresh)
        for ticket in fresh:
            self._left(ticket)
        if fresh:
            self._fairness.check(decision.executor, decision.model, fresh, now)
        flight = self._policy.executors.flight(decision.executor, decision.batch)
        if flight is None or flight.group.sends > MAX_SENDS:
            fail(f"{name} sends batch {decision.batch} too often")

    def _check_alone(self, ticket: Ticket) -> None:
        before = self._under_way.get(ticket.id)
        if before is not None:
            flight = self._policy.executors.flight(*before)
            if flight is not None and not flight.late:
                self._referee.fail(
                    f"{self._batcher.name} sends r{ticket.payload.request} again while it is under way at {before[0]}"
                )

    def check(self) -> None:
        """After each event of the batcher."""
        policy, rules, name, fail = self._policy, self._policy.rules, self._batcher.name, self._referee.fail
        rows = size = 0
        for queue in policy.queues.values():
            rows += queue.rows
            size += queue.bytes
        if rows != self.rows or size != self._bytes:
            fail(f"{name} counts {rows} rows and {size} bytes; {self.rows} rows and {self._bytes} bytes wait")
        if rows > rules.queue_rows or size > rules.queue_bytes:
            fail(f"{name} holds {rows} rows and {size} bytes, more than its bounds")
        actors = self._batcher.world.executors_by_name
        for known in policy.executors.values():
            if known.free:
                if (
                    rows
                    and known.up
                    and not policy.may_wait
                    and self.wanted(frozenset(filter(known.idle, known.models)))
                ):
                    fail(f"{name} holds a slot of {known.id} and lets work wait")
                actor = actors.get(known.id)
                if actor is not None:
                    self._check_slots(known.free, actor.ledger.places)
        self._checks += 1
        if not self._checks % RECOUNT_EVERY:
            self.recount()

    def _check_slots(self, free: dict[int, int], places: list[Place]) -> None:
        for index, generation in free.items():
            if index >= len(places) or generation > places[index].generation:
                self._referee.fail(f"{self._batcher.name} has a slot {index}.{generation} that nobody gave")
            place = places[index]
            if generation == place.generation and place.holder != self._batcher.name:
                self._referee.fail(
                    f"{self._batcher.name} and {place.holder or 'nobody'} have slot {index}.{generation}"
                )

    def wanted(self, models: frozenset[ModelKey]) -> bool:
        """Whether work waits in the queue that an executor of these models can do."""
        for model, queue in self._policy.queues.items():  # noqa: SIM110 - `any` takes twice as long
            if queue.count and model in models:
                return True
        return False

    def recount(self) -> None:
        """All over again, from the tickets themselves."""
        fail, name = self._referee.fail, self._batcher.name
        waiting = [ticket for ticket in self._batcher.unended.values() if ticket.state is State.WAITING]
        if sum(ticket.rows for ticket in waiting) != self.rows or len(waiting) != len(self._waiting):
            fail(f"{name} has lost count of what waits")
        if sum(queue.count for queue in self._policy.queues.values()) != len(waiting):
            fail(f"{name} has lost count of the tickets that wait")
