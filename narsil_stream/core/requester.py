"""Asking a batcher, from a gateway or a client: each request ends exactly once, whatever dies behind it.

Requests of one turn of the event loop to one batcher leave in one message. A batcher that falls silent, or says
goodbye, loses its open requests to another one; forward passes are idempotent, and the first answer counts.
"""

import asyncio
import contextlib
import itertools
import logging
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

import msgspec

from narsil_stream.core.actor import now_us, unix_us
from narsil_stream.core.bus import Bus
from narsil_stream.core.config import Config
from narsil_stream.core.versions import newness
from narsil_stream.schemas import subjects
from narsil_stream.schemas.codec import UNDECODABLE
from narsil_stream.schemas.errors import Fault, Refused
from narsil_stream.schemas.internal import Answers, Ask, BatcherBeat, Bundle, Cancel, ModelCard, ModelRef
from narsil_stream.schemas.model import NAME
from narsil_stream.schemas.oip import StatisticsReport
from narsil_stream.schemas.wire import InferAnswer, InferRequest

log = logging.getLogger(__name__)

GRACE_US = 50_000
"""Beyond its budget, for the batcher's own DEADLINE_EXCEEDED to come first."""
BUNDLE_BYTES = 256 << 10
"""Requests of one turn leave in messages of about this size, so that one message never holds up the others for long."""
MAX_SENDS = 3

_decode_answers = msgspec.msgpack.Decoder(Answers).decode
_decode_beat = msgspec.msgpack.Decoder(BatcherBeat).decode
_decode_cards = msgspec.json.Decoder(list[ModelCard]).decode
_decode_statistics = msgspec.json.Decoder(StatisticsReport).decode


@dataclass(slots=True, eq=False)
class Pending:
    """A request that is not answered yet."""

    slot: int
    model: str
    version: str
    request: InferRequest
    deadline_us: int
    future: asyncio.Future[InferAnswer]
    batcher: str = ""
    sends: int = 0


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
        return any(ref.name == model and (not version or ref.version == version) for ref in self.models)


class Requester:
    """One per process and bus. All methods belong to the bus's event loop."""

    def __init__(self, config: Config, bus: Bus) -> None:
        self._bus = bus
        self._limits = config.batch
        self._check_every = config.timing.beat_ms / 1e3
        self._inbox = ""
        self._peers: dict[str, Peer] = {}
        self._pending: dict[int, Pending] = {}
        self._slots = itertools.count()
        self._outgoing: dict[str, list[Pending]] = defaultdict(list)
        self._deadlines: list[tuple[int, int]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._checks: asyncio.TimerHandle | None = None
        self._checked_us = now_us()
        self._seen = asyncio.Event()
        self._cards: dict[str, ModelCard] = {}
        self.late = 0
        """Answers to nobody: the request had ended, or had two answers."""
        self.resent = 0

    # Life

    async def start(self) -> None:
        self._inbox = self._bus.new_inbox()
        await self._bus.listen(self._inbox, self._on_answers, _decode_answers, owner=self)
        await self._bus.listen(subjects.BATCHER_BEAT, self._on_beat, _decode_beat, owner=self)
        self._bus.on_lost.append(self._on_lost)
        self._bus.on_back.append(self._say_hello)
        await self._bus.flush()
        self._say_hello()
        self._checks = asyncio.get_running_loop().call_later(self._check_every, self._check_peers)

    async def stop(self) -> None:
        """Whoever still waits gets UNAVAILABLE."""
        for pending in list(self._pending.values()):
            self._fail(pending, Refused(Fault.UNAVAILABLE, "this process is stopping", 1_000))
        for timer in (self._timer, self._checks):
            if timer is not None:
                timer.cancel()
        with contextlib.suppress(ValueError):  # not started
            self._bus.on_lost.remove(self._on_lost)
            self._bus.on_back.remove(self._say_hello)
        await self._bus.unsubscribe(self._inbox, owner=self)
        await self._bus.unsubscribe(subjects.BATCHER_BEAT, owner=self)

    async def wait_ready(self, timeout: float) -> bool:
        """Whether `ready`, waiting for it up to `timeout` seconds."""
        return await self.wait_until(lambda: self.ready, timeout)

    async def wait_until(self, condition: Callable[[], bool], timeout: float) -> bool:
        """Whether a condition on what batchers say holds, waiting for it up to `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                while not condition():
                    self._seen.clear()
                    await self._seen.wait()
        except TimeoutError:
            return False
        return True

    @property
    def ready(self) -> bool:
        """A request that would come now could be scored; or all works, and no model is loaded on purpose."""
        return any(peer.models or peer.unloaded for peer in self._alive())

    @property
    def open(self) -> int:
        return len(self._pending)

    def models(self) -> tuple[ModelRef, ...]:
        """What is served now, each version once, although its weights may just be changing."""
        refs = {(ref.name, ref.version): ref for peer in self._peers.values() if peer.up for ref in peer.models}
        return tuple(refs[key] for key in sorted(refs))

    async def card(self, model: str, version: str = "") -> ModelCard:
        """The description of a served model, the newest version unless one is named. Raises `Refused`."""
        wanted = [
            (newness(ref.version), peer, ref)
            for peer in self._alive()
            for ref in peer.models
            if ref.name == model and version in ("", ref.version)
        ]
        if wanted:
            _, peer, ref = max(wanted, key=lambda found: found[0])
            return await self._described(peer, ref)
        if not self.ready:
            raise Refused(Fault.UNAVAILABLE, "no executor is alive", 500_000)
        raise Refused(
            Fault.NOT_FOUND, f"model '{model}'{f' version {version!r}' if version else ''} is not served here"
        )

    async def statistics(self) -> list[StatisticsReport]:
        """What each batcher has counted; one that does not answer in time is left out. Raises UNAVAILABLE."""
        alive = [peer.id for peer in self._alive()]
        if not alive:
            raise self._nobody()
        replies = await asyncio.gather(*map(self._counted, alive))
        return [report for report in replies if report is not None]

    async def _counted(self, batcher: str) -> StatisticsReport | None:
        try:
            return _decode_statistics(await self._bus.request(subjects.statistics(batcher)))
        except (Refused, *UNDECODABLE) as error:
            log.warning("%s is left out of the statistics: %s", batcher, error)
            return None

    # Asking

    async def ask(self, model: str, version: str, request: InferRequest) -> InferAnswer:
        """The scores. Raises `Refused` and nothing else; cancelling it withdraws the request."""
        if not NAME.fullmatch(model) or (version and not NAME.fullmatch(version)):
            raise Refused(Fault.NOT_FOUND, f"model {model!r}, version {version!r}: names match {NAME.pattern}")
        budget_us = min(request.budget_us or self._limits.default_budget_us, self._limits.max_budget_us)
        now = now_us()
        future: asyncio.Future[InferAnswer] = asyncio.get_running_loop().create_future()
        pending = Pending(next(self._slots), model, version, request, now + budget_us, future)
        self._assign(pending)
        self._pending[pending.slot] = pending
        self._watch(pending)
        try:
            return await future
        except asyncio.CancelledError:
            self._withdraw(pending)
            raise

    def _assign(self, pending: Pending) -> None:
        """Choose a batcher and put the request into this turn's message to it. Raises `Refused`."""
        peer = self._choose(pending)
        pending.batcher = peer.id
        pending.sends += 1
        peer.open.add(pending.slot)
        if not self._outgoing:
            asyncio.get_running_loop().call_soon(self._send_outgoing)
        self._outgoing[peer.id].append(pending)

    def _choose(self, pending: Pending) -> Peer:
        """Of those alive that serve the model, the one with the least to do."""
        alive = [peer for peer in self._alive() if peer.id != pending.batcher]
        if not alive:
            raise self._nobody()
        serving = [peer for peer in alive if peer.serves(pending.model, pending.version)]
        return min(serving or alive, key=lambda peer: (peer.wait_us // 1_000, len(peer.open), peer.id))

    def _nobody(self) -> Refused:
        why = "no batcher is alive" if self._bus.connected else "the broker is not connected"
        return Refused(Fault.UNAVAILABLE, why, 500_000)

    def _alive(self) -> list[Peer]:
        return [peer for peer in self._peers.values() if peer.up and self._reachable(peer)]

    def _reachable(self, peer: Peer) -> bool:
        return self._bus.connected or self._bus.is_local(subjects.ask(peer.id))

    def _send_outgoing(self) -> None:
        outgoing, self._outgoing = self._outgoing, defaultdict(list)
        for batcher, pendings in outgoing.items():
            bundle: list[Pending] = []
            size = 0
            for pending in pendings:
                if pending.future.done() or pending.batcher != batcher:
                    continue  # it ended, or moved on to another batcher, within this turn
                bundle.append(pending)
                size += sum(tensor.data.nbytes for tensor in pending.request.inputs)
                if size >= BUNDLE_BYTES:
                    self._send(batcher, bundle)
                    bundle, size = [], 0
            if bundle:
                self._send(batcher, bundle)

    def _send(self, batcher: str, bundle: list[Pending]) -> None:
        now, wall = now_us(), unix_us()
        asks = tuple(
            Ask(p.slot, p.model, p.version, msgspec.structs.replace(
                p.request, budget_us=max(1, p.deadline_us - now), sent_us=wall
            )) for p in bundle
        )  # fmt: skip
        try:
            self._bus.send(subjects.ask(batcher), Bundle(self._inbox, asks))
        except Refused as refused:
            if refused.fault is Fault.TOO_LARGE and len(bundle) > 1:
                middle = len(bundle) // 2
                self._send(batcher, bundle[:middle])
                self._send(batcher, bundle[middle:])
                return
            for pending in bundle:
                self._fail(pending, refused)

    # Answers

    def _on_answers(self, message: Answers) -> None:
        for slot, answer in zip(message.slots, message.answers, strict=True):
            pending = self._pending.get(slot)
            if pending is None:
                self.late += 1
                continue
            self._end(pending)
            if not pending.future.done():
                pending.future.set_result(answer)

    def _end(self, pending: Pending) -> None:
        self._pending.pop(pending.slot, None)
        peer = self._peers.get(pending.batcher)
        if peer is not None:
            peer.open.discard(pending.slot)

    def _fail(self, pending: Pending, refused: Refused) -> None:
        self._end(pending)
        if not pending.future.done():
            pending.future.set_exception(refused)

    def _withdraw(self, pending: Pending) -> None:
        if pending.slot not in self._pending:
            return
        self._end(pending)
        try:
            self._bus.send(subjects.ask(pending.batcher), Cancel(self._inbox, (pending.slot,)))
        except Refused:
            log.debug("a cancel was not sent: the batcher will find out by the deadline")

    # Time

    def _watch(self, pending: Pending) -> None:
        heappush(self._deadlines, (pending.deadline_us + GRACE_US, pending.slot))
        if len(self._deadlines) > 2 * len(self._pending) + 64:  # most of them were answered long before
            self._deadlines = [entry for entry in self._deadlines if entry[1] in self._pending]
            heapify(self._deadlines)
        if self._timer is None or self._deadlines[0][1] == pending.slot:
            self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._deadlines and self._deadlines[0][1] not in self._pending:
            heappop(self._deadlines)
        if self._deadlines:
            delay = max(0, self._deadlines[0][0] - now_us()) / 1e6
            self._timer = asyncio.get_running_loop().call_later(delay, self._on_timer)

    def _on_timer(self) -> None:
        now = now_us()
        while self._deadlines and self._deadlines[0][0] <= now:
            pending = self._pending.get(heappop(self._deadlines)[1])
            if pending is not None:
                self._fail(pending, Refused(Fault.DEADLINE_EXCEEDED, "no answer came within the budget"))
        self._timer = None
        self._set_timer()

    # Batchers

    def _on_beat(self, beat: BatcherBeat) -> None:
        if beat.state == "gone":
            self._lose(beat.batcher)
            return
        peer = self._peers.get(beat.batcher)
        if peer is None:
            peer = self._peers[beat.batcher] = Peer(beat.batcher, now_us())
        peer.seen_us, peer.models, peer.wait_us = now_us(), beat.models, beat.wait_us
        peer.unloaded = beat.unloaded
        peer.up, peer.lease_us = beat.state == "up", beat.lease_ms * 1_000
        self._seen.set()

    def _check_peers(self) -> None:
        now = now_us()
        pause_us, self._checked_us = now - self._checked_us, now
        for peer in list(self._peers.values()):
            if pause_us > peer.lease_us // 2:  # we stood still ourselves: beats that came meanwhile are not read yet
                peer.seen_us = max(peer.seen_us, now - peer.lease_us // 2)
            if peer.seen_us < now - peer.lease_us:
                log.warning("%s was silent for too long", peer.id)
                self._lose(peer.id)
        self._checks = asyncio.get_running_loop().call_later(self._check_every, self._check_peers)

    def _lose(self, batcher: str) -> None:
        """Its open requests go to another batcher."""
        peer = self._peers.pop(batcher, None)
        for slot in peer.open if peer is not None else ():
            pending = self._pending.get(slot)
            if pending is None or pending.future.done():
                continue
            if pending.sends >= MAX_SENDS:
                self._fail(pending, Refused(Fault.UNAVAILABLE, "batchers were lost with this request", 1_000))
                continue
            try:
                self._assign(pending)
                self.resent += 1
            except Refused as refused:
                self._fail(pending, refused)

    def _on_lost(self) -> None:
        """The connection broke: requests and answers on their way may be lost, so the callers are told now."""
        for peer in [p for p in self._peers.values() if not self._bus.is_local(subjects.ask(p.id))]:
            del self._peers[peer.id]
            for slot in peer.open:
                pending = self._pending.get(slot)
                if pending is not None:
                    self._fail(pending, Refused(Fault.UNAVAILABLE, "the broker was lost", 500_000))

    def _say_hello(self) -> None:
        self._bus.signal(subjects.HELLO)

    async def _described(self, peer: Peer, ref: ModelRef) -> ModelCard:
        card = self._cards.get(ref.digest)
        if card is None:
            described = await self._bus.request(subjects.describe(peer.id))
            try:
                self._cards |= {known.digest: known for known in _decode_cards(described)}
            except UNDECODABLE as error:
                log.warning("%s did not describe its models: %s", peer.id, error)
                raise Refused(Fault.INTERNAL, f"{peer.id} does not describe its models as version 1 does") from None
            card = self._cards.get(ref.digest)
        if card is None:
            raise Refused(Fault.UNAVAILABLE, f"{peer.id} has not described model '{ref.name}' yet", 100_000)
        return card
