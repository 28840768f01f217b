"""The batcher's policy, a pure state machine: events and the time go in, decisions come out. No clock, no I/O.

Times are µs of one monotonic clock. The rules (docs: "how a request flows"):
work-conserving: a free slot takes what waits, at once; batches grow while all slots are busy.
Earliest deadline first inside a priority. What cannot be answered inside its budget is refused on arrival.
A batch whose executor is lost or silent is sent once more, to another one. A batch that fails is halved to find the
culprit.
"""

from collections.abc import Iterator
from itertools import chain

from narsil_stream.actors.adaptive import Controller
from narsil_stream.actors.decisions import Decision, Dispatch, Drop, Plead, Rules
from narsil_stream.actors.flights import DEMAND_EVERY_US, Executor, Fleet, Flight, Group
from narsil_stream.actors.patience import in_order, spared_us, staged_us
from narsil_stream.actors.queue import ModelKey, Queue, State, Ticket
from narsil_stream.actors.service_time import Pace, ServiceTimes
from narsil_stream.schemas.errors import Fault, Refused, named
from narsil_stream.schemas.internal import Demand, ExecutorBeat, Result, Slot

MAX_SENDS = 2
"""A batch goes to one executor and, if that one is lost or silent, to one other."""
MAX_BOUNCES = 8
"""So often a batch may meet a void slot: more means that executors take back what they lease."""
FLOAT_BYTES = 4
MARGIN = 1.25
"""Of the predicted wait at admission: a queue that is filled up to the deadlines misses half of them."""


class Scheduler:
    """See the module. `name` is the batcher's, for the messages."""

    def __init__(self, name: str, rules: Rules) -> None:
        self.name = name
        self.rules = rules
        self.executors = Fleet()
        self.queues: dict[ModelKey, Queue] = {}
        self.retries: list[Group] = []
        self.times = ServiceTimes()
        self.tuner = Controller(rules.slo_us, rules.max_rows, rules.linger_us)
        self.paces: dict[ModelKey, Pace] = {}
        self._batches = 0
        self._decided_us = 0
        self._told_rows = 0
        """What the last heartbeat said, also to executors that were not known here yet."""

    @property
    def rows(self) -> int:
        """Rows waiting."""
        return sum(queue.rows for queue in self.queues.values())

    @property
    def bytes(self) -> int:
        """Bytes waiting."""
        return sum(queue.bytes for queue in self.queues.values())

    @property
    def may_wait(self) -> bool:
        """Whether work may wait although an executor is free."""
        return bool(self.tuner.linger_us or self.rules.consolidate)

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
        serving = self.executors.serving(ticket.model)
        if not self.executors.offered(ticket.model):
            raise Refused(Fault.UNAVAILABLE, "no executor is alive for this model", rules.lease_us)
        rows = self.rows
        if rows + ticket.rows > rules.queue_rows or self.bytes + ticket.bytes > rules.queue_bytes:
            wait_us = self._wait_us(serving, now_us)
            raise Refused(Fault.OVERLOADED, f"the queue is full: {rows} rows wait", max(wait_us, 1_000))
        budget_us = ticket.deadline_us - now_us
        if self.times.hopeless(ticket.model, ticket.work, budget_us - self.times.overhead_us, now_us):
            raise Refused(Fault.DEADLINE_EXCEEDED, f"scoring it takes longer than its budget of {budget_us} us")
        late_us = self._late_by(ticket, serving, now_us)
        if late_us > 0:
            raise Refused(
                Fault.OVERLOADED,
                f"the wait would be {budget_us + late_us} us; the budget is {budget_us} us",
                late_us,
            )
        self.queues.setdefault(ticket.model, Queue()).push(ticket)

    def cancel(self, ticket: Ticket) -> None:
        """The caller has left. In flight it is computed, but nobody is answered."""
        if ticket.state is State.WAITING:
            self.queues[ticket.model].cancel(ticket)
        ticket.state = State.DONE

    def beat(self, beat: ExecutorBeat, now_us: int) -> list[Decision]:
        """An executor is alive, and says who holds its slots. Returns what its departure, if it is one, leads to."""
        executor = self.executors.get(beat.executor)
        if beat.state == "gone":
            return [] if executor is None else self._lose(executor)
        if executor is None:
            executor = Executor(beat.executor, now_us, told_rows=self._told_rows)
            self.executors[beat.executor] = executor
        decisions: list[Decision] = []
        for flight in executor.hear(beat, self.name, now_us):
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
        if result.grant is not None:
            executor.offer_slot(result.grant)
        flight = executor.flights.pop(result.batch, None)
        if flight is None:
            return [], []
        landed_us, executor.landed_us = executor.landed_us, now_us
        group = flight.group
        size = result.scores.nbytes
        if size == flight.rows * FLOAT_BYTES:
            self._learn(flight, result.service_us, alone=landed_us <= flight.sent_us, now_us=now_us)
            tickets = [] if group.done else flight.tickets
            group.done = True
            return tickets, []
        if group.done:
            return [], []
        if not size and not result.fault:
            return [], self._bounced(group)
        fault = named(result.fault)
        return [], self._failed(group, fault, result.detail or "the scores do not fit the batch")

    def too_large(self, dispatch: Dispatch, detail: str) -> list[Decision]:
        """The joined message is larger than what may be sent: the batch goes in halves."""
        executor = self.executors[dispatch.executor]
        flight = executor.flights[dispatch.batch]
        executor.take_back(flight)
        return self._failed(flight.group, Fault.TOO_LARGE, detail)

    # What to do

    def decide(self, now_us: int) -> list[Decision]:
        """All that is due now. Call after events, at the time that `wake_us` names, and several times in a lease."""
        self._excuse_own_pause(now_us)
        decisions: list[Decision] = []
        decisions += self._lost_executors(now_us)
        decisions += self._expired(now_us)
        decisions += self._unserved()
        decisions += self._hopeless(now_us)
        self._overdue(now_us)
        self.tuner.follow(self.rules.slo_us, self.rules.max_rows, self.rules.linger_us)
        self.tuner.adjust(len(self.executors), now_us)
        decisions += self._dispatches(now_us)
        decisions += self._pleas(now_us)
        return decisions

    def wake_us(self, now_us: int) -> int | None:
        """When `decide` has to be called next, if no event comes before."""
        return min(self._alarms(now_us), default=None)

    def backlog_us(self, model: ModelKey, now_us: int) -> int:
        """Predicted wait of a ticket that would come last."""
        return self._wait_us(self.executors.serving(model), now_us)

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
        self.paces.pop(model, None)
        self.times.forget(model)

    def abandon_all(self) -> list[Drop]:
        """The end: every open ticket gets UNAVAILABLE."""
        tickets = [ticket for queue in self.queues.values() for ticket in queue.drain()]
        for group in self._groups():
            tickets += group.open_tickets()
            group.done = True
        self.retries.clear()
        return [self._drop(ticket, Fault.UNAVAILABLE, "the batcher is stopping", 1_000) for ticket in tickets]

    # Admission

    def _learn(self, flight: Flight, service_us: int, alone: bool, now_us: int) -> None:
        work = sum(ticket.work for ticket in flight.tickets)
        self.times.observe(flight.group.model, work, service_us, now_us)
        if alone:
            self.times.carried(now_us - flight.sent_us - service_us)
        arrivals = (ticket.arrived_us for ticket in flight.tickets if ticket.state is State.IN_FLIGHT)
        self.tuner.answered(arrivals, flight.rows, flight.sent_us, service_us, now_us)

    def _late_by(self, ticket: Ticket, serving: list[Executor], now_us: int) -> int:
        """By how much the predicted answer misses the ticket's deadline; counts only what would be served before it.

        Never late is who finds an executor with nothing to do: or one slow pass, once measured, would have every
        request refused for good.
        """
        queue = self.queues.get(ticket.model)
        batch = min(self.tuner.cap_rows, ticket.work + (queue.work if queue else 0))
        room_us = ticket.deadline_us - now_us - self.times.predict(ticket.model, max(batch, ticket.work))
        late_us = int(MARGIN * self._wait_us(serving, now_us)) - room_us
        if late_us <= 0:
            return late_us
        if not self.rows and any(executor.free and not executor.flights for executor in serving):
            return 0
        wait_us = self._wait_us(serving, now_us, ticket)
        late_us = int(MARGIN * wait_us) - room_us
        if late_us > 0 or queue is None:
            return late_us
        return max(late_us, self._pushes_out(ticket, queue, wait_us, len(serving), now_us))

    def _pushes_out(self, ticket: Ticket, queue: Queue, wait_us: int, executors: int, now_us: int) -> int:
        """By how much one of its priority that was admitted before, and is served after it, would miss its deadline."""
        per_work = max(self.times.us_per_row(ticket.model) / executors, self._paced(ticket.model, queue))
        room_us = ticket.deadline_us - now_us - self.times.predict(ticket.model, self.tuner.cap_rows)
        return max(
            (
                int(MARGIN * (wait_us + (ticket.work + between) * per_work)) - room_us - later_us
                for later_us, between in queue.behind(ticket.priority, ticket.deadline_us)
            ),
            default=0,
        )

    def _wait_us(self, serving: list[Executor], now_us: int, ticket: Ticket | None = None) -> int:
        """Predicted time until `ticket`, or one behind all others, starts: what is before it, shared out."""
        ahead_us = float(sum(executor.remaining_us(now_us) for executor in serving))
        paced_us = 0.0
        for model, queue in self.queues.items():
            if queue.count and any(model in executor.models for executor in serving):
                work = queue.work if ticket is None else queue.work_ahead(ticket.priority, ticket.deadline_us)
                ahead_us += work * self.times.us_per_row(model)
                paced_us = max(paced_us, work * self._paced(model, queue))
        return int(max(paced_us, ahead_us / max(1, len(serving))))

    def _paced(self, model: ModelKey, queue: Queue) -> float:
        """µs for each row at which the queue moves; 0 while it is not known."""
        pace = self.paces.get(model)
        return pace.us_per_row if pace is not None and queue.since_us <= pace.cut_us else 0.0

    # Endings

    def _drop(self, ticket: Ticket, fault: Fault, detail: str, retry_after_us: int = 0) -> Drop:
        ticket.state = State.DONE
        return Drop(ticket, fault, detail, retry_after_us)

    def _expired(self, now_us: int) -> Iterator[Drop]:
        for queue in self.queues.values():
            due_us = queue.earliest_deadline()
            for ticket in queue.expired(now_us) if due_us is not None and due_us <= now_us else ():
                yield self._drop(ticket, Fault.DEADLINE_EXCEEDED, "the budget ran out in the queue")
        for group in self._groups():
            for ticket in group.expired(now_us):
                yield self._drop(ticket, Fault.DEADLINE_EXCEEDED, "the budget ran out while scoring")
        if self.retries:
            self.retries = [group for group in self.retries if not group.done]

    def _hopeless(self, now_us: int) -> Iterator[Drop]:
        """What cannot be scored in time any more, even alone: computing it would make others late."""
        for queue in self.queues.values():
            while (head := queue.head()) is not None and self._too_late(head, now_us):
                queue.cancel(head)
                yield self._drop(head, Fault.DEADLINE_EXCEEDED, "too little of the budget is left to score it")

    def _hopeless_us(self, ticket: Ticket) -> int:
        """From when on it cannot make it on an executor that is free then."""
        needs_us = self.times.at_least(ticket.model, ticket.work) + self.times.overhead_us
        return ticket.deadline_us - needs_us + 1

    def _too_late(self, ticket: Ticket, now_us: int) -> bool:
        soonest_us = min(
            (executor.remaining_us(now_us) for executor in self.executors.serving(ticket.model)), default=0
        )
        within_us = ticket.deadline_us - now_us - soonest_us - self.times.overhead_us
        return self.times.hopeless(ticket.model, ticket.work, within_us, now_us)

    def _excuse_own_pause(self, now_us: int) -> None:
        """Heartbeats that came while this process itself stood still are not read yet: nobody is dead for that."""
        pause_us, self._decided_us = now_us - self._decided_us, now_us
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
            flight.group.avoid.add(executor.id)
            decisions += self._again(flight.group)
        return decisions

    def _unserved(self) -> Iterator[Decision]:
        """What waits for a model that no executor is left for."""
        for model, queue in list(self.queues.items()):
            if not self.executors.served(model):
                del self.queues[model]
                for ticket in queue.drain():
                    yield self._drop(ticket, Fault.UNAVAILABLE, "no executor is alive for this model", 1_000)
        for group in [group for group in self.retries if not self.executors.served(group.model)]:
            self.retries.remove(group)
            if not self.executors.flying(group):
                yield from self._give_up(group)

    def _give_up(self, group: Group) -> list[Decision]:
        group.done = True
        return [self._drop(t, Fault.UNAVAILABLE, "the executor was lost", 1_000) for t in group.open_tickets()]

    # Second tries

    def _again(self, group: Group) -> list[Decision]:
        """Send a group once more, unless that is under way already or its tries are used up."""
        if group.done or group in self.retries or self.executors.flying(group):
            return []
        if group.sends >= MAX_SENDS or not self.executors.served(group.model):
            return self._give_up(group)
        self.retries.append(group)
        return []

    def _bounced(self, group: Group) -> list[Decision]:
        """The slot was void: the batch did not run, so this was no try."""
        group.sends -= 1
        group.bounces += 1
        return self._give_up(group) if group.bounces > MAX_BOUNCES else self._again(group)

    def _failed(self, group: Group, fault: Fault, detail: str) -> list[Decision]:
        """Halve the batch, so that one poisonous request fails alone."""
        if self.executors.flying(group):
            return []
        if group in self.retries:
            self.retries.remove(group)
        group.done = True
        tickets = group.open_tickets()
        if len(tickets) == 1 or fault not in (Fault.INTERNAL, Fault.TOO_LARGE):
            return [self._drop(ticket, fault, detail) for ticket in tickets]
        middle = len(tickets) // 2
        self.retries[:0] = [Group(group.model, half) for half in (tickets[:middle], tickets[middle:]) if half]
        return []

    def _overdue(self, now_us: int) -> None:
        """Batches whose executor is alive but silent: once more, to another one, if there is one."""
        for executor in self.executors.values():
            for flight in executor.flights.values():
                if flight.overdue_us > now_us:
                    continue
                group = flight.group
                if not flight.late:
                    flight.late = True
                    group.avoid.add(executor.id)
                if group.done or group.sends >= MAX_SENDS or group in self.retries:
                    continue
                if any(other.id not in group.avoid for other in self.executors.serving(group.model)):
                    self.retries.append(group)

    # Sending

    def _dispatches(self, now_us: int) -> Iterator[Dispatch]:
        while self.retries or any(queue.count for queue in self.queues.values()):
            ready = [executor for executor in self.executors.values() if executor.up and executor.free]
            for executor in in_order(ready, self.rules.consolidate):
                group = self._retry_for(executor) or self._cut(executor, now_us)
                if group is not None:
                    yield self._dispatch(executor, group, now_us)
                    break
            else:
                return

    def _retry_for(self, executor: Executor) -> Group | None:
        for group in self.retries:
            if self._may_take(executor, group):
                self.retries.remove(group)
                return group if group.is_open() else self._retry_for(executor)
        return None

    def _may_take(self, executor: Executor, group: Group) -> bool:
        """Not to an executor that failed it, unless no other is left that could have it."""
        if not executor.up or group.model not in executor.models:
            return False
        if executor.id not in group.avoid:
            return True
        return not self.executors.flying(group) and all(
            other.id in group.avoid for other in self.executors.serving(group.model)
        )

    def _cut(self, executor: Executor, now_us: int) -> Group | None:
        """The next batch for this executor: the most urgent model's tickets, up to the limits."""
        rules = self.rules
        ready = [
            (head.priority, head.deadline_us, head.id, model)
            for model, queue in self.queues.items()
            if model in executor.models
            and (head := queue.head()) is not None
            and self._ripe_us(model, queue) <= now_us
            and self._held_back_us(executor, model, queue, now_us) <= now_us
        ]
        if not ready:
            return None
        model = min(ready)[3]
        queue = self.queues[model]
        starts_us = now_us + executor.remaining_us(now_us) + self.times.overhead_us

        def in_time(due_us: int) -> int:
            return self.times.most(model, due_us - starts_us, max(queue.work, 1))

        before, since_us = queue.work, queue.since_us
        tickets = queue.cut(self.tuner.cap_rows, rules.max_bytes, rules.coalesce, in_time)
        self.paces.setdefault(model, Pace()).cut(before - queue.work, since_us, now_us)
        self.tuner.cut(queue.count > 0)
        return Group(model, tickets)

    def _held_back_us(self, executor: Executor, model: ModelKey, queue: Queue, now_us: int) -> int:
        """Until when this executor gets nothing of a queue that would not fill a batch, though it has a slot."""
        if queue.rows >= self.tuner.cap_rows or queue.bytes >= self.rules.max_bytes or not self.rules.coalesce:
            return 0
        until_us = staged_us(executor, self.times.overhead_us, now_us)
        due_us = queue.earliest_deadline()
        if self.rules.consolidate and due_us is not None:
            if self.rules.slo_us:
                due_us = min(due_us, queue.since_us + self.rules.slo_us)
            pass_us = self.times.predict(model, queue.work)
            until_us = max(until_us, spared_us(executor, self.executors.serving(model), pass_us, due_us, now_us))
        return until_us

    def _ripe_us(self, model: ModelKey, queue: Queue) -> int:
        """Until when a batch may wait for company: not at all unless there is a linger."""
        rules = self.rules
        due_us = queue.earliest_deadline()
        if not self.tuner.linger_us or not rules.coalesce or due_us is None:
            return 0
        if queue.rows >= self.tuner.cap_rows or queue.bytes >= rules.max_bytes:
            return 0
        needs_us = self.times.predict(model, queue.work) + self.times.overhead_us
        return min(queue.since_us + self.tuner.linger_us, due_us - needs_us)

    def _dispatch(self, executor: Executor, group: Group, now_us: int) -> Dispatch:
        rules = self.rules
        tickets = group.open_tickets()
        rows = sum(ticket.rows for ticket in tickets)
        self._batches += 1
        group.sends += 1
        predicted_us = self.times.predict(group.model, sum(ticket.work for ticket in tickets))
        patience_us = int(rules.failover_factor * (executor.remaining_us(now_us) + predicted_us))
        patience_us = max(patience_us, rules.failover_floor_us, 0 if predicted_us else rules.lease_us)
        slot = executor.spend()
        executor.flights[self._batches] = Flight(
            self._batches, group, slot, tickets, rows, now_us, predicted_us, now_us + patience_us
        )
        return Dispatch(
            batch=self._batches,
            executor=executor.id,
            slot=slot,
            model=group.model,
            tickets=tickets,
            rows=rows,
            budget_us=max(0, max(ticket.deadline_us for ticket in tickets) - now_us),
            demand=self._demand(executor, now_us),
            again=group.sends > 1,
        )

    # Asking for slots

    def _pleas(self, now_us: int) -> Iterator[Plead]:
        for executor in self.executors.values():
            if self._pleads(executor):
                unheard = not executor.told_rows and self._wants(executor)
                if unheard or now_us - executor.demanded_us >= DEMAND_EVERY_US:
                    executor.demanded_us = now_us
                    yield Plead(executor.id, self._demand(executor, now_us))
            elif self._lets_go(executor):
                yield Plead(executor.id, self._demand(executor, now_us))

    def _pleads(self, executor: Executor) -> bool:
        """Whether asking could help: it has work that waits here, and others hold slots of it."""
        if executor.abandoned:
            return True
        return executor.up and not executor.free and not executor.full() and self._wants(executor)

    def _lets_go(self, executor: Executor) -> bool:
        """Whether it keeps a slot for work that has gone elsewhere: another batcher may be waiting for that one."""
        return bool(executor.told_rows and executor.free) and not self._wants(executor)

    def _wants(self, executor: Executor) -> bool:
        for model, queue in self.queues.items():
            if queue.count and model in executor.models:
                return True
        return any(self._may_take(executor, group) for group in self.retries)

    def _demand(self, executor: Executor, now_us: int) -> Demand:
        queues = [queue for model, queue in self.queues.items() if queue.count and model in executor.models]
        groups = [group for group in self.retries if self._may_take(executor, group)]
        waiting: list[Queue | Group] = [*queues, *groups]
        rows = executor.told_rows = sum(one.rows for one in waiting)
        deadlines = [due for one in waiting if (due := one.earliest_deadline()) is not None]
        slack_us = max(0, min(deadlines) - now_us) if deadlines else 0
        returned = tuple(Slot(index, generation) for index, generation in executor.abandoned.items())
        return Demand(self.name, rows, slack_us, returned)

    # Looking around

    def _alarms(self, now_us: int) -> Iterator[int]:
        for model, queue in self.queues.items():
            due_us, head = queue.earliest_deadline(), queue.head()
            if due_us is not None and head is not None:
                yield due_us
                if (hopeless_us := self._hopeless_us(head)) > now_us:
                    yield hopeless_us
                if self.tuner.linger_us and (ripe_us := self._ripe_us(model, queue)) > now_us:
                    yield ripe_us
                yield from self._looks_again(model, queue, now_us)
        for group in self.retries:
            if not group.done and (due_us := group.earliest_deadline()) is not None:
                yield due_us
        for executor in self.executors.values():
            yield executor.seen_us + self.rules.lease_us
            for flight in executor.flights.values():
                if not flight.late:
                    yield flight.overdue_us
                if not flight.group.done and (due_us := flight.group.earliest_deadline()) is not None:
                    yield due_us
            if self._pleads(executor):
                yield executor.demanded_us + DEMAND_EVERY_US
            if executor.free and any(self._may_take(executor, group) for group in self.retries):
                yield now_us

    def _looks_again(self, model: ModelKey, queue: Queue, now_us: int) -> Iterator[int]:
        for executor in self.executors.serving(model):
            if executor.free and (held_us := self._held_back_us(executor, model, queue, now_us)) > now_us:
                yield held_us

    def _groups(self) -> Iterator[Group]:
        """What was cut and may still be answered; one that flies twice comes twice."""
        groups = chain(self.executors.groups(), self.retries)
        return (group for group in groups if not group.done)
