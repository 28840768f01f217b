"""The faults of a run: which kinds, how bad, and what each does to messages and actors. All drawn from the seed."""

import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from msgspec.structs import replace

from narsil_stream.actors.simulation.messages import Message, told
from narsil_stream.schemas.internal import Grant, Result

if TYPE_CHECKING:
    from narsil_stream.actors.simulation.actor import Actor
    from narsil_stream.actors.simulation.world import World

SHARES = {"drop": 0.15, "delay": 0.25, "reorder": 0.3, "duplicate": 0.1, "lost credit": 0.4}
"""Kinds that strike messages, and the largest share of them; at least a tenth of that."""
EVENTS = {"freeze": 4, "crash": 3, "slow device": 2, "clock step": 3, "partition": 2, "goodbye": 2}
"""Kinds that strike actors, and how often at most."""
KINDS = (*SHARES, *EVENTS)
AFTERMATH_US = 125_000
"""So long a fault excuses those whom it struck from working without a pause: a lease and a heartbeat, until it is found
out."""
ON_TIME = (0,)
OVERDUE_US = 100_000


@dataclass(frozen=True)
class Faults:
    """How bad the weather is, by kind: shares of messages, numbers of events."""

    shares: dict[str, float] = field(default_factory=dict)
    events: dict[str, int] = field(default_factory=dict)
    poison: float = 0.0
    """Share of requests whose forward pass raises."""

    @staticmethod
    def drawn(rng: random.Random) -> "Faults":
        """Three kinds at least."""
        kinds = rng.sample(KINDS, rng.randint(3, 6))
        return Faults(
            shares={kind: rng.uniform(0.1, 1) * SHARES[kind] for kind in kinds if kind in SHARES},
            events={kind: rng.randint(1, EVENTS[kind]) for kind in kinds if kind in EVENTS},
            poison=rng.choice((0.0, 0.0, 0.02)),
        )

    @property
    def kinds(self) -> list[str]:
        return [*self.shares, *self.events]


class Weather:
    """What befalls the messages and actors of one world while it lasts."""

    def __init__(self, world: "World", faults: Faults) -> None:
        self._world = world
        self._rng = world.rng
        self.faults = faults
        self.bad = True
        self.over_us = 0
        """When the last one frozen thaws, and the last one that crashed is back."""
        self.shaken_us: dict[str, int] = {}
        """Until when an actor is excused, by name."""
        self._sides: list[tuple[int, frozenset[str]]] = []
        self._credit = faults.shares.get("lost credit", 0.0)
        self._ladder = [(kind, share) for kind, share in faults.shares.items() if kind != "lost credit"]

    def clear_up(self) -> None:
        """From now on nothing befalls anybody, and clocks are right again."""
        self.bad = False
        self._sides.clear()
        for actor in self._world.actors.values():
            actor.wall_skew_us = 0
            self.shake(actor.name)

    def shake(self, *names: str) -> None:
        for name in names:
            self.shaken_us[name] = max(self.shaken_us.get(name, 0), self._world.now + AFTERMATH_US)

    # Messages

    def fate(self, sender: str, to: str, message: Message) -> tuple[Message, tuple[int, ...]]:
        """The message, or what is left of it, and by how much it is late, once for each time that it arrives."""
        if not self.bad:
            return message, ON_TIME
        if self._sides and self._cut(sender, to):
            return message, self._struck("partition", sender, to, message, ())
        if self._credit and isinstance(message, Grant | Result) and self._loses_credit():
            if isinstance(message, Grant):
                return message, self._struck("lost credit", sender, to, message, ())
            if message.grant is not None:
                self._struck("lost credit", sender, to, message, ())
                message = replace(message, grant=None)
        luck = self._rng.random() if self._ladder else 1.0
        for kind, share in self._ladder:
            if luck < share:
                return message, self._struck(kind, sender, to, message, self._times(kind))
            luck -= share
        return message, ON_TIME

    def _loses_credit(self) -> bool:
        """By chance; if none was lost in the first half of a storm, the next one is."""
        world = self._world
        spared = world.now > OVERDUE_US and not world.tally["fault", "lost credit"]
        return self._rng.random() < self._credit or spared

    def _times(self, kind: str) -> tuple[int, ...]:
        match kind:
            case "delay":
                return (int(self._rng.expovariate(1 / 10_000)),)
            case "reorder":
                return (self._rng.randrange(1, 400),)
            case "duplicate":
                return (0, self._rng.randrange(400))
        return ()

    def _struck(self, kind: str, sender: str, to: str, message: Message, times: tuple[int, ...]) -> tuple[int, ...]:
        self._world.tally["fault", kind] += 1
        self.shake(sender, to)
        if self._world.trace is not None:
            self._world.note(f"! {kind}: {sender} -> {to}", told(message) or "heartbeat")
        return times

    def _cut(self, sender: str, to: str) -> bool:
        self._sides = [(until_us, side) for until_us, side in self._sides if until_us > self._world.now]
        return any((sender in side) != (to in side) for _, side in self._sides)

    # Actors

    def misfortunes(self, start_us: int, end_us: int) -> None:
        strikes = {
            "freeze": self.freeze,
            "crash": self.crash,
            "slow device": self.slow_device,
            "clock step": self.clock_step,
            "partition": self.partition,
            "goodbye": self.goodbye,
        }
        for kind, times in self.faults.events.items():
            for _ in range(times):
                self._world.at(self._rng.randrange(start_us, end_us), strikes[kind])

    def befalls(self, kind: str, actor: "Actor", detail: str = "") -> None:
        self._world.tally["fault", kind] += 1
        self.shake(actor.name)
        self._world.note(f"! {kind}: {actor.name}", detail)

    def freeze(self) -> None:
        actor = self._anybody()
        for_us = self._rng.randrange(1_000, 180_000)
        actor.thaws_us = max(actor.thaws_us, self._world.now + for_us)
        self.befalls("freeze", actor, f"for {for_us} us")
        self.shaken_us[actor.name] = max(self.shaken_us[actor.name], actor.thaws_us + AFTERMATH_US)
        self.over_us = max(self.over_us, actor.thaws_us)

    def crash(self) -> None:
        """It is gone without a word; another one of its kind comes soon. One gateway stays."""
        actor = self._anybody()
        if actor.kind != "gateway" or len(self._world.gateways) > 1:
            self.befalls("crash", actor)
            self._world.end_actor(actor)
            self._replace(actor)

    def goodbye(self) -> None:
        """An executor or a batcher is stopped in good order."""
        staying = [actor for actor in (*self._world.batchers, *self._world.executors) if actor.phase == "up"]
        if staying:
            actor = self._rng.choice(staying)
            self.befalls("goodbye", actor)
            actor.leave()
            self._replace(actor)

    def _replace(self, actor: "Actor") -> None:
        back_us = self._world.now + self._rng.randrange(1_000, 100_000)
        self.over_us = max(self.over_us, back_us)
        self._world.at(back_us, self._world.add, actor.kind)

    def slow_device(self) -> None:
        if self._world.executors:
            executor = self._rng.choice(self._world.executors)
            executor.slowness = self._rng.choice((3.0, 10.0))
            executor.slow_until_us = self._world.now + self._rng.randrange(20_000, 150_000)
            self.befalls("slow device", executor, f"{executor.slowness:.0f} times")

    def clock_step(self) -> None:
        """The wall clock goes anywhere, and the monotonic one forward, as after a pause of the machine."""
        actor = self._anybody()
        actor.wall_skew_us += self._rng.randrange(-5_000_000, 5_000_000)
        jump_us = self._rng.choice((0, self._rng.randrange(1_000, 150_000)))
        self.befalls("clock step", actor, f"wall {actor.wall_skew_us} us off, monotonic {jump_us} us forward")
        actor.skew_us += jump_us
        actor.wake()

    def partition(self) -> None:
        names = sorted(self._world.actors)
        side = frozenset(self._rng.sample(names, self._rng.randint(1, max(1, len(names) // 2))))
        for_us = self._rng.randrange(5_000, 150_000)
        self._sides.append((self._world.now + for_us, side))
        self._world.tally["fault", "partition"] += 1
        self._world.note(f"! partition: {' '.join(sorted(side))}", f"cut off for {for_us} us")

    def _anybody(self) -> "Actor":
        return self._rng.choice([*self._world.gateways, *self._world.batchers, *self._world.executors])
