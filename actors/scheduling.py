"""The batcher's policy, a pure state machine: events and the time go in, decisions come out. No clock, no I/O.

Times are µs of one monotonic clock. The rules (docs: "how a request flows"):
work-conserving: a free slot takes what waits, at once; batches grow while all slots are busy.
Earliest deadline first inside a priority. What cannot be answered inside its budget is refused on arrival.
A batch whose executor is lost or silent is sent once more, to another one. A batch that fails is halved to find the
culprit.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from msgspec import Struct

from narsil_stream.actors.queue import ModelKey, Queue, State, Ticket
from narsil_stream.actors.service_time import ServiceTimes
from narsil_stream.schemas.errors import Fault, Refused
from narsil_stream.schemas.internal import Demand, ExecutorBeat, Result, Slot

DEMAND_EVERY_US = 20_000
"""How often waiting work asks an executor for a slot again."""
MAX_SENDS = 2
"""A batch goes to one executor and, if that one is lost or silent, to one other."""


class Rules(Struct, frozen=True):
    max_rows: int
    max_bytes: int
    queue_rows: int
    queue_bytes: int
    lease_us: int
    failover_floor_us: int
    failover_factor: float
    linger_us: int = 0
    coalesce: bool = True
    """False: one request is one batch (mode `worker`)."""


@dataclass(slots=True, eq=False)
class Group:
    """Tickets that travel as one batch, with its history."""

    model: ModelKey
    tickets: list[Ticket]
    rows: int
    sends: int = 0
    avoid: set[str] = field(default_factory=set)
    """Executors that were lost or silent with it."""
    done: bool = False

    def open_tickets(self) -> list[Ticket]:
        return [ticket for ticket in self.tickets if ticket.state is State.IN_FLIGHT]


@dataclass(slots=True, eq=False)
class Flight:
    """One sending of a group: `tickets` in the order of this batch's rows, whatever the group loses meanwhile."""

    batch: int
    group: Group
    tickets: list[Ticket]
    executor: str
    slot: Slot
    sent_us: int
    overdue_us: int


@dataclass(slots=True, eq=False)
class Executor:
    """What the batcher knows of one executor."""

    id: str
    seen_us: int
    models: frozenset[ModelKey] = frozenset()
    slots: int = 0
    up: bool = True
    free: dict[int, int] = field(default_factory=dict)
    """Slots in hand: index -> generation."""
    spent: dict[int, int] = field(default_factory=dict)
    """Newest generation of each slot that was used or void."""
    flights: dict[int, Flight] = field(default_factory=dict)
    abandoned: dict[int, int] = field(default_factory=dict)
    """Slots whose batch may never have arrived: given back with every demand until the executor says otherwise."""
    demanded_us: int = -DEMAND_EVERY_US

    def offer_slot(self, slot: Slot) -> None:
        if slot.generation > self.spent.get(slot.index, -1):
            self.free[slot.index] = slot.generation

    def void_flights(self, now_us: int) -> list[Flight]:
        """Takes out overdue batches whose slot is back in hand: they, or their results, were lost on the way."""
        lost = [f for f in self.flights.values() if f.overdue_us <= now_us and f.slot.index in self.free]
        for flight in lost:
            del self.flights[flight.batch]
            self.abandoned.pop(flight.slot.index, None)
        return lost

    def spend(self, index: int) -> Slot:
        slot = Slot(index, self.free.pop(index))
        self.spent[index] = slot.generation
        return slot


class Dispatch(Struct, frozen=True):
    """Send these tickets as one batch."""

    batch: int
    executor: str
    slot: Slot
    model: ModelKey
    tickets: list[Ticket]
    rows: int
    budget_us: int
    demand: Demand
    again: bool
    """Sent before, to an executor that was lost or silent."""


class Drop(Struct, frozen=True):
    """Answer this ticket with an error."""

    ticket: Ticket
    fault: Fault
    detail: str
    retry_after_us: int = 0


class Plead(Struct, frozen=True):
    """Tell an executor what waits."""

    executor: str
    demand: Demand


Decision = Dispatch | Drop | Plead


class Scheduler:
    """See the module. `name` is the batcher's, for the messages."""

    def __init__(self, name: str, rules: Rules) -> None:
        self.name = name
        self.rules = rules
        self.executors: dict[str, Executor] = {}
        self.queues: dict[ModelKey, Queue] = {}
        self.retries: list[Group] = []
        self.times = ServiceTimes()
        self.rows = 0
        self.bytes = 0
        self._batches = 0
        self._decided_us = 0

    # What happens

    def offer(self, ticket: Ticket, now_us: int) -> None:
        """Admit a ticket, or raise `Refused` with OVERLOADED, UNAVAILABLE or TOO_LARGE."""
        rules = self.rules
        if ticket.rows > rules.max_rows or ticket.bytes > rules.max_bytes:
            raise Refused(
                Fault.TOO_LARGE,
                f"{ticket.rows} rows of {ticket.bytes} bytes; a request holds at most {rules.max_rows} rows"
                f" and {rules.max_bytes} bytes",
            )
        serving = sum(1 for _ in self._serving(ticket.model))
        if not serving:
            raise Refused(Fault.UNAVAILABLE, "no executor is alive for this model", rules.lease_us)
        if self.rows + ticket.rows > rules.queue_rows or self.bytes + ticket.bytes > rules.queue_bytes:
            wait_us = self.wait_us(ticket.model, self.rows, serving, now_us)
            raise Refused(Fault.OVERLOADED, f"the queue is full: {self.rows} rows wait", max(wait_us, 1_000))
        late_us = self._late_by(ticket, serving, now_us)
        if late_us > 0:
            budget_us = ticket.deadline_us - ticket.arrived_us
            raise Refused(
                Fault.OVERLOADED,
                f"the wait would be {budget_us + late_us} us; the budget is {budget_us} us",
                late_us,
            )
        self.queues.setdefault(ticket.model, Queue()).push(ticket)
        self.rows += ticket.rows
        self.bytes += ticket.bytes

    def cancel(self, ticket: Ticket) -> None:
        """The caller has left. In flight it is computed, but nobody is answered."""
        if ticket.state is State.WAITING:
            self.queues[ticket.model].forget(ticket)
            self._forget(ticket)
        ticket.state = State.DONE

    def beat(self, beat: ExecutorBeat, now_us: int) -> list[Decision]:
        """An executor is alive, and says who holds its slots. Returns what its departure, if it is one, leads to."""
        executor = self.executors.get(beat.executor)
        if beat.state == "gone":
            return [] if executor is None else self._lose(executor)
        if executor is None:
            executor = self.executors[beat.executor] = Executor(beat.executor, now_us)
        executor.seen_us = now_us
        executor.models = frozenset(ModelKey(ref.name, ref.version) for ref in beat.models)
        executor.slots = beat.slots
        executor.up = beat.state == "up"
        ours = [lease for lease in beat.leases if lease.batcher == self.name]
        executor.free.clear()
        for lease in ours:
            if not lease.busy:
                executor.offer_slot(lease.slot)
        still = {lease.slot.index: lease.slot.generation for lease in ours if not lease.busy}
        executor.abandoned = {i: g for i, g in executor.abandoned.items() if still.get(i) == g}
        decisions: list[Decision] = []
        for flight in executor.void_flights(now_us):
            if not flight.group.done and flight.group not in self.retries:
                flight.group.avoid.discard(executor.id)
                decisions += self._again(flight.group)
        return decisions

    def grant(self, executor: str, slot: Slot) -> None:
        if executor in self.executors:
            self.executors[executor].offer_slot(slot)

    def result(self, result: Result, now_us: int) -> tuple[list[Ticket], list[Decision]]:
        """A batch came back. Returns its tickets in row order if they are scored now, and drops."""
        executor = self.executors.get(result.executor)
        if executor is None:
            return [], []
        flight = executor.flights.pop(result.batch, None)
        if result.grant is not None:
            executor.offer_slot(result.grant)
        if flight is None or flight.group.done:
            return [], []
        group = flight.group
        if len(result.scores):
            self.times.observe(group.model, group.rows, result.service_us)
            group.done = True
            return flight.tickets, []
        if not result.fault:
            group.sends -= 1
            group.avoid.discard(executor.id)  # it is alive, and has not run it
            return [], self._again(group)
        return [], self._failed(group, result)

    # What to do

    def decide(self, now_us: int) -> list[Decision]:
        """All that is due now. Call after events, and at the time that `wake_us` names."""
        self._excuse_own_pause(now_us)
        decisions: list[Decision] = []
        decisions += self._lost_executors(now_us)
        decisions += self._expired(now_us)
        decisions += self._unserved()
        self._overdue(now_us)
        decisions += self._dispatches(now_us)
        decisions += self._pleas(now_us)
        return decisions

    def wake_us(self, now_us: int) -> int | None:
        """When `decide` has to be called next, if no event comes before."""
        times = [e.seen_us + self.rules.lease_us for e in self.executors.values()]
        for queue in self.queues.values():
            due = queue.earliest_deadline()
            if due is not None:
                times.append(due)
                lingers = queue.head() if self.rules.linger_us else None
                if lingers is not None and lingers.arrived_us + self.rules.linger_us > now_us:
                    times.append(lingers.arrived_us + self.rules.linger_us)
        for group in self._open_groups():
            times += [ticket.deadline_us for ticket in group.open_tickets()]
        for executor in self.executors.values():
            times += [f.overdue_us for f in executor.flights.values() if not f.group.done and f.overdue_us > now_us]
        if self.rows and any(self._wants_slot(e) for e in self.executors.values()):
            times.append(now_us + DEMAND_EVERY_US)
        return min(times, default=None)

    def wait_us(self, model: ModelKey, rows_ahead: int, executors: int, now_us: int) -> int:
        """Predicted time until a ticket behind `rows_ahead` rows starts: these and what is in flight, shared out."""
        ahead_us = rows_ahead * self.times.us_per_row(model)
        for executor in self._serving(model):
            for flight in executor.flights.values():
                took = self.times.predict(flight.group.model, flight.group.rows)
                ahead_us += max(0, took - (now_us - flight.sent_us))
        return int(ahead_us / max(1, executors))

    def backlog_us(self, model: ModelKey, now_us: int) -> int:
        """Predicted wait of a ticket that would come last."""
        return self.wait_us(model, self.rows, sum(1 for _ in self._serving(model)), now_us)

    def idle(self) -> bool:
        """Nothing waits and nothing is under way."""
        return not self.rows and not any(True for _ in self._open_groups())

    def abandon_all(self) -> list[Decision]:
        """The end: every open ticket gets UNAVAILABLE."""
        waiting = [ticket for queue in self.queues.values() for ticket in queue.drain()]
        flying = [ticket for group in self._open_groups() for ticket in group.open_tickets()]
        for ticket in waiting:
            self._forget(ticket)
        for group in list(self._open_groups()):
            group.done = True
        self.retries.clear()
        return [self._drop(t, Fault.UNAVAILABLE, "the batcher is stopping", 1_000) for t in waiting + flying]

    # Admission

    def _late_by(self, ticket: Ticket, serving: int, now_us: int) -> int:
        """By how much the predicted answer misses the ticket's deadline; counts only what would be served before it."""
        room_us = ticket.deadline_us - now_us - self.times.predict(ticket.model, ticket.rows)
        late_us = self.wait_us(ticket.model, self.rows, serving, now_us) - room_us
        queue = self.queues.get(ticket.model)
        if late_us <= 0 or queue is None:
            return late_us
        ahead = queue.rows_ahead(ticket.priority, ticket.deadline_us)
        return self.wait_us(ticket.model, ahead, serving, now_us) - room_us

    # Endings

    def _drop(self, ticket: Ticket, fault: Fault, detail: str, retry_after_us: int = 0) -> Drop:
        ticket.state = State.DONE
        return Drop(ticket, fault, detail, retry_after_us)

    def _forget(self, ticket: Ticket) -> None:
        self.rows -= ticket.rows
        self.bytes -= ticket.bytes

    def _expired(self, now_us: int) -> Iterator[Decision]:
        for queue in self.queues.values():
            for ticket in list(queue.expired(now_us)):
                self._forget(ticket)
                yield self._drop(ticket, Fault.DEADLINE_EXCEEDED, "the budget ran out in the queue")
        for group in list(self._open_groups()):
            for ticket in group.open_tickets():
                if ticket.deadline_us <= now_us:
                    yield self._drop(ticket, Fault.DEADLINE_EXCEEDED, "the budget ran out while scoring")
        self.retries = [group for group in self.retries if group.open_tickets()]

    def _excuse_own_pause(self, now_us: int) -> None:
        """Heartbeats that came while this process itself stood still are not read yet: nobody is dead for that."""
        pause_us = now_us - self._decided_us
        self._decided_us = now_us
        if pause_us > self.rules.lease_us // 2:
            for executor in self.executors.values():
                executor.seen_us = max(executor.seen_us, now_us - self.rules.lease_us // 2)

    def _lost_executors(self, now_us: int) -> Iterator[Decision]:
        for executor in list(self.executors.values()):
            if executor.seen_us + self.rules.lease_us <= now_us:
                yield from self._lose(executor)

    def _lose(self, executor: Executor) -> list[Decision]:
        del self.executors[executor.id]
        decisions: list[Decision] = []
        for flight in executor.flights.values():
            if not flight.group.done and flight.group not in self.retries:
                flight.group.avoid.add(executor.id)
                decisions += self._again(flight.group)
        return decisions

    def _unserved(self) -> Iterator[Decision]:
        """What waits for a model that no executor is left for."""
        for model, queue in self.queues.items():
            if queue.count and not any(True for _ in self._serving(model)):
                for ticket in list(queue.drain()):
                    self._forget(ticket)
                    yield self._drop(ticket, Fault.UNAVAILABLE, "no executor is alive for this model", 1_000)
        for group in [g for g in self.retries if not any(True for _ in self._serving(g.model))]:
            self.retries.remove(group)
            yield from self._give_up(group)

    def _give_up(self, group: Group) -> Iterator[Decision]:
        group.done = True
        for ticket in group.open_tickets():
            yield self._drop(ticket, Fault.UNAVAILABLE, "the executor was lost", 1_000)

    def _again(self, group: Group) -> list[Decision]:
        """Send a group once more, unless another sending of it is still under way or its tries are used up."""
        if self._flying(group):
            return []
        if group.sends >= MAX_SENDS or not any(True for _ in self._serving(group.model)):
            return list(self._give_up(group))
        self.retries.append(group)
        return []

    def _failed(self, group: Group, result: Result) -> list[Decision]:
        """The forward pass raised: halve the batch, so that one poisonous request fails alone."""
        if self._flying(group):
            return []
        group.done = True
        open_tickets = group.open_tickets()
        if result.fault != Fault.INTERNAL.name or len(open_tickets) == 1:
            fault = Fault.__members__.get(result.fault, Fault.INTERNAL)
            return [self._drop(ticket, fault, result.detail) for ticket in open_tickets]
        middle = (len(open_tickets) + 1) // 2
        for half in (open_tickets[:middle], open_tickets[middle:]):
            if half:
                self.retries.append(Group(group.model, half, sum(t.rows for t in half)))
        return []

    def _overdue(self, now_us: int) -> None:
        """Batches whose executor is alive but silent: once more, to another one, if there is one."""
        for executor in self.executors.values():
            for flight in executor.flights.values():
                group = flight.group
                if group.done or flight.overdue_us > now_us or executor.id in group.avoid:
                    continue
                executor.abandoned[flight.slot.index] = flight.slot.generation
                group.avoid.add(executor.id)
                others = any(e.id not in group.avoid for e in self._serving(group.model))
                if others and group.sends < MAX_SENDS and group not in self.retries:
                    self.retries.append(group)

    # Sending

    def _dispatches(self, now_us: int) -> Iterator[Decision]:
        sent = True
        while sent:
            sent = False
            ready = [e for e in self.executors.values() if e.up and e.free]
            for executor in sorted(ready, key=lambda e: len(e.flights)):
                group = self._retry_for(executor) or self._cut(executor, now_us)
                if group is not None:
                    yield self._dispatch(executor, group, now_us)
                    sent = True
                    break

    def _retry_for(self, executor: Executor) -> Group | None:
        for group in self.retries:
            if self._may_take(executor, group):
                self.retries.remove(group)
                group.tickets = group.open_tickets()
                group.rows = sum(ticket.rows for ticket in group.tickets)
                if group.tickets:
                    return group
                group.done = True
                return self._retry_for(executor)
        return None

    def _may_take(self, executor: Executor, group: Group) -> bool:
        """Those that failed a group get it again only when nobody else is left: better twice there than nowhere."""
        if group.model not in executor.models:
            return False
        return executor.id not in group.avoid or all(e.id in group.avoid for e in self._serving(group.model))

    def _cut(self, executor: Executor, now_us: int) -> Group | None:
        """The next batch for this executor: the most urgent model's tickets, up to the limits."""
        heads = [(q.head(), q) for model, q in self.queues.items() if q.count and model in executor.models]
        waiting = [(h.priority, h.deadline_us, h.id, q) for h, q in heads if h is not None]
        if not waiting:
            return None
        queue = min(waiting)[3]
        head = queue.head()
        if head is None or (self.rules.linger_us and self._lingers(queue, head, now_us)):
            return None
        tickets: list[Ticket] = []
        rows = size = 0
        limit = self.rules.max_rows if self.rules.coalesce else 0
        while head is not None and (not tickets or (rows + head.rows <= limit)):
            if tickets and size + head.bytes > self.rules.max_bytes:
                break
            tickets.append(queue.pop())
            head.state = State.IN_FLIGHT
            self._forget(head)
            rows += head.rows
            size += head.bytes
            head = queue.head()
        return Group(tickets[0].model, tickets, rows)

    def _lingers(self, queue: Queue, head: Ticket, now_us: int) -> bool:
        return queue.rows < self.rules.max_rows and now_us < head.arrived_us + self.rules.linger_us

    def _dispatch(self, executor: Executor, group: Group, now_us: int) -> Dispatch:
        slot = executor.spend(next(iter(executor.free)))
        self._batches += 1
        group.sends += 1
        predicted = self.times.predict(group.model, group.rows)
        ahead = sum(self.times.predict(f.group.model, f.group.rows) for f in executor.flights.values())
        patience = max(int(self.rules.failover_factor * (ahead + predicted)), self.rules.failover_floor_us)
        overdue_us = now_us + (patience if predicted else max(patience, self.rules.lease_us))
        executor.flights[self._batches] = Flight(
            self._batches, group, group.tickets, executor.id, slot, now_us, overdue_us
        )
        budget_us = max(ticket.deadline_us for ticket in group.tickets) - now_us
        demand = self._demand(executor, now_us)
        return Dispatch(
            batch=self._batches,
            executor=executor.id,
            slot=slot,
            model=group.model,
            tickets=group.tickets,
            rows=group.rows,
            budget_us=max(budget_us, 0),
            demand=demand,
            again=group.sends > 1,
        )

    def _pleas(self, now_us: int) -> Iterator[Decision]:
        for executor in self.executors.values():
            if not executor.abandoned and not (self.rows and self._wants_slot(executor)):
                continue
            if now_us - executor.demanded_us >= DEMAND_EVERY_US:
                executor.demanded_us = now_us
                yield Plead(executor.id, self._demand(executor, now_us))

    def _wants_slot(self, executor: Executor) -> bool:
        """Whether asking could help: it serves something that waits, and others hold slots of it."""
        if executor.free or not executor.up or len(executor.flights) >= executor.slots:
            return False
        return any(self.queues[model].count for model in executor.models if model in self.queues)

    def _demand(self, executor: Executor, now_us: int) -> Demand:
        waiting = [q for model, q in self.queues.items() if q.count and model in executor.models]
        deadlines = [due for q in waiting if (due := q.earliest_deadline()) is not None]
        slack = max(0, min(deadlines) - now_us) if deadlines else 0
        returned = tuple(Slot(i, g) for i, g in executor.abandoned.items())
        return Demand(self.name, sum(q.rows for q in waiting), slack, returned)

    # Looking around

    def _serving(self, model: ModelKey) -> Iterator[Executor]:
        return (e for e in self.executors.values() if e.up and model in e.models)

    def _flying(self, group: Group) -> bool:
        return any(f.group is group for e in self.executors.values() for f in e.flights.values())

    def _open_groups(self) -> Iterable[Group]:
        flying = {id(f.group): f.group for e in self.executors.values() for f in e.flights.values()}
        flying |= {id(group): group for group in self.retries}
        return [group for group in flying.values() if not group.done]
