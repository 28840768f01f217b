"""The rules that must hold whatever happens, checked after each event, as time moves on, and at rest."""

from heapq import heappop, heappush
from typing import TYPE_CHECKING, NoReturn

from narsil_stream.actors.simulation.messages import score

if TYPE_CHECKING:
    from narsil_stream.actors.simulation.actor import Actor
    from narsil_stream.actors.simulation.batcher import Batcher
    from narsil_stream.actors.simulation.executor import Executor
    from narsil_stream.actors.simulation.gateway import Gateway, Request
    from narsil_stream.actors.simulation.world import World

GRACE_US = 100_000
"""A requester is told within its budget and this much, by any gateway that is not frozen."""
TICKET_GRACE_US = 1_000
"""A batcher that is not frozen ends a request within its budget and this much."""


MOST_TRIPS = 5
"""Round trips that an idle executor's slot may take from batcher to batcher until one has work for it."""


class Violation(AssertionError):
    """A rule was broken."""


class Referee:
    """Of one world. What an event touches is checked by the actor that it touches; what time alone can break, here."""

    def __init__(self, world: "World") -> None:
        self._world = world
        self._watched: list[tuple[int, int, Actor, int]] = []
        self._watches = 0
        self.ended: dict[int, str] = {}
        """How each request ended, by number."""

    def fail(self, what: str) -> NoReturn:
        raise Violation(what)

    # Requests

    def asked(self, gateway: "Gateway", request: "Request") -> None:
        gateway.unended[request.number] = request
        if self._world.trace is not None:
            self._world.note(
                gateway.name,
                f"is asked r{request.number}: {request.rows} rows, {request.budget_us} us, class {request.priority}",
            )
        self.watch(gateway, request.number, self._world.now + request.budget_us, GRACE_US)

    def answered(self, gateway: "Gateway", request: "Request", how: str, scores: bytes | memoryview = b"") -> None:
        number = request.number
        if number in self.ended:
            self.fail(f"r{number} ended twice: {self.ended[number]}, then {how}")
        if how == "scored":
            if scores != score(number, request.rows):
                self.fail(f"r{number} got somebody else's scores")
            if number in self._world.poison:
                self.fail(f"r{number} is scored although its forward pass fails")
        del gateway.unended[number]
        self.ended[number] = how
        self._world.tally["end", how] += 1
        if self._world.trace is not None:
            self._world.note(gateway.name, f"ends r{number}: {how}")

    def lost_with(self, gateway: "Gateway") -> None:
        """Whoever asked it sees the connection break."""
        for number in gateway.unended:
            self.ended[number] = "lost with its gateway"
            self._world.tally["end", "lost with its gateway"] += 1

    # Time

    def watch(self, actor: "Actor", key: int, due_us: int, grace_us: int) -> None:
        """What has this key in `actor.unended` has to end by then, in the world's time."""
        heappush(self._watched, (due_us + grace_us, self._watches, actor, key))
        self._watches += 1

    def check(self, until_us: int) -> None:
        """Before time moves on to then: what is so now was so for all that while."""
        watched = self._watched
        while watched and watched[0][0] < until_us:
            _, _, actor, key = heappop(watched)
            if actor.alive and key in actor.unended:
                if actor.thaws_us < until_us:
                    what = f"r{key}" if actor.kind == "gateway" else f"r{actor.unended[key].payload.request}"
                    self.fail(f"{actor.name} leaves {what} without an end past its budget and the grace")
                self.watch(actor, key, actor.thaws_us, 0)
        self._check_idle(self._world.now, until_us)

    def _check_idle(self, now: int, until_us: int) -> None:
        """One round trip while nothing is under way, and a few while a slot that it offers goes from hand to hand."""
        world = self._world
        hungry = [batcher for batcher in world.batchers if batcher.shadow.rows and batcher.thaws_us <= now]
        if hungry and any(batcher.policy.may_wait for batcher in world.batchers):
            hungry.clear()
        for executor in world.executors:
            waits = None
            if hungry and not executor.inside and executor.phase == "up" and executor.thaws_us <= now:
                waits = self._waits_for(executor, hungry, now)
            if waits is None:
                executor.idle_us = executor.still_us = None
                continue
            if executor.under_way:
                executor.still_us = None
            elif executor.still_us is None:
                executor.still_us = now
            if executor.idle_us is None:
                executor.idle_us = now
            still_us = 0 if executor.still_us is None else until_us - executor.still_us
            idle_us = until_us - executor.idle_us
            if still_us > world.round_trip_us or idle_us > MOST_TRIPS * world.round_trip_us:
                self.fail(f"{executor.name} is idle for {idle_us} us while work waits in {waits.name}")

    def _waits_for(self, executor: "Executor", hungry: "list[Batcher]", now: int) -> "Batcher | None":
        """A batcher with work for it, if no fault has struck either of late, nor who holds its slots."""
        shaken_us = self._world.weather.shaken_us
        if shaken_us.get(executor.name, 0) > now:
            return None
        for place in executor.ledger.places:
            if shaken_us.get(place.holder, 0) > now:
                return None
        for batcher in hungry:
            known = batcher.policy.executors.get(executor.name)
            heard = known is not None and known.up and shaken_us.get(batcher.name, 0) <= now
            if known is not None and heard and batcher.shadow.wanted(known.models):
                return batcher
        return None

    # Rest

    def check_rest(self) -> None:
        """Nothing is asked for any more: nothing may be left, and every slot is in somebody's hand."""
        world = self._world
        for gateway in world.gateways:
            if gateway.unended or gateway.router.pending:
                self.fail(f"{gateway.name} still has requests open")
            if gateway.router.peers.keys() != {batcher.name for batcher in world.batchers}:
                self.fail(f"{gateway.name} knows the batchers {sorted(gateway.router.peers)}")
        for batcher in world.batchers:
            self._check_batcher_rests(batcher)
        for executor in world.executors:
            self._check_slots_rest(executor)

    def _check_batcher_rests(self, batcher: "Batcher") -> None:
        policy, name = batcher.policy, batcher.name
        batcher.shadow.recount()
        if not policy.idle() or batcher.unended or policy.retries or policy.rows or policy.bytes:
            self.fail(f"{name} is not done")
        if any(queue.lines for queue in policy.queues.values()):
            self.fail(f"{name} keeps an empty line")
        if policy.executors.keys() != {executor.name for executor in self._world.executors}:
            self.fail(f"{name} knows the executors {sorted(policy.executors)}")
        if any(executor.flights or executor.abandoned for executor in policy.executors.values()):
            self.fail(f"{name} takes a batch for being under way still")

    def _check_slots_rest(self, executor: "Executor") -> None:
        in_hand = sorted(
            (index, generation)
            for batcher in self._world.batchers
            for index, generation in batcher.policy.executors[executor.name].free.items()
        )
        current = [(place.index, place.generation) for place in executor.ledger.places]
        if in_hand != current:
            self.fail(f"slots of {executor.name} are lost or in two hands: {in_hand} in hand, {current} exist")
