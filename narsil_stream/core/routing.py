"""Which batcher is asked, when another one is, and when waiting ends: the requester's policy. No clock, no I/O.

Times are µs of one monotonic clock. A batcher that falls silent, or says goodbye, loses its open requests to another
one; forward passes are idempotent, and the first answer counts.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import Generic, Protocol, TypeVar

from narsil_stream.schemas import subjects
from narsil_stream.schemas.errors import Fault, Refused
from narsil_stream.schemas.internal import BatcherBeat, ModelRef

GRACE_US = 50_000
"""Beyond its budget, for the batcher's own DEADLINE_EXCEEDED to come first."""
BUNDLE_BYTES = 256 << 10
"""Requests of one turn leave in messages of about this size, so that one message never holds up the others for long."""
MAX_SENDS = 3


class Links(Protocol):
    """Who can be reached; a `Bus` is one."""

    @property
    def connected(self) -> bool: ...

    def is_local(self, subject: str) -> bool: ...


@dataclass(slots=True, eq=False)
class Pending:
    """A request that is not answered yet."""

    slot: int
    model: str
    version: str
    deadline_us: int
    nbytes: int
    batcher: str = ""
    sends: int = 0

    def left(self) -> bool:
        """Whether whoever asked is gone, although this was not withdrawn yet."""
        return False


P = TypeVar("P", bound=Pending)


@dataclass(slots=True, eq=False)
class Peer:
    """A batcher as seen from here."""

    id: str
    seen_us: int
    models: tuple[ModelRef, ...] = ()
    unloaded: bool = False
    up: bool = True
    wait_us: int = 0
    lease_us: int = 500_000
    open: set[int] = field(default_factory=set)

    def serves(self, model: str, version: str) -> bool:
        for ref in self.models:  # noqa: SIM110 - `any` takes twice as long, and this is asked for each request
            if ref.name == model and (not version or ref.version == version):
                return True
        return False


class Router(Generic[P]):
    """One per requester. What it returns as failed has ended: it has to be told so."""

    def __init__(self, links: Links, now_us: int) -> None:
        self._links = links
        self.peers: dict[str, Peer] = {}
        self.pending: dict[int, P] = {}
        self._slots = itertools.count()
        self._outgoing: dict[str, list[P]] = defaultdict(list)
        self._deadlines: list[tuple[int, int]] = []
        self._checked_us = now_us
        self.late = 0
        """Answers to nobody: the request had ended, or had two answers."""
        self.resent = 0

    def slot(self) -> int:
        """A number that no other request from here has."""
        return next(self._slots)

    def alive(self) -> list[Peer]:
        connected = self._links.connected
        return [peer for peer in self.peers.values() if peer.up and (connected or self._is_local(peer))]

    def nobody(self) -> Refused:
        why = "no batcher is alive" if self._links.connected else "the broker is not connected"
        return Refused(Fault.UNAVAILABLE, why, 500_000)

    # Requests out

    def choice(self, model: str, version: str) -> str:
        """The batcher that a new request would go to now; "": there is none."""
        peer = self._choose(model, version)
        return "" if peer is None else peer.id

    def add(self, pending: P) -> None:
        """Choose a batcher for a new request. Raises `Refused`."""
        self._assign(pending)
        self.pending[pending.slot] = pending
        heappush(self._deadlines, (pending.deadline_us + GRACE_US, pending.slot))
        if len(self._deadlines) > 2 * len(self.pending) + 64:  # most of them were answered long before
            self._deadlines = [entry for entry in self._deadlines if entry[1] in self.pending]
            heapify(self._deadlines)

    def has_outgoing(self) -> bool:
        return bool(self._outgoing)

    def outgoing(self) -> Iterator[tuple[str, list[P]]]:
        """Takes out what is to be sent now: batchers, and requests that fit one message."""
        outgoing, self._outgoing = self._outgoing, defaultdict(list)
        for batcher, pendings in outgoing.items():
            bundle: list[P] = []
            size = 0
            for pending in pendings:
                if pending.left() or pending.slot not in self.pending or pending.batcher != batcher:
                    continue  # it ended, or moved on to another batcher, within this turn
                bundle.append(pending)
                size += pending.nbytes
                if size >= BUNDLE_BYTES:
                    yield batcher, bundle
                    bundle, size = [], 0
            if bundle:
                yield batcher, bundle

    # Ends

    def answered(self, slot: int, batcher: str, fault: str = "") -> P | None:
        """An answer came. Returns whose it is, if anybody still waits for it and nobody can give a better one.

        Scores count from whomever; an error only from the batcher that has the request now. Where one batcher cannot
        serve it and another one can, that one is asked.
        """
        pending = self.pending.get(slot)
        if pending is None or (fault and pending.batcher != batcher):
            self.late += 1
            return None
        if fault == Fault.UNAVAILABLE.name and self._elsewhere(pending):
            return None
        self.end(pending)
        return pending

    def end(self, pending: P) -> bool:
        """Nobody waits for it any more. Returns whether anybody did."""
        peer = self.peers.get(pending.batcher)
        if peer is not None:
            peer.open.discard(pending.slot)
        return self.pending.pop(pending.slot, None) is not None

    def end_all(self) -> list[P]:
        """Takes out every request."""
        pendings = list(self.pending.values())
        for pending in pendings:
            self.end(pending)
        return pendings

    def expired(self, now_us: int) -> list[tuple[P, Refused]]:
        """Takes out requests that got no answer within their budget and the grace."""
        failed = []
        while self._deadlines and self._deadlines[0][0] <= now_us:
            pending = self.pending.get(heappop(self._deadlines)[1])
            if pending is not None:
                self.end(pending)
                failed.append((pending, Refused(Fault.DEADLINE_EXCEEDED, "no answer came within the budget")))
        return failed

    def wake_us(self) -> int | None:
        """When `expired` has to be called next."""
        while self._deadlines and self._deadlines[0][1] not in self.pending:
            heappop(self._deadlines)
        return self._deadlines[0][0] if self._deadlines else None

    # Batchers

    def beat(self, beat: BatcherBeat, now_us: int) -> list[tuple[P, Refused]]:
        """A batcher is alive, or says goodbye. Returns the requests that fail because of that."""
        if beat.state == "gone":
            return self.lose(beat.batcher)
        peer = self.peers.get(beat.batcher)
        if peer is None:
            peer = self.peers[beat.batcher] = Peer(beat.batcher, now_us)
        peer.seen_us, peer.models, peer.wait_us = now_us, beat.models, beat.wait_us
        peer.unloaded = beat.unloaded
        peer.up, peer.lease_us = beat.state == "up", beat.lease_ms * 1_000
        return []

    def silent(self, now_us: int) -> list[str]:
        """Batchers that were not heard of for a lease. To be called several times in a lease."""
        pause_us, self._checked_us = now_us - self._checked_us, now_us
        silent = []
        for peer in self.peers.values():
            if pause_us > peer.lease_us // 2:  # we stood still ourselves: beats that came meanwhile are not read yet
                peer.seen_us = max(peer.seen_us, now_us - peer.lease_us // 2)
            if peer.seen_us < now_us - peer.lease_us:
                silent.append(peer.id)
        return silent

    def lose(self, batcher: str) -> list[tuple[P, Refused]]:
        """Its open requests go to another batcher. Returns those that cannot."""
        peer = self.peers.pop(batcher, None)
        failed = []
        for slot in peer.open if peer is not None else ():
            pending = self.pending.get(slot)
            if pending is None or pending.left():
                continue
            try:
                self._again(pending)
            except Refused as refused:
                self.end(pending)
                failed.append((pending, refused))
        return failed

    def cut_off(self) -> list[P]:
        """The connection broke: takes out the requests that went over it, as they or their answers may be lost."""
        failed = []
        for peer in [peer for peer in self.peers.values() if not self._is_local(peer)]:
            del self.peers[peer.id]
            for slot in peer.open:
                pending = self.pending.get(slot)
                if pending is not None:
                    self.end(pending)
                    failed.append(pending)
        return failed

    def _again(self, pending: P) -> None:
        if pending.sends >= MAX_SENDS:
            raise Refused(Fault.UNAVAILABLE, "batchers were lost with this request", 1_000)
        self._assign(pending)
        self.resent += 1

    def _elsewhere(self, pending: P) -> bool:
        """Whether it goes to another batcher that serves its model."""
        others = (peer for peer in self.alive() if peer.id != pending.batcher)
        serving = any(peer.serves(pending.model, pending.version) for peer in others)
        if not serving or pending.sends >= MAX_SENDS or pending.left():
            return False
        if pending.batcher in self.peers:
            self.peers[pending.batcher].open.discard(pending.slot)
        self._again(pending)
        return True

    def _assign(self, pending: P) -> None:
        """Choose a batcher and put the request into this turn's message to it. Raises `Refused`."""
        peer = self._choose(pending.model, pending.version, pending.batcher)
        if peer is None:
            raise self.nobody()
        pending.batcher = peer.id
        pending.sends += 1
        peer.open.add(pending.slot)
        self._outgoing[peer.id].append(pending)

    def _choose(self, model: str, version: str, without: str = "") -> Peer | None:
        """Of those alive that serve the model, the one with the least to do."""
        alive = [peer for peer in self.alive() if peer.id != without]
        serving = [peer for peer in alive if peer.serves(model, version)]
        return min(serving or alive, key=lambda peer: (peer.wait_us // 1_000, len(peer.open), peer.id), default=None)

    def _is_local(self, peer: Peer) -> bool:
        return self._links.is_local(subjects.ask(peer.id))
