"""The executors' model repositories, from a gateway: what is in them, and which models are to be served.

Every executor that is alive is asked on a subject of its own, and answers when it is done.
"""

import asyncio
import itertools
import logging
from dataclasses import dataclass, field
from typing import Literal

import msgspec

from narsil_stream.core.bus import Bus
from narsil_stream.core.config import Config
from narsil_stream.schemas import subjects
from narsil_stream.schemas.errors import Fault, Refused, named
from narsil_stream.schemas.internal import Control, Done, ExecutorBeat, Look
from narsil_stream.schemas.oip import RepositoryEntry

log = logging.getLogger(__name__)

CONTROL_S = 600.0
"""For a load or unload: a large model is read, hashed, checked and copied to its device first."""
LOOK_S = 5.0
BEATS_IN_LEASES = 2
"""An executor that was silent for so many leases is lost, and nobody waits for its answer."""
STATES = ("READY", "LOADING", "UNLOADING", "UNAVAILABLE")
"""The first that an executor reports is the state of the whole."""

Verb = Literal["load", "unload"]

_decode_beat = msgspec.msgpack.Decoder(ExecutorBeat).decode
_decode_done = msgspec.msgpack.Decoder(Done).decode


@dataclass(slots=True, eq=False)
class Peer:
    """An executor that is alive. `missed`: ticks of our own clock since it was heard, so a pause of ours is none."""

    id: str
    missed: int = 0
    open: dict[int, asyncio.Future[Done | None]] = field(default_factory=dict)
    """Questions by slot; None for an answer: it was lost."""


class Repository:
    """One for each gateway. Listens to executors from its first use on; all methods belong to the bus's event loop."""

    def __init__(self, config: Config, bus: Bus) -> None:
        self._bus = bus
        self._timing = config.timing
        self._inbox = ""
        self._peers: dict[str, Peer] = {}
        self._slots = itertools.count()
        self._opening: asyncio.Task[None] | None = None
        self._ticks: asyncio.TimerHandle | None = None

    async def index(self) -> tuple[RepositoryEntry, ...]:
        """Each version of each model in any repository, by name and version. Raises `Refused` UNAVAILABLE."""
        await self._opened()
        found: dict[tuple[str, str], RepositoryEntry] = {}
        for done in await self._ask_all(self._live(), LOOK_S):
            for entry in done.entries:
                key = (entry.name, entry.version)
                found[key] = _merged(found[key], entry) if key in found else entry
        return tuple(found[key] for key in sorted(found))

    async def control(self, verb: Verb, model: str) -> None:
        """Load or unload a model everywhere; returns when that has taken effect. Raises `Refused`: where it failed.

        An executor that joins meanwhile is asked too; one that is lost meanwhile does not count.
        """
        await self._opened()
        asked: set[str] = set()
        done: list[Done] = []
        while new := [peer for peer in self._live() if peer.id not in asked]:
            asked |= {peer.id for peer in new}
            done += await self._ask_all(new, CONTROL_S, verb, model)
        if failed := [one for one in done if one.fault]:
            raise _refusal(failed, len(done))

    async def stop(self) -> None:
        """Whoever still waits gets UNAVAILABLE."""
        if self._opening is None:
            return
        self._opening.cancel()
        await asyncio.gather(self._opening, return_exceptions=True)
        if self._ticks is not None:
            self._ticks.cancel()
        for peer in list(self._peers.values()):
            self._lose(peer)
        await self._bus.unsubscribe(subjects.EXECUTOR_BEAT, owner=self)
        await self._bus.unsubscribe(self._inbox, owner=self)

    # Executors

    async def _opened(self) -> None:
        """Listen to executors, if that is not so already, for as long as it takes to have heard each."""
        if self._opening is None or (self._opening.done() and self._opening.cancelled()):
            self._opening = asyncio.create_task(self._open(), name="repository opens")
        await asyncio.shield(self._opening)

    async def _open(self) -> None:
        self._inbox = self._bus.new_inbox(subjects.DONE)
        await self._bus.listen(self._inbox, self._on_done, _decode_done, owner=self)
        await self._bus.listen(subjects.EXECUTOR_BEAT, self._on_beat, _decode_beat, owner=self)
        await self._bus.flush()
        self._bus.signal(subjects.HELLO)
        self._tick()
        await asyncio.sleep(self._timing.lease_ms / 1e3)

    def _on_beat(self, beat: ExecutorBeat) -> None:
        if beat.state == "up":
            self._peers.setdefault(beat.executor, Peer(beat.executor)).missed = 0
        elif (peer := self._peers.get(beat.executor)) is not None:
            self._lose(peer)

    def _tick(self) -> None:
        self._ticks = asyncio.get_running_loop().call_later(self._timing.beat_ms / 1e3, self._tick)
        most = BEATS_IN_LEASES * self._timing.lease_ms // self._timing.beat_ms
        for peer in list(self._peers.values()):
            peer.missed += 1
            if peer.missed > most:
                self._lose(peer)

    def _lose(self, peer: Peer) -> None:
        del self._peers[peer.id]
        if peer.open:
            log.warning("%s was lost while it was asked", peer.id)
        for future in peer.open.values():
            if not future.done():
                future.set_result(None)

    def _live(self) -> list[Peer]:
        """Raises UNAVAILABLE when there is none."""
        if not self._peers:
            why = "no executor is alive" if self._bus.connected else "the broker is not connected"
            raise Refused(Fault.UNAVAILABLE, why, 500_000)
        return list(self._peers.values())

    # Questions

    async def _ask_all(
        self, peers: list[Peer], timeout: float, verb: Verb | None = None, model: str = ""
    ) -> list[Done]:
        """The answers of those that are not lost. Raises UNAVAILABLE when all are."""
        answers = await asyncio.gather(*(self._ask(peer, timeout, verb, model) for peer in peers))
        done = [answer for answer in answers if answer is not None]
        if not done:
            raise Refused(Fault.UNAVAILABLE, "the executors were lost with this request", 500_000)
        return done

    async def _ask(self, peer: Peer, timeout: float, verb: Verb | None, model: str) -> Done | None:
        """None: the executor was lost."""
        slot = next(self._slots)
        future: asyncio.Future[Done | None] = asyncio.get_running_loop().create_future()
        peer.open[slot] = future
        try:
            if verb is None:
                self._bus.send(subjects.repository(peer.id), Look(self._inbox, slot))
            else:
                self._bus.send(subjects.admin(peer.id), Control(self._inbox, slot, verb, model))
            async with asyncio.timeout(timeout):
                return await future
        except TimeoutError:
            return Done(peer.id, slot, Fault.DEADLINE_EXCEEDED.name, f"no answer within {timeout:.0f} s")
        except Refused as refused:
            return Done(peer.id, slot, refused.fault.name, refused.detail)
        finally:
            peer.open.pop(slot, None)

    def _on_done(self, done: Done) -> None:
        peer = self._peers.get(done.executor)
        future = peer.open.get(done.slot) if peer is not None else None
        if future is not None and not future.done():
            future.set_result(done)


def _merged(one: RepositoryEntry, other: RepositoryEntry) -> RepositoryEntry:
    """Of one version on two executors: READY if it is anywhere; the first reason that there is."""
    best, _ = sorted((one, other), key=lambda entry: (STATES.index(entry.state), not entry.reason))
    return best


def _refusal(failed: list[Done], asked: int) -> Refused:
    """One error for what failed on some executors; where is said unless it is the same everywhere."""
    faults = [named(done.fault) for done in failed]
    details = {done.detail for done in failed}
    if len(failed) == asked and len(details) == 1:
        return Refused(faults[0], failed[0].detail)
    where = "; ".join(f"{done.executor}: {done.detail}" for done in failed)
    return Refused(faults[0], f"failed on {len(failed)} of {asked} executors: {where}")
