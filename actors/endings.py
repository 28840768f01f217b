"""How requests end in a batcher: answered, refused, withdrawn or failed. Each is counted once, and its caller is told.

No decision is made here: the policy, or the reception, has made it.
"""

import logging
import time
from collections.abc import Callable, Iterator

import numpy as np
from nats.micro.service import EndpointStats

from narsil_stream.actors.answering import Answering, Caller
from narsil_stream.actors.batcher_metrics import BatcherMetrics
from narsil_stream.actors.decisions import Drop
from narsil_stream.actors.flights import Flight
from narsil_stream.actors.queue import ModelKey, State, Ticket
from narsil_stream.actors.scheduling import FLOAT_BYTES
from narsil_stream.actors.statistics import Statistics
from narsil_stream.core.actor import now_us, unix_us
from narsil_stream.core.bus import Bus
from narsil_stream.schemas import subjects
from narsil_stream.schemas.errors import Fault, Refused
from narsil_stream.schemas.internal import Result
from narsil_stream.schemas.wire import InferAnswer, Tensor

log = logging.getLogger(__name__)


class Endings:
    """Of one batcher, `name`. Answers leave with `send`, many in a message."""

    def __init__(self, bus: Bus, name: str, metrics: BatcherMetrics) -> None:
        self._answering = Answering(bus, name)
        self._metrics = metrics
        self.counts = Statistics()
        self.stats = EndpointStats("infer", f"{subjects.INFER}.>", subjects.QUEUE_GROUP, 0, 0, 0, 0)
        self.open: dict[tuple[str, int], Ticket] = {}
        """Tickets of askers who may withdraw them, by asker and slot."""
        self.send = self._answering.send

    # Begin

    def offered(self, count: int) -> None:
        self._metrics.requests.offered.inc(count)
        self.stats.num_requests += count

    def admitted(self, ticket: Ticket) -> None:
        caller: Caller = ticket.payload.caller
        if caller.slot >= 0:
            self.open[caller.reply, caller.slot] = ticket

    # Without scores

    def turned_down(self, caller: Caller, refused: Refused, model: ModelKey | None = None) -> None:
        """On arrival. `model`: the one that was meant, if there is such a one."""
        if model is not None:
            self.counts.failed(model)
        self._refuse(caller, refused)

    def unsound(self, ticket: Ticket, refused: Refused) -> None:
        """What is wrong with its values was found when it was joined."""
        self.counts.failed(ticket.model, now_us() - ticket.arrived_us)
        self._refuse(self._close(ticket), refused)

    def dropped(self, drop: Drop) -> None:
        self._metrics.requests.ended_badly(drop.fault.name)
        self.counts.failed(drop.ticket.model, now_us() - drop.ticket.arrived_us)
        self._answer_error(self._close(drop.ticket), drop.fault, drop.detail, drop.retry_after_us)

    def withdrawn(self, reply: str, slot: int) -> Ticket | None:
        """The ticket that nobody waits for any more; None: there is none, or it has ended."""
        ticket = self.open.pop((reply, slot), None)
        if ticket is None or ticket.state is State.DONE:
            return None
        self._left(ticket, Fault.CANCELLED)
        return ticket

    def forsaken(self, reached: Callable[[str], bool]) -> Iterator[Ticket]:
        """Tickets of askers who cannot be reached and have given up."""
        for (reply, slot), ticket in list(self.open.items()):
            if not reached(reply):
                del self.open[reply, slot]
                self._left(ticket, Fault.UNAVAILABLE)
                yield ticket

    def _left(self, ticket: Ticket, fault: Fault) -> None:
        self.counts.failed(ticket.model, now_us() - ticket.arrived_us)
        self._metrics.requests.ended_badly(fault.name)

    # With scores

    def scored(self, flight: Flight, tickets: list[Ticket], result: Result) -> None:
        """`tickets` in the order of the batch's rows; those that ended meanwhile are passed over."""
        started = time.perf_counter_ns()
        scores, (model, version, _) = result.scores, flight.group.model
        finite = np.isfinite(np.frombuffer(scores, np.float32))
        sound = bool(finite.all())
        now, answered = now_us(), []
        counted, answer = self._metrics.requests.answered, self._answering.answer
        end = 0
        for ticket in tickets:
            start, end = end, end + ticket.rows
            if ticket.state is State.DONE:
                continue
            ticket.state = State.DONE
            caller = self._close(ticket)
            took_us = now - ticket.arrived_us
            if not (sound or finite[start:end].all()):
                self._fail(ticket, caller, took_us, "the model gave a score that is not a number")
                continue
            counted(ticket.rows, took_us / 1e6)
            output = Tensor("scores", "FP32", (ticket.rows,), scores[FLOAT_BYTES * start : FLOAT_BYTES * end])
            answer(caller, InferAnswer(caller.id, (output,), model, version))
            answered.append(ticket)
        self.stats.processing_time += 1_000 * sum(now - ticket.arrived_us for ticket in answered)
        split_ns = time.perf_counter_ns() - started
        self.counts.computed(flight, answered, result.service_us, split_ns, now, unix_us() // 1_000)

    def _fail(self, ticket: Ticket, caller: Caller, took_us: int, detail: str) -> None:
        """One request of a batch alone: its neighbours have their scores."""
        log.warning("a request of %d rows to %s failed: %s", ticket.rows, ticket.model.name, detail)
        self._metrics.requests.ended_badly(Fault.INTERNAL.name)
        self.counts.failed(ticket.model, took_us)
        self._answer_error(caller, Fault.INTERNAL, detail, 0)

    # Out

    def _close(self, ticket: Ticket) -> Caller:
        caller: Caller = ticket.payload.caller
        self.open.pop((caller.reply, caller.slot), None)
        return caller

    def _refuse(self, caller: Caller, refused: Refused) -> None:
        if refused.fault is Fault.DEADLINE_EXCEEDED:
            self._metrics.requests.ended_badly(refused.fault.name)
        else:
            self._metrics.requests.refused(refused.fault.name)
        self._answer_error(caller, refused.fault, refused.detail, refused.retry_after_us, refused.by_deadline)

    def _answer_error(
        self, caller: Caller, fault: Fault, detail: str, retry_after_us: int, by_deadline: bool = False
    ) -> None:
        self.stats.num_errors += 1
        self.stats.last_error = f"{fault.http}: {detail}"
        answer = InferAnswer(caller.id, fault=fault.name, detail=detail, retry_after_us=retry_after_us)
        self._answering.answer(caller, answer, by_deadline=by_deadline)
