"""Which models the executors offer, and the checks for each: learnt from heartbeats and asked for once."""

import asyncio
import logging
from collections.abc import Callable, Collection, Iterable
from typing import Protocol

import msgspec
from msgspec import Struct

from narsil_stream.actors.queue import ModelKey
from narsil_stream.core.admission import Admission
from narsil_stream.core.bus import Bus
from narsil_stream.core.versions import newness
from narsil_stream.schemas import subjects
from narsil_stream.schemas.errors import Fault, Refused
from narsil_stream.schemas.internal import ExecutorBeat, ModelCard, ModelRef
from narsil_stream.schemas.model import ModelSpec

log = logging.getLogger(__name__)

_decode_cards = msgspec.json.Decoder(list[ModelCard]).decode


class Described(Struct, frozen=True):
    """What an executor said of its models."""

    cards: list[ModelCard]


class Serving(Protocol):
    """The policy's view of an executor."""

    up: bool
    models: frozenset[ModelKey]


class Entry(Struct, frozen=True):
    card: ModelCard
    admission: Admission


class Catalogue:
    """Executors that call different weights by one name and version are not mixed: the first known one counts."""

    def __init__(self, bus: Bus, tell: Callable[[Described], None]) -> None:
        self._bus = bus
        self._tell = tell
        self._cards: dict[str, ModelCard] = {}
        self._offered: dict[str, tuple[ModelRef, ...]] = {}
        self._entries: dict[ModelKey, Entry] = {}
        self._versions: dict[str, list[ModelKey]] = {}
        """Of each model, the newest first."""
        self._asking: dict[str, asyncio.Task[None]] = {}

    def known_only(self, beat: ExecutorBeat) -> ExecutorBeat:
        """The beat with those models alone that can be served; unknown ones are asked for."""
        if beat.state == "gone":
            self._offered.pop(beat.executor, None)
            return beat
        self._offered[beat.executor] = beat.models
        if any(ref.digest not in self._cards for ref in beat.models):
            self._ask(beat.executor)
        known = tuple(ref for ref in beat.models if self._fits(ref))
        return beat if len(known) == len(beat.models) else msgspec.structs.replace(beat, models=known)

    def add(self, described: Described) -> None:
        for card in described.cards:
            self._cards[card.digest] = card

    def keep(self, executors: Collection[str]) -> None:
        """Forget the offers of executors that are not heard any more."""
        if len(self._offered) > len(executors):
            self._offered = {name: refs for name, refs in self._offered.items() if name in executors}

    def find(self, model: str, version: str, executors: Collection[Serving]) -> tuple[ModelKey, Admission]:
        """The newest version that is served now, unless one is named. Raises `Refused` NOT_FOUND or UNAVAILABLE."""
        key = ModelKey(model, version) if version else self._newest(model, executors)
        entry = self._entries.get(key) if key is not None else None
        if key is not None and entry is not None:
            return key, entry.admission
        if not executors or self._asking or not self._entries:
            raise Refused(Fault.UNAVAILABLE, "no executor is alive", 500_000)
        served = ", ".join(f"'{k.name}' version {k.version}" for k in sorted(self._entries)) or "none"
        wanted = f"'{model}'" + (f" version '{version}'" if version else "")
        raise Refused(Fault.NOT_FOUND, f"model {wanted} is not served here; served: {served}")

    def _newest(self, model: str, executors: Collection[Serving]) -> ModelKey | None:
        versions = self._versions.get(model, [])
        served = (key for key in versions if any(e.up and key in e.models for e in executors))
        return next(served, versions[0] if versions else None)

    def spec(self, key: ModelKey) -> ModelSpec:
        return self._entries[key].card.spec

    def digest(self, key: ModelKey) -> str:
        return self._entries[key].card.digest

    def served(self, executors: Iterable[Serving]) -> tuple[ModelRef, ...]:
        """What some live executor serves now; of each model the newest version last."""
        keys = {key for executor in executors if executor.up for key in executor.models}
        in_order = sorted(keys, key=lambda key: (key.name, newness(key.version)))
        return tuple(ModelRef(k.name, k.version, self.digest(k)) for k in in_order if k in self._entries)

    def described(self) -> bytes:
        """What the executors said, for gateways and clients."""
        return msgspec.json.encode([entry.card for entry in self._entries.values()])

    def stop(self) -> None:
        for task in self._asking.values():
            task.cancel()

    def _fits(self, ref: ModelRef) -> bool:
        """Whether this is the model that goes by its name and version here."""
        card = self._cards.get(ref.digest)
        if card is None:
            return False
        key = ModelKey(ref.name, ref.version)
        entry = self._entries.get(key)
        if entry is None or (entry.card.digest != ref.digest and not self._offers(entry.card.digest)):
            entry = self._entries[key] = Entry(card, Admission(card.spec))
            versions = [k for k in self._entries if k.name == ref.name]
            self._versions[ref.name] = sorted(versions, key=lambda k: newness(k.version), reverse=True)
            log.info("serving model %s version %s", ref.name, ref.version)
        return entry.card.digest == ref.digest

    def _offers(self, digest: str) -> bool:
        return any(ref.digest == digest for refs in self._offered.values() for ref in refs)

    def _ask(self, executor: str) -> None:
        if executor not in self._asking:
            self._asking[executor] = asyncio.create_task(self._describe(executor), name=f"describe {executor}")

    async def _describe(self, executor: str) -> None:
        try:
            self._tell(Described(_decode_cards(await self._bus.request(subjects.describe(executor)))))
        except (Refused, msgspec.MsgspecError) as error:
            log.warning("%s did not describe its models: %s", executor, error)
        finally:
            del self._asking[executor]
