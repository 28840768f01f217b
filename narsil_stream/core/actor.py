"""What an actor is: a bounded mailbox, a loop that owns the state, and an end."""

import asyncio
import secrets
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from typing import ClassVar, Generic, TypeVar

from nats.micro.service import EndpointStats
from prometheus_client import CollectorRegistry

from narsil_stream.core.config import Config

M = TypeVar("M")


def now_us() -> int:
    """Monotonic µs: the clock of all policies in this process."""
    return time.monotonic_ns() // 1_000


def unix_us() -> int:
    """Wall-clock µs, only ever compared with a sender's."""
    return time.time_ns() // 1_000


def new_id(kind: str) -> str:
    """A name that no other actor has or ever had, also after a restart."""
    return f"{kind}-{secrets.token_hex(4)}"


class Mailbox(Generic[M]):
    """Messages that wait for an actor. Many senders, one taker, one event loop."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._waiting: deque[M] = deque()
        self.pop: Callable[[], M] = self._waiting.popleft
        """The next one."""
        self._filled = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self.peak = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, message: M) -> bool:
        """False when the mailbox is full: the sender has to refuse the work."""
        if len(self._waiting) >= self._capacity:
            return False
        self.put_urgent(message)
        return True

    def put_urgent(self, message: M) -> None:
        """For messages whose number the protocol itself bounds (results, beats, timers): never refused."""
        self._waiting.append(message)
        self._filled.set()

    def wake_at(self, when_us: int | None) -> None:
        """Let `take` return at this time even without a message. None: only for messages."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if when_us is not None:
            delay = max(0, when_us - now_us()) / 1e6
            self._timer = asyncio.get_running_loop().call_later(delay, self._filled.set)

    def leftovers(self) -> Sequence[M]:
        """What nobody will take any more, at the end."""
        left = list(self._waiting)
        self._waiting.clear()
        return left

    async def filled(self) -> int:
        """How many wait, once there is one or the time has come."""
        if self._filled.is_set():  # by this turn itself: the others of this event loop have theirs first
            await asyncio.sleep(0)
        await self._filled.wait()
        self._filled.clear()
        self.peak = max(self.peak, len(self._waiting))
        return len(self._waiting)


class Actor(ABC, Generic[M]):
    """State belongs to one loop, `run`; others only put messages into the mailbox. Hooks in the order of a life:

    start: subscribe, load, warm up; ready when it returns.
    receive: one message; then `turn` once for all messages of that turn of the event loop.
    drain: stop taking work and wait until what was accepted is answered; the loop goes on meanwhile.
    stop: answer what is left, free what is held.
    """

    kind: ClassVar[str]
    tunable: ClassVar[bool] = False
    """Whether it has live settings."""

    def __init__(self, capacity: int, name: str = "") -> None:
        self.name = name or new_id(self.kind)
        self.mailbox: Mailbox[M] = Mailbox(capacity)
        self.registry = CollectorRegistry()
        self.state = "starting"

    async def start(self) -> None:
        """Raises when the actor cannot work; the runtime tries again later."""

    @abstractmethod
    def receive(self, message: M) -> None: ...

    def turn(self) -> int | None:
        """Act on what the messages changed. Returns when to be called again at the latest, monotonic µs."""
        return None

    async def drain(self) -> None:
        """Returns when nothing accepted is left unanswered. The runtime bounds the time."""

    async def stop(self) -> None:
        """Called once, whatever happened before, also after a crash."""

    def tune(self, config: Config) -> None:
        """Go on with other values of the live settings. Between two turns."""

    def endpoints(self) -> list[EndpointStats]:
        """For NATS's service API."""
        return []

    def detail(self) -> str:
        """One line for people on what it is doing."""
        return ""

    async def run(self) -> None:
        """The one task of this actor, after `start`. What it has not received when it fails stays in the mailbox."""
        mailbox, receive = self.mailbox, self.receive
        try:
            mailbox.wake_at(self.turn())
            while True:
                for _ in range(await mailbox.filled()):
                    receive(mailbox.pop())
                mailbox.wake_at(self.turn())
        finally:
            mailbox.wake_at(None)
