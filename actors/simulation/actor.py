"""What all simulated actors share: as in `core.actor`, but its time is the world's."""

from typing import TYPE_CHECKING, Any, ClassVar

from narsil_stream.actors.simulation.messages import Message

if TYPE_CHECKING:
    from narsil_stream.actors.simulation.world import World

SPINS = 200
"""So many turns at one instant are more than any message or timer asks for."""


class Actor:
    """A process. It handles one message at a time, and none while it is frozen; its clocks are its own."""

    kind: ClassVar[str]

    def __init__(self, world: "World", name: str) -> None:
        self.world = world
        self.name = name
        self.alive = True
        self.phase = "up"
        self.thaws_us = 0
        self.skew_us = world.rng.randrange(10**9)
        self.wall_skew_us = 0
        self.beat_due_us = 0
        self.unended: dict[int, Any] = {}
        """What was accepted here and has no end yet: the referee's own record."""
        self._due_us = 0
        self._armed_us = -1
        self._turned_us = -1
        self._turns = 0
        """At that instant."""

    def clock(self) -> int:
        """Monotonic µs, as this process sees them."""
        return self.world.now + self.skew_us

    def wall(self) -> int:
        return self.world.now + self.wall_skew_us

    def frozen(self) -> bool:
        return self.thaws_us > self.world.now

    def take(self, message: Message) -> None:
        if not self.alive:
            return
        if self.thaws_us > self.world.now:
            self.world.at(self.thaws_us, self.take, message)
            return
        if self.receive(message):
            self.step()
        elif self.alive:
            self.check()

    def wake(self) -> None:
        if not self.alive:
            return
        if self.thaws_us > self.world.now:
            self.world.at(self.thaws_us, self.wake)
            return
        self.step()

    def step(self) -> None:
        world = self.world
        now = world.now
        due_us = self.turn() - self.skew_us
        if self._turned_us != now:
            self._turned_us, self._turns = now, 0
        self._turns += 1
        if self._turns > SPINS:
            world.referee.fail(f"{self.name} wakes itself without end")
        self._due_us = due_us = due_us if due_us > now else now
        if self._armed_us < 0 or due_us < self._armed_us:
            self._arm(due_us)
        if self.alive:
            self.check()

    def _arm(self, when_us: int) -> None:
        self._armed_us = when_us
        self.world.at(when_us, self._ring, when_us)

    def _ring(self, armed_us: int) -> None:
        """Timers that were set for later meanwhile are set again here, which is cheaper than taking each one back."""
        if armed_us != self._armed_us or not self.alive:
            return
        self._armed_us = -1
        later_us = max(self._due_us, self.thaws_us)
        if later_us > self.world.now:
            self._arm(later_us)
        else:
            self.step()

    def receive(self, message: Message) -> bool:
        """Whether a turn has to follow."""
        raise NotImplementedError

    def turn(self) -> int:
        """Returns when to be called again, by its own clock."""
        raise NotImplementedError

    def check(self) -> None:
        """The rules that this actor's state must keep."""

    def leave(self) -> None:
        """Stop in good order."""
