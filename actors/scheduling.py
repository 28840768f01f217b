"""The batcher's policy, a pure state machine: events and the time go in, decisions come out. No clock, no I/O.

Times are µs of one monotonic clock. The rules (docs: "how a request flows"):
work-conserving: a free slot takes what waits, at once; batches grow while all slots are busy.
More urgent classes first, but for a share that goes to work that has aged; inside a class tenants take turns, and
inside a tenant the earliest deadline goes first. What cannot be answered inside its budget is refused on arrival, or
as soon as that is known.
A batch whose executor is lost or silent is sent once more, to another one. A batch that fails is halved to find the
culprit.
"""

from collections.abc import Callable, Iterator, Sequence

from narsil_stream.actors.adaptive import Controller
from narsil_stream.actors.ageing import Ageing
from narsil_stream.actors.cutting import Cutting
from narsil_stream.actors.decisions import Decision, Dispatch, Drop, Rules, dropped
from narsil_stream.actors.flights import DEMAND_EVERY_US, Executor, Fleet, Flight, Group
from narsil_stream.actors.forecast import Forecast
from narsil_stream.actors.patience import in_order
from narsil_stream.actors.pleading import Pleading
from narsil_stream.actors.queue import ModelKey, Queue, State, Ticket
from narsil_stream.actors.retrying import Retries
from narsil_stream.actors.tenants import Tenants
from narsil_stream.schemas.errors import Fault, Refused, named
from narsil_stream.schemas.internal import ExecutorBeat, Result, Slot

FLOAT_BYTES = 4
NEVER = 1 << 62
OVERLOAD_US = 100_000
"""So long after a refusal more of them are expected."""
LATE = Fault.DEADLINE_EXCEEDED


class Scheduler:
    """See the module. `name` is the batcher's, for the messages; `near`: whether an executor is in this process."""

    def __init__(self, name: str, rules: Rules, near: Callable[[str], bool] = lambda _: False) -> None:
        self.name = name
        self._near = near
        self._rules = rules
        self.executors = Fleet()
        self.queues: dict[ModelKey, Queue] = {}
        self.tenants = Tenants(rules.weights)
        self.ageing = Ageing(rules.ageing)
        self.tuner = Controller(rules.slo_us, rules.max_rows, rules.linger_us)
        self.retries = Retries(self.executors)
        self.forecast = Forecast(self.executors, self.queues, self.ageing, self.tuner)
        self.cutting = Cutting(self.executors, self.queues, self.forecast, self.ageing, self.tuner)
        self.pleading = Pleading(name, self.executors, self.queues, self.retries)
        self._batches = 0
        self._decided_us = 0
        self._overloaded_us = -OVERLOAD_US
        self._told_rows = 0
        """What the last heartbeat said, also to executors that were not known here yet."""

    @property
    def rules(self) -> Rules:
        """May be replaced while it works: what was learnt is kept, but for the steps of tuning."""
        return self._rules

    @rules.setter
    def rules(self, rules: Rules) -> None:
        self._rules = rules
        self.ageing.share = rules.ageing
        self.tenants.weights = rules.weights
        for queue in self.queues.values():
            queue.reweigh()
        self.tuner.follow(rules.slo_us, rules.max_rows, rules.linger_us)

    @property
    def rows(self) -> int:
        """Rows waiting."""
        rows = 0
        for queue in self.queues.values():
            rows += queue.rows
        return rows

    @property
    def bytes(self) -> int:
        """Bytes waiting."""
        size = 0
        for queue in self.queues.values():
            size += queue.bytes
        return size

    @property
    def may_wait(self) -> bool:
        """Whether work may wait although an executor is free."""
        return bool(self.tuner.linger_us or self._rules.consolidate)

    # What happens

    def offer(self, ticket: Ticket, now_us: int) -> None:
        """Admit a ticket, or raise `Refused` with OVERLOADED, UNAVAILABLE or TOO_LARGE."""
        self.check(ticket, now_us)
        queue = self.queues.get(ticket.model)
        if queue is None:
            queue = self.queues[ticket.model] = Queue(self.tenants)
        queue.push(ticket)

    def overloaded(self, now_us: int) -> bool:
        """Whether a ticket was refused for that a moment ago: then it pays to ask `check` before anything else."""
        return now_us - self._overloaded_us < OVERLOAD_US

    def check(self, ticket: Ticket, now_us: int) -> None:
        """Raises what `offer` would raise."""
        rules = self._rules
        if ticket.rows > rules.max_rows or ticket.bytes > rules.max_bytes:
            raise Refused(
                Fault.TOO_LARGE,
                f"{ticket.rows} rows of {ticket.bytes} bytes; a request holds at most {rules.max_rows} rows"
                f" and {rules.max_bytes} bytes",
            )
        if not self.executors.offered(ticket.model):
            raise Refused(Fault.UNAVAILABLE, "no executor is alive for this model", rules.lease_us)
        self._find_room(ticket, now_us)
        budget_us = ticket.deadline_us - now_us
        if self.forecast.hopeless(ticket, now_us):
            raise Refused(Fault.DEADLINE_EXCEEDED, f"scoring it takes longer than its budget of {budget_us} us")
        late_us, itself = self.forecast.late_by(ticket, now_us)
        if late_us > 0:
            self._overloaded_us = now_us
            why = f"the wait would be {budget_us + late_us} us; the budget is {budget_us} us"
            raise Refused(Fault.OVERLOADED, why, late_us, by_deadline=itself)

    def _find_room(self, ticket: Ticket, now_us: int) -> None:
        """Raises OVERLOADED if the queue is full, or if its tenant has more than its share and little room is left."""
        rules, tenants = self._rules, self.tenants
        name = ticket.tenant = tenants.known_as(ticket.tenant)
        rows, size = self.rows + ticket.rows, self.bytes + ticket.bytes
        if rows > rules.queue_rows or size > rules.queue_bytes:
            why = f"the queue is full: {rows - ticket.rows} rows wait"
        elif len(tenants.waiting) > 1 and tenants.crowds(
            name, max(rows / rules.queue_rows, size / rules.queue_bytes), self._held(ticket)
        ):
            why = f"the queue is nearly full, and tenant '{name}' has more than its share of it"
        else:
            return
        self._overloaded_us = now_us
        raise Refused(Fault.OVERLOADED, why, max(self.forecast.wait_us(ticket.model, now_us), 1_000))

    def _held(self, ticket: Ticket) -> float:
        """The part of the queue that its tenant would hold with it."""
        rows, size = self.tenants.waiting[ticket.tenant]
        return max((rows + ticket.rows) / self._rules.queue_rows, (size + ticket.bytes) / self._rules.queue_bytes)

    def cancel(self, ticket: Ticket) -> None:
        """The caller has left. In flight it is computed, but nobody is answered."""
        if ticket.state is State.WAITING:
            self.queues[ticket.model].cancel(ticket)
        ticket.state = State.DONE

    def beat(self, beat: ExecutorBeat, now_us: int) -> list[Decision]:
        """An executor is alive, and says who holds its slots. Returns what its departure, if it is one, leads to."""
        executor = self.executors.get(beat.executor)
        if beat.state == "gone":
            self.executors.expected.pop(beat.executor, None)
            return [] if executor is None else self._lose(executor)
        if executor is None:
            executor = Executor(beat.executor, now_us, near=self._near(beat.executor), told_rows=self._told_rows)
            self.executors.add(executor)
        decisions: list[Decision] = []
        for flight in executor.hear(beat, self.name, now_us):
            flight.group.avoid.discard(executor.id)
            decisions += self.retries.again(flight.group)
        return decisions

    def grant(self, executor: str, slot: Slot, now_us: int) -> None:
        """Of an executor that is new here, or was lost: its heartbeat will say what it serves, and name the slot."""
        if executor in self.executors:
            self.executors[executor].offer_slot(slot)
        else:
            self.executors.expected[executor] = now_us + self._rules.lease_us

    def result(self, result: Result, now_us: int) -> tuple[list[Ticket], Sequence[Decision]]:
        """A batch came back. Returns its tickets in row order if they are scored now, and drops."""
        executor = self.executors.get(result.executor)
        if executor is None:
            return [], []
        if result.grant is not None:
            executor.offer_slot(result.grant)
        flight = executor.flights.pop(result.batch, None)
        if flight is None:
            return [], []
        executor.begin(now_us)
        group = flight.group
        if not flight.late:
            # Our own batches before it are counted as such; where others send or wait, theirs were before it as well.
            known_us = 0 if executor.rival_slots or executor.rival_rows else flight.ahead_us
            self.forecast.times.landed(group.model, now_us - flight.sent_us - known_us)
        size = result.scores.nbytes
        if size == flight.rows * FLOAT_BYTES:
            self.forecast.learn(flight, result.service_us, flight.begun_us == flight.sent_us, now_us)
            tickets = [] if group.done else flight.tickets
            group.done = True
            return tickets, []
        if group.done:
            return [], []
        if not size and not result.fault:
            return [], self.retries.bounced(group)
        fault = named(result.fault)
        return [], self.retries.failed(group, fault, result.detail or "the scores do not fit the batch")

    def too_large(self, dispatch: Dispatch, detail: str) -> Sequence[Decision]:
        """The joined message is larger than what may be sent: the batch goes in halves."""
        executor = self.executors[dispatch.executor]
        flight = executor.flights[dispatch.batch]
        executor.take_back(flight)
        return self.retries.failed(flight.group, Fault.TOO_LARGE, detail)

    # What to do

    def decide(self, now_us: int) -> list[Decision]:
        """All that is due now. Call after events, at the time that `wake_us` names, and several times in a lease."""
        self._excuse_own_pause(now_us)
        decisions: list[Decision] = []
        self.executors.give_up_expected(now_us)
        self.tuner.adjust(len(self.executors), now_us)
        decisions += self._lost_executors(now_us)
        if self._waits() or self.executors.busy():
            decisions += self._expired(now_us)
            decisions += self._unserved()
            decisions += self._hopeless(now_us)
            self.retries.add_overdue(now_us)
            decisions += self._dispatches(now_us)
        decisions += self.pleading.due(now_us)
        return decisions

    def wake_us(self, now_us: int) -> int | None:
        """When `decide` has to be called next, if no event comes before."""
        wake_us = self._next_ending_us(now_us)
        if self.executors.expected:
            wake_us = min(wake_us, *self.executors.expected.values())
        lease_us, pleads = self._rules.lease_us, self.pleading.pleads
        for executor in self.executors.values():
            if executor.seen_us + lease_us < wake_us:
                wake_us = executor.seen_us + lease_us
            for flight in executor.flights.values():
                if not flight.late and flight.overdue_us < wake_us:
                    wake_us = flight.overdue_us
            if executor.demanded_us + DEMAND_EVERY_US < wake_us and pleads(executor):
                wake_us = executor.demanded_us + DEMAND_EVERY_US
            if self.retries and executor.free and self.retries.wait_for(executor):
                return now_us
        return None if wake_us == NEVER else wake_us

    def backlog_us(self, model: ModelKey, now_us: int) -> int:
        """Predicted wait of a ticket that would come last."""
        return self.forecast.wait_us(model, now_us)

    def advertised(self, now_us: int) -> tuple[int, int]:
        """For the heartbeat, which goes to every executor: rows that wait, and µs until their earliest deadline."""
        rows = self._told_rows = self.rows
        for executor in self.executors.values():
            executor.told_rows = rows
        deadlines = [due for queue in self.queues.values() if (due := queue.earliest_deadline()) is not None]
        return rows, max(0, min(deadlines, default=now_us) - now_us)

    def idle(self) -> bool:
        """Nothing waits and nothing is under way."""
        return not self.rows and not any(group.is_open() for group in self._groups())

    def finishing(self) -> list[ModelKey]:
        """Models that no executor offers any more, and that tickets still wait for."""
        waiting = {model for model, queue in self.queues.items() if queue.count}
        waiting |= {group.model for group in self._groups() if group.is_open()}
        return [model for model in waiting if not self.executors.offered(model)]

    def forget(self, model: ModelKey) -> None:
        """What was learnt of a model that will not come back; nothing waits for it."""
        self.queues.pop(model, None)
        self.forecast.forget(model)

    def abandon_all(self) -> list[Drop]:
        """The end: every open ticket gets UNAVAILABLE."""
        tickets = [ticket for queue in self.queues.values() for ticket in queue.drain()]
        for group in self._groups():
            tickets += group.open_tickets()
            group.done = True
        self.retries.clear()
        return [dropped(ticket, Fault.UNAVAILABLE, "the batcher is stopping", 1_000) for ticket in tickets]

    # Endings

    def _expired(self, now_us: int) -> list[Drop]:
        drops: list[Drop] = []
        for queue in self.queues.values():
            due_us = queue.earliest_deadline()
            if due_us is not None and due_us <= now_us:
                drops += [dropped(ticket, LATE, "the budget ran out in the queue") for ticket in queue.expired(now_us)]
        for group in self._groups():
            drops += [dropped(ticket, LATE, "the budget ran out while scoring") for ticket in group.expired(now_us)]
        if self.retries:
            self.retries.forget_done()
        return drops

    def _hopeless(self, now_us: int) -> Iterator[Drop]:
        """What cannot be scored in time any more, even alone: computing it would make others late."""
        why = "too little of the budget is left to score it"
        return (dropped(ticket, LATE, why) for ticket in self.forecast.take_hopeless(now_us))

    def _excuse_own_pause(self, now_us: int) -> None:
        """Heartbeats that came while this process itself stood still are not read yet: nobody is dead for that."""
        pause_us, self._decided_us = now_us - self._decided_us, now_us
        if pause_us > self._rules.lease_us // 2:
            for executor in self.executors.values():
                executor.seen_us = max(executor.seen_us, now_us - self._rules.lease_us // 2)

    def _lost_executors(self, now_us: int) -> Iterator[Decision]:
        alive_us = now_us - self._rules.lease_us
        for executor in [executor for executor in self.executors.values() if executor.seen_us <= alive_us]:
            yield from self._lose(executor)

    def _lose(self, executor: Executor) -> list[Decision]:
        del self.executors[executor.id]
        decisions: list[Decision] = []
        for flight in executor.flights.values():
            flight.group.avoid.add(executor.id)
            decisions += self.retries.again(flight.group)
        return decisions

    def _unserved(self) -> Iterator[Decision]:
        """What waits for a model that no executor is left for."""
        for model in [model for model in self.queues if self.executors.hopeless(model)]:
            for ticket in self.queues.pop(model).drain():
                yield dropped(ticket, Fault.UNAVAILABLE, "no executor is alive for this model", 1_000)
        if self.retries:
            yield from self.retries.drop_unserved()

    # Sending

    def _dispatches(self, now_us: int) -> Iterator[Dispatch]:
        while self._waits():
            ready = [executor for executor in self.executors.values() if executor.up and executor.free]
            for executor in in_order(ready, self._rules.consolidate):
                group = self.retries.take_for(executor) or self.cutting.next(executor, self._rules, now_us)
                if group is not None:
                    yield self._dispatch(executor, group, now_us)
                    break
            else:
                return

    def _dispatch(self, executor: Executor, group: Group, now_us: int) -> Dispatch:
        rules = self._rules
        tickets = group.open_tickets()
        rows = sum(ticket.rows for ticket in tickets)
        self._batches += 1
        group.sends += 1
        predicted_us = self.forecast.times.predict(group.model, sum(ticket.work for ticket in tickets))
        ahead_us = executor.remaining_us(group.model, now_us)
        patience_us = int(rules.failover_factor * (ahead_us + predicted_us))
        patience_us = max(patience_us, rules.failover_floor_us, 0 if predicted_us else rules.lease_us)
        patience_us += executor.rival_slots * self.forecast.times.longest(group.model)
        slot = executor.spend()
        executor.flights[self._batches] = Flight(
            self._batches, group, slot, tickets, rows, now_us, predicted_us, ahead_us, now_us + patience_us
        )
        executor.begin(now_us)
        return Dispatch(
            batch=self._batches,
            executor=executor.id,
            slot=slot,
            model=group.model,
            tickets=tickets,
            rows=rows,
            budget_us=max(0, max(ticket.deadline_us for ticket in tickets) - now_us),
            demand=self.pleading.demand(executor, now_us),
            again=group.sends > 1,
        )

    # Looking around

    def _next_ending_us(self, now_us: int) -> int:
        """When the next budget runs out or becomes too short, or a wait for company ends."""
        next_us = NEVER
        for model, queue in self.queues.items():
            due_us, head = queue.earliest_deadline(), queue.head()
            if due_us is not None and head is not None:
                next_us = min(next_us, due_us)
                for alarm_us in (
                    self.forecast.hopeless_us(head),
                    *self.cutting.alarms(model, queue, self._rules, now_us),
                ):
                    if now_us < alarm_us < next_us:
                        next_us = alarm_us
        if self.retries or self.executors.busy():
            for group in self._groups():
                due_us = group.earliest_deadline()
                if due_us is not None and due_us < next_us:
                    next_us = due_us
        return next_us

    def _groups(self) -> list[Group]:
        """What was cut and may still be answered; one that flies twice comes twice."""
        groups = [group for group in self.retries if not group.done]
        for executor in self.executors.values():
            if executor.flights:
                groups += [flight.group for flight in executor.flights.values() if not flight.group.done]
        return groups

    def _waits(self) -> bool:
        """Whether anything waits to be sent."""
        if self.retries:
            return True
        for queue in self.queues.values():  # noqa: SIM110 - `any` takes twice as long, and this is asked all the time
            if queue.count:
                return True
        return False
