"""Batches that have to go once more, and when they are given up instead. Pure; times in monotonic µs."""

from narsil_stream.actors.decisions import Drop, dropped
from narsil_stream.actors.flights import Executor, Fleet, Group
from narsil_stream.schemas.errors import Fault

MAX_SENDS = 2
"""A batch goes to one executor and, if that one is lost or silent, to one other."""
MAX_BOUNCES = 8
"""So often a batch may meet a void slot: more means that executors take back what they lease."""


class Retries(list[Group]):
    """Groups that wait for another executor, the next one first."""

    def __init__(self, executors: Fleet) -> None:
        super().__init__()
        self._executors = executors

    def again(self, group: Group) -> list[Drop]:
        """Send a group once more, unless that is under way already or its tries are used up."""
        if group.done or group in self or self._executors.flying(group):
            return []
        if group.sends >= MAX_SENDS or self._executors.hopeless(group.model):
            return give_up(group)
        self.append(group)
        return []

    def bounced(self, group: Group) -> list[Drop]:
        """The slot was void: the batch did not run, so this was no try."""
        group.sends -= 1
        group.bounces += 1
        return give_up(group) if group.bounces > MAX_BOUNCES else self.again(group)

    def failed(self, group: Group, fault: Fault, detail: str) -> list[Drop]:
        """Halve the batch, so that one poisonous request fails alone."""
        if self._executors.flying(group):
            return []
        if group in self:
            self.remove(group)
        group.done = True
        tickets = group.open_tickets()
        if len(tickets) == 1 or fault not in (Fault.INTERNAL, Fault.TOO_LARGE):
            return [dropped(ticket, fault, detail) for ticket in tickets]
        middle = len(tickets) // 2
        self[:0] = [Group(group.model, half) for half in (tickets[:middle], tickets[middle:]) if half]
        return []

    def add_overdue(self, now_us: int) -> None:
        """Batches whose executor is alive but silent: once more, to another one, if there is one."""
        for executor in self._executors.values():
            for flight in executor.flights.values():
                if flight.overdue_us > now_us:
                    continue
                group = flight.group
                if not flight.late:
                    flight.late = True
                    group.avoid.add(executor.id)
                    executor.begin(now_us)
                if group.done or group.sends >= MAX_SENDS or group in self:
                    continue
                if any(other.id not in group.avoid for other in self._executors.serving(group.model)):
                    self.append(group)

    def drop_unserved(self) -> list[Drop]:
        """Gives up those that no executor is left for."""
        drops: list[Drop] = []
        for group in [group for group in self if self._executors.hopeless(group.model)]:
            self.remove(group)
            if not self._executors.flying(group):
                drops += give_up(group)
        return drops

    def forget_done(self) -> None:
        if any(group.done for group in self):
            self[:] = [group for group in self if not group.done]

    def take_for(self, executor: Executor) -> Group | None:
        """Takes out the next one that may go to this executor."""
        for group in self:
            if self.may_go(group, executor):
                self.remove(group)
                return group if group.is_open() else self.take_for(executor)
        return None

    def wait_for(self, executor: Executor) -> list[Group]:
        return [group for group in self if self.may_go(group, executor)]

    def may_go(self, group: Group, executor: Executor) -> bool:
        """Not to an executor that failed it, unless no other is left that could have it."""
        if not executor.up or group.model not in executor.models:
            return False
        if executor.id not in group.avoid:
            return True
        return not self._executors.flying(group) and all(
            other.id in group.avoid for other in self._executors.serving(group.model)
        )


def give_up(group: Group) -> list[Drop]:
    group.done = True
    return [dropped(t, Fault.UNAVAILABLE, "the executor was lost", 1_000) for t in group.open_tickets()]
