"""When a batcher tells an executor what waits, and which slots it lets go. Pure; times in monotonic µs."""

from collections.abc import Iterator

from narsil_stream.actors.decisions import Plead
from narsil_stream.actors.flights import DEMAND_EVERY_US, Executor, Fleet, Group
from narsil_stream.actors.queue import ModelKey, Queue
from narsil_stream.actors.retrying import Retries
from narsil_stream.schemas.internal import Demand, Slot


class Pleading:
    """Of one batcher, `name`."""

    def __init__(self, name: str, executors: Fleet, queues: dict[ModelKey, Queue], retries: Retries) -> None:
        self._name = name
        self._executors = executors
        self._queues = queues
        self._retries = retries

    def due(self, now_us: int) -> Iterator[Plead]:
        for executor in self._executors.values():
            if self.pleads(executor):
                unheard = not executor.told_rows and self._wants(executor)
                if unheard or now_us - executor.demanded_us >= DEMAND_EVERY_US:
                    executor.demanded_us = now_us
                    yield Plead(executor.id, self.demand(executor, now_us))
            elif self._lets_go(executor):
                yield Plead(executor.id, self.demand(executor, now_us))

    def pleads(self, executor: Executor) -> bool:
        """Whether asking could help: it has work that waits here, and others hold slots of it."""
        if executor.abandoned:
            return True
        return executor.up and not executor.free and self._wants(executor) and not executor.full()

    def demand(self, executor: Executor, now_us: int) -> Demand:
        """All that waits here for it, and what it gets back."""
        waiting: list[Queue | Group] = []
        for model, queue in self._queues.items():
            if queue.count and model in executor.models:
                waiting.append(queue)
        if self._retries:
            waiting += self._retries.wait_for(executor)
        rows = executor.told_rows = sum([one.rows for one in waiting])
        deadlines = [due for one in waiting if (due := one.earliest_deadline()) is not None]
        slack_us = max(0, min(deadlines) - now_us) if deadlines else 0
        returned = tuple(Slot(index, generation) for index, generation in executor.abandoned.items())
        return Demand(self._name, rows, slack_us, returned)

    def _lets_go(self, executor: Executor) -> bool:
        """Whether it keeps a slot for work that has gone elsewhere: another batcher may be waiting for that one."""
        return bool(executor.told_rows and executor.free) and not self._wants(executor)

    def _wants(self, executor: Executor) -> bool:
        for model, queue in self._queues.items():
            if queue.count and model in executor.models:
                return True
        return bool(self._retries) and any(self._retries.may_go(group, executor) for group in self._retries)
