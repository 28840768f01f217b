"""Which requests make the next batch. Pure; times in monotonic µs."""

from collections.abc import Iterator

from narsil_stream.actors.ageing import Ageing
from narsil_stream.actors.decisions import Rules
from narsil_stream.actors.flights import Executor, Group
from narsil_stream.actors.forecast import Forecast
from narsil_stream.actors.queue import ModelKey, Queue, Ticket


class Cutting:
    """Of one batcher. Takes from its queues, and keeps account of what aged work has had."""

    def __init__(self, queues: dict[ModelKey, Queue], forecast: Forecast, ageing: Ageing) -> None:
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
        ]
        if not ready:
            return None
        priority, *_, model = min(ready)
        aged = self._aged([model for *_, model in ready], priority, now_us) if self._ageing.share else None
        if aged is None or self._ageing.rows <= 0:
            tickets = self._take(model, rules, now_us)
            self._ageing.earn(_rows(tickets), aged is not None)
            return Group(model, tickets)
        before = self._ageing.rows
        tickets = self._take(aged.model, rules, now_us, self._first(self._queues[aged.model], priority, now_us))
        rows = _rows(tickets)
        if aged.model != model:  # the whole batch goes before more urgent work, whatever else is in it
            self._ageing.spend(rows - (before - self._ageing.rows))
        self._ageing.earn(rows, True)
        return Group(aged.model, tickets)

    def ripe_us(self, model: ModelKey, queue: Queue, rules: Rules) -> int:
        """Until when a batch may wait for company: not at all unless there is a linger."""
        if not rules.linger_us or not rules.coalesce:
            return 0
        due_us = queue.earliest_deadline()
        if due_us is None or queue.rows >= rules.max_rows or queue.bytes >= rules.max_bytes:
            return 0
        return min(queue.since_us + rules.linger_us, due_us - self._forecast.times.predict(model, queue.rows))

    def _take(self, model: ModelKey, rules: Rules, now_us: int, first: Iterator[Ticket] | None = None) -> list[Ticket]:
        queue = self._queues[model]
        since_us = queue.since_us
        tickets = queue.cut(rules.max_rows, rules.max_bytes, rules.coalesce, first or ())
        self._forecast.cut(model, _rows(tickets), since_us, now_us)
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
