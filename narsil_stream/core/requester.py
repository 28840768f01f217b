"""Asking a batcher, from a gateway or a client: each request ends exactly once, whatever dies behind it.

Everything that decides is in `routing`; here are the clock, the messages and who waits. Requests of one turn of the
event loop to one batcher leave in one message.
"""

import asyncio
import contextlib
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import msgspec

from narsil_stream.core import routing
from narsil_stream.core.actor import now_us, unix_us
from narsil_stream.core.bus import Bus
from narsil_stream.core.config import Config
from narsil_stream.core.routing import Peer, Router
from narsil_stream.core.throttle import Asked, Flow, Throttle, kind
from narsil_stream.core.versions import newness
from narsil_stream.schemas import subjects
from narsil_stream.schemas.codec import UNDECODABLE
from narsil_stream.schemas.errors import Fault, Refused, invalid
from narsil_stream.schemas.internal import Answers, Ask, BatcherBeat, Bundle, Cancel, ModelCard, ModelRef
from narsil_stream.schemas.model import NAME
from narsil_stream.schemas.oip import StatisticsReport
from narsil_stream.schemas.wire import MAX_ID, MAX_TENANT, InferAnswer, InferRequest

log = logging.getLogger(__name__)

OVERLOADED = Fault.OVERLOADED.name

_decode_answers = msgspec.msgpack.Decoder(Answers).decode
_decode_beat = msgspec.msgpack.Decoder(BatcherBeat).decode
_decode_cards = msgspec.json.Decoder(list[ModelCard]).decode
_decode_statistics = msgspec.json.Decoder(StatisticsReport).decode


@dataclass(slots=True, eq=False, kw_only=True)
class Pending(routing.Pending):
    """A request, and who waits for its answer."""

    request: InferRequest
    future: asyncio.Future[InferAnswer]
    flow: Flow

    def left(self) -> bool:
        return self.future.done()


class Requester:
    """One per process and bus. All methods belong to the bus's event loop."""

    def __init__(self, config: Config, bus: Bus) -> None:
        self._bus = bus
        self._limits = config.batch
        self._check_every = config.timing.beat_ms / 1e3
        self._inbox = ""
        self._router: Router[Pending] = Router(bus, now_us())
        self._sending = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_us: int | None = None
        self._checks: asyncio.TimerHandle | None = None
        self._seen = asyncio.Event()
        self._cards: dict[str, ModelCard] = {}
        self._throttle = Throttle()
        self.throttled = 0
        """Requests refused here, because batchers refused most of their kind."""

    @property
    def late(self) -> int:
        """Answers to nobody: the request had ended, or had two answers."""
        return self._router.late

    @property
    def resent(self) -> int:
        return self._router.resent

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
        """Whoever still waits gets UNAVAILABLE; batchers hear that nobody waits for their answers."""
        left: defaultdict[str, list[int]] = defaultdict(list)
        for pending in self._router.end_all():
            left[pending.batcher].append(pending.slot)
            self._fail(pending, Refused(Fault.UNAVAILABLE, "this process is stopping", 1_000))
        for batcher, slots in left.items():
            self._cancel(batcher, slots)
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
        return any(peer.models or peer.unloaded for peer in self._router.alive())

    @property
    def open(self) -> int:
        return len(self._router.pending)

    def models(self) -> tuple[ModelRef, ...]:
        """What is served now, each version once, although its weights may just be changing."""
        refs = {(ref.name, ref.version): ref for peer in self._router.peers.values() if peer.up for ref in peer.models}
        return tuple(refs[key] for key in sorted(refs))

    async def card(self, model: str, version: str = "") -> ModelCard:
        """The description of a served model, the newest version unless one is named. Raises `Refused`."""
        wanted = [
            (newness(ref.version), peer, ref)
            for peer in self._router.alive()
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
        alive = [peer.id for peer in self._router.alive()]
        if not alive:
            raise self._router.nobody()
        replies = await asyncio.gather(*map(self._counted, alive))
        return [report for report in replies if report is not None]

    async def _counted(self, batcher: str) -> StatisticsReport | None:
        try:
            return _decode_statistics(await self._bus.request(subjects.statistics(batcher)))
        except (Refused, *UNDECODABLE) as error:
            log.warning("%s is left out of the statistics: %s", batcher, error)
            return None

    def tune(self, config: Config) -> None:
        """Go on with other limits."""
        self._limits = config.batch

    # Asking

    async def ask(self, model: str, version: str, request: InferRequest) -> InferAnswer:
        """The scores. Raises `Refused` and nothing else; cancelling it withdraws the request."""
        if not NAME.fullmatch(model) or (version and not NAME.fullmatch(version)):
            raise Refused(Fault.NOT_FOUND, f"model {model!r}, version {version!r}: names match {NAME.pattern}")
        _check_lengths(request)
        budget_us = min(request.budget_us or self._limits.default_budget_us, self._limits.max_budget_us)
        now = now_us()
        flow = self._throttle.flow(kind(model, version, request.tenant, request.priority, budget_us), now)
        asked = Asked(now + budget_us, sum(tensor.data.nbytes for tensor in request.inputs))
        try:
            flow.check_said(asked, lambda: self._router.choice(model, version), now)
            flow.check(now)
        except Refused:
            self.throttled += 1
            raise
        future: asyncio.Future[InferAnswer] = asyncio.get_running_loop().create_future()
        pending = Pending(
            slot=self._router.slot(),
            model=model,
            version=version,
            deadline_us=asked.deadline_us,
            nbytes=asked.nbytes,
            request=request,
            future=future,
            flow=flow,
        )
        self._router.add(pending)
        self._send_soon()
        self._set_timer()
        try:
            return await future
        except asyncio.CancelledError:
            self._withdraw(pending)
            raise

    def _send_soon(self) -> None:
        """At the end of this turn, all in one."""
        if not self._sending and self._router.has_outgoing():
            self._sending = True
            asyncio.get_running_loop().call_soon(self._send_outgoing)

    def _send_outgoing(self) -> None:
        self._sending = False
        for batcher, bundle in self._router.outgoing():
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
                self._router.end(pending)
                self._fail(pending, refused)

    # Answers

    def _on_answers(self, message: Answers) -> None:
        now = now_us()
        for slot, answer in zip(message.slots, message.answers, strict=True):
            pending = self._router.answered(slot, message.batcher, answer.fault)
            if pending is None:
                continue
            if answer.fault == OVERLOADED:
                pending.flow.refused(answer.retry_after_us, now)
                if slot in message.by_deadline:
                    asked = Asked(pending.deadline_us, pending.nbytes)
                    pending.flow.said(message.batcher, asked, answer.retry_after_us, now)
            else:
                pending.flow.accepted(now)
            if not pending.future.done():
                pending.future.set_result(answer)
        self._send_soon()

    def _fail(self, pending: Pending, refused: Refused) -> None:
        """Tell the caller of a request that has ended."""
        if not pending.future.done():
            pending.future.set_exception(refused)

    def _fail_all(self, failed: Iterable[tuple[Pending, Refused]]) -> None:
        for pending, refused in failed:
            self._fail(pending, refused)

    def _withdraw(self, pending: Pending) -> None:
        if self._router.end(pending):
            self._cancel(pending.batcher, [pending.slot])

    def _cancel(self, batcher: str, slots: list[int]) -> None:
        try:
            self._bus.send(subjects.ask(batcher), Cancel(self._inbox, tuple(slots)))
        except Refused:
            log.debug("a cancel was not sent: the batcher will find out by the deadline")

    # Time

    def _set_timer(self) -> None:
        due_us = self._router.wake_us()
        if due_us is None or (self._timer_us is not None and self._timer_us <= due_us):
            return  # a timer that fires for a request that has ended is set again then
        if self._timer is not None:
            self._timer.cancel()
        self._timer_us = due_us
        delay = max(0, due_us - now_us()) / 1e6
        self._timer = asyncio.get_running_loop().call_later(delay, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = self._timer_us = None
        self._fail_all(self._router.expired(now_us()))
        self._set_timer()

    # Batchers

    def _on_beat(self, beat: BatcherBeat) -> None:
        self._fail_all(self._router.beat(beat, now_us()))
        self._send_soon()
        self._seen.set()

    def _check_peers(self) -> None:
        for batcher in self._router.silent(now_us()):
            log.warning("%s was silent for too long", batcher)
            self._fail_all(self._router.lose(batcher))
        self._send_soon()
        self._checks = asyncio.get_running_loop().call_later(self._check_every, self._check_peers)

    def _on_lost(self) -> None:
        """The connection broke: requests and answers on their way may be lost, so the callers are told now."""
        for pending in self._router.cut_off():
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


def _check_lengths(request: InferRequest) -> None:
    """Raises INVALID_ARGUMENT for what was made here and nobody could decode: others' requests are in its message."""
    if len(request.id) > MAX_ID:
        raise invalid(f"the request's id has {len(request.id)} characters; expected at most {MAX_ID}")
    if len(request.tenant) > MAX_TENANT:
        raise invalid(f"the tenant's name has {len(request.tenant)} characters; expected at most {MAX_TENANT}")
