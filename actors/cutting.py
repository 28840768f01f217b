"""Which requests make the next batch. Pure; times in monotonic µs."""

from collections.abc import Iterator

from narsil_stream.actors.adaptive import Controller
from narsil_stream.actors.ageing import Ageing
from narsil_stream.actors.decisions import Rules
from narsil_stream.actors.flights import Executor, Fleet, Group
from narsil_stream.actors.forecast import Forecast
from narsil_stream.actors.patience import spared_us, staged_us
from narsil_stream.actors.queue import ModelKey, Queue, Ticket


class Cutting:
    """Of one batcher. Takes from its queues, and keeps account of what aged work has had."""

    def __init__(
        self,
        executors: Fleet,
        queues: dict[ModelKey, Queue],
        forecast: Forecast,
        ageing: Ageing,
        tuner: Controller,
    ) -> None:
        self._executors = executors
        self._tuner = tuner
        self._queues = queues
        self._forecast = forecast
        self._ageing = ageing

    def next(self, executor: Executor, rules: Rules, now_us: int) -> Group | None:
        """The next batch for this executor: the most urgent model's tickets, up to the limits; aged ones go first when
        it is their turn."""
        ready = [
            (head.priority, head.deadline_us, head.id, model)
            for model, queue in self._queues.items()
            if model in executor.models
            and (head := queue.head()) is not None
            and self.ripe_us(model, queue, rules) <= now_us
            and self.held_back_us(executor, model, queue, rules, now_us) <= now_us
        ]
        if not ready:
            return None
        priority, *_, model = min(ready)
        aged = self._aged([model for *_, model in ready], priority, now_us) if self._ageing.share else None
        if aged is None or self._ageing.rows <= 0:
            tickets = self._take(executor, model, rules, now_us)
            self._ageing.earn(_rows(tickets), aged is not None)
            return Group(model, tickets)
        before = self._ageing.rows
        first = self._first(self._queues[aged.model], priority, now_us)
        tickets = self._take(executor, aged.model, rules, now_us, first)
        rows = _rows(tickets)
        if aged.model != model:  # the whole batch goes before more urgent work, whatever else is in it
            self._ageing.spend(rows - (before - self._ageing.rows))
        self._ageing.earn(rows, True)
        return Group(aged.model, tickets)

    def ripe_us(self, model: ModelKey, queue: Queue, rules: Rules) -> int:
        """Until when a batch may wait for company: not at all unless there is a linger."""
        tuner, times = self._tuner, self._forecast.times
        if not tuner.linger_us or not rules.coalesce:
            return 0
        due_us = queue.earliest_deadline()
        if due_us is None or self._fills(queue, rules):
            return 0
        return min(queue.since_us + tuner.linger_us, due_us - times.predict(model, queue.work) - times.overhead_us)

    def held_back_us(self, executor: Executor, model: ModelKey, queue: Queue, rules: Rules, now_us: int) -> int:
        """Until when this executor gets nothing of a queue that would not fill a batch, though it has a slot."""
        if not executor.flights and not rules.consolidate:
            return 0
        if not rules.coalesce or self._fills(queue, rules):
            return 0
        times = self._forecast.times
        until_us = staged_us(executor, model, times.overhead_us, now_us)
        due_us = queue.earliest_deadline()
        if rules.consolidate and due_us is not None:
            if rules.slo_us:
                due_us = min(due_us, queue.since_us + rules.slo_us)
            pass_us = times.predict(model, queue.work)
            serving = self._executors.serving(model)
            until_us = max(until_us, spared_us(executor, model, serving, pass_us, due_us, now_us))
        return until_us

    def alarms(self, model: ModelKey, queue: Queue, rules: Rules, now_us: int) -> list[int]:
        """When to look again although nothing happens; those in the past mean nothing."""
        serving = self._executors.serving(model)
        held = [self.held_back_us(one, model, queue, rules, now_us) for one in serving if one.free]
        return [self.ripe_us(model, queue, rules), *held]

    def _fills(self, queue: Queue, rules: Rules) -> bool:
        return queue.rows >= self._tuner.cap_rows or queue.bytes >= rules.max_bytes

    def _take(
        self, executor: Executor, model: ModelKey, rules: Rules, now_us: int, first: Iterator[Ticket] | None = None
    ) -> list[Ticket]:
        queue, times = self._queues[model], self._forecast.times
        before, since_us = queue.work, queue.since_us
        starts_us = now_us + executor.remaining_us(model, now_us) + times.overhead_us

        def in_time(due_us: int) -> int:
            return times.most(model, due_us - starts_us, max(before, 1))

        tickets = queue.cut(self._tuner.cap_rows, rules.max_bytes, rules.coalesce, first or (), in_time)
        self._forecast.cut(model, before - queue.work, since_us, now_us)
        self._tuner.cut(queue.count > 0)
        return tickets

    def _first(self, queue: Queue, than: int, now_us: int) -> Iterator[Ticket]:
        """What goes first in a batch of this queue, as long as its share lasts; paid for when it has been taken."""
        while self._ageing.rows > 0 and (head := queue.aged(than, now_us)) is not None:
            yield head
            self._ageing.spend(head.rows)

    def _aged(self, models: list[ModelKey], than: int, now_us: int) -> Ticket | None:
        """Work of a less urgent class than this that has aged; of several, that with the earliest deadline."""
        if len(models) == 1 and len(self._queues[models[0]].lines) == 1:
            return None
        heads = [head for model in models if (head := self._queues[model].aged(than, now_us)) is not None]
        return min(heads, key=lambda head: (head.deadline_us, head.id), default=None)


def _rows(tickets: list[Ticket]) -> int:
    return sum(ticket.rows for ticket in tickets)
