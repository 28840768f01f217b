"""How long a request would wait, and whether it can still make it. Pure; times in monotonic µs."""

from collections.abc import Iterator
from typing import NamedTuple

from narsil_stream.actors.adaptive import Controller
from narsil_stream.actors.ageing import Ageing
from narsil_stream.actors.flights import Executor, Fleet, Flight
from narsil_stream.actors.queue import ModelKey, Queue, State, Ticket
from narsil_stream.actors.service_time import Pace, ServiceTimes

MARGIN = 1.25
"""Of the predicted wait at admission: a queue that is filled up to the deadlines misses half of them."""


class Late(NamedTuple):
    us: int
    """Not above 0: it is in time."""
    itself: bool
    """Its own deadline is too early; otherwise one that was admitted before would miss its own."""


class Forecast:
    """Of one batcher, from what it measured."""

    def __init__(self, executors: Fleet, queues: dict[ModelKey, Queue], ageing: Ageing, tuner: Controller) -> None:
        self._tuner = tuner
        self._executors = executors
        self._queues = queues
        self._ageing = ageing
        self.times = ServiceTimes()
        self.paces: dict[ModelKey, Pace] = {}

    def cut(self, model: ModelKey, work: int, waiting_since_us: int, now_us: int) -> None:
        """A batch was taken out of a queue in which work waited since then."""
        self.paces.setdefault(model, Pace()).cut(work, waiting_since_us, now_us)

    def learn(self, flight: Flight, service_us: int, alone: bool, now_us: int) -> None:
        """It came back with its scores. `alone`: its executor had nothing else of ours to do first."""
        self.times.observe(flight.group.model, sum(ticket.work for ticket in flight.tickets), service_us, now_us)
        if alone:
            self.times.carried(now_us - flight.sent_us - service_us)
        arrivals = (ticket.arrived_us for ticket in flight.tickets if ticket.state is State.IN_FLIGHT)
        self._tuner.answered(arrivals, flight.rows, flight.sent_us, service_us, now_us)

    def take_hopeless(self, now_us: int) -> Iterator[Ticket]:
        """Takes out those whose turn it is and that cannot make it any more."""
        for queue in self._queues.values():
            while (head := queue.head()) is not None and self._too_late(head, now_us):
                queue.cancel(head)
                yield head

    def hopeless(self, ticket: Ticket, now_us: int, soonest_us: int = 0) -> bool:
        """Whether it is proven that even alone, on an executor that is free so soon, it cannot be scored in time."""
        within_us = ticket.deadline_us - now_us - soonest_us - self.times.overhead_us
        return self.times.hopeless(ticket.model, ticket.work, within_us, now_us)

    def _too_late(self, ticket: Ticket, now_us: int) -> bool:
        """Whether it is hopeless by now, on the executor that is free first."""
        if not self.times.sure(ticket.model, now_us):
            return False
        waits_us = [one.remaining_us(ticket.model, now_us) for one in self._executors.serving(ticket.model)]
        return self.hopeless(ticket, now_us, min(waits_us, default=0))

    def hopeless_us(self, ticket: Ticket) -> int:
        """From when on it cannot make it on an executor that is free then."""
        needs_us = self.times.at_least(ticket.model, ticket.work) + self.times.overhead_us
        return ticket.deadline_us - needs_us + 1

    def forget(self, model: ModelKey) -> None:
        self.paces.pop(model, None)
        self.times.forget(model)

    def late_by(self, ticket: Ticket, now_us: int) -> Late:
        """By how much the predicted answer misses the ticket's deadline; counts only what would be served before it.

        Never late is who finds a lane with nothing to do: or one slow pass, once measured, would have every request
        refused for good.
        """
        serving = self._executors.serving(ticket.model)
        waiting = any(queue.count for queue in self._queues.values())
        queue = self._queues.get(ticket.model)
        batch = min(self._tuner.cap_rows, ticket.work + (queue.work if queue else 0))
        after_us = self.times.predict(ticket.model, max(batch, ticket.work))
        if waiting:  # it will be in a full batch, perhaps behind one of another batcher
            after_us = max(after_us, self.times.flight(ticket.model))
        room_us = ticket.deadline_us - now_us - after_us
        busy_us = self._busy_us(serving, now_us)
        late_us = int(MARGIN * self._wait_us(ticket.model, serving, busy_us)) - room_us
        if late_us <= 0 and (queue is None or not queue.shared()):
            return Late(late_us, True)
        if not waiting and any(executor.free and executor.idle(ticket.model) for executor in serving):
            return Late(0, True)
        wait_us = self._wait_us(ticket.model, serving, busy_us, ticket)
        aged_us = self._aged_wait_us(serving, ticket)
        late_us = int(MARGIN * (wait_us if aged_us is None else min(wait_us, aged_us))) - room_us
        if late_us > 0 or queue is None or queue.shared():
            return Late(late_us, True)
        return Late(self._pushes_out(ticket, queue, wait_us, room_us, _lanes(serving, ticket.model)), False)

    def _pushes_out(self, ticket: Ticket, queue: Queue, wait_us: int, room_us: int, lanes: int) -> int:
        """By how much one that was admitted before, and is served after it, would miss its deadline. Known only where
        deadlines alone decide: one class of one tenant.

        `wait_us`: of `ticket`; `room_us`: what it has for that.
        """
        per_work = max(self.times.us_per_row(ticket.model) / lanes, self._paced(ticket.model, queue))
        return max(
            (
                int(MARGIN * (wait_us + (ticket.work + between) * per_work)) - room_us - later_us
                for later_us, between in queue.behind(ticket)
            ),
            default=0,
        )

    def wait_us(self, model: ModelKey, now_us: int) -> int:
        """Predicted time until a ticket that comes last starts."""
        serving = self._executors.serving(model)
        return self._wait_us(model, serving, self._busy_us(serving, now_us))

    def _busy_us(self, serving: list[Executor], now_us: int) -> int:
        """What is under way there, in time of one lane."""
        return sum([executor.busy_us(now_us) for executor in serving])

    def _wait_us(self, wanted: ModelKey, serving: list[Executor], busy_us: int, ticket: Ticket | None = None) -> int:
        """Predicted time until `ticket`, or one of its model behind all others, starts: what is before it, shared out
        to lanes, of which the model has so many and all models together not more than there are."""
        ahead_us, paced_us = float(busy_us), 0.0
        own = before = 0
        alone_us = 0.0
        for model, queue in self._queues.items():
            if queue.count and any(model in executor.models for executor in serving):
                work = queue.work if ticket is None else queue.work_ahead(ticket)
                own, before = own + queue.work, before + work
                needs_us = work * self.times.us_per_row(model)
                ahead_us += needs_us
                if model == wanted:
                    alone_us = needs_us / _lanes(serving, model)
                paced_us = max(paced_us, work * self._paced(model, queue))
        if rival_rows := max([executor.rival_rows for executor in serving], default=0):
            # Executors go by deadlines, whichever batcher asks: of the rivals' rows, as large a part is served before.
            ahead_us += rival_rows * (before / own if own else 1.0) * self._us_per_row(serving)
        return int(max(paced_us, alone_us, ahead_us / _lanes(serving)))

    def _paced(self, model: ModelKey, queue: Queue) -> float:
        """µs for each row of work at which the queue moves; 0 while it is not known."""
        pace = self.paces.get(model)
        return pace.us_per_row if pace is not None and queue.since_us <= pace.cut_us else 0.0

    def _us_per_row(self, serving: list[Executor]) -> float:
        """Of the models that these serve; which of them others wait for is not known."""
        return max((self.times.us_per_row(model) for executor in serving for model in executor.models), default=0.0)

    def _aged_wait_us(self, serving: list[Executor], ticket: Ticket) -> int | None:
        """Predicted time until it starts if more urgent work never ends: it ages, and waits for its share of the rows.
        None: nothing more urgent waits, or priorities are strict."""
        share = self._ageing.share
        queue = self._queues.get(ticket.model)
        if not share or queue is None or not queue.lines or min(queue.lines) >= ticket.priority:
            return None
        lanes = _lanes(serving, ticket.model)
        us_per_row = max(self.times.us_per_row(ticket.model) / lanes, self._paced(ticket.model, queue))
        half_us = (ticket.deadline_us - ticket.arrived_us) // 2
        return half_us + int((queue.work_aged_ahead(ticket) + ticket.work) / share * us_per_row)


def _lanes(executors: list[Executor], model: ModelKey | None = None) -> int:
    """Batches, of a model or at all, that they compute at once; 1 where there is none."""
    return max(1, sum([executor.lanes if model is None else executor.lanes_of(model) for executor in executors]))
