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
from narsil_stream.schemas.codec import UNDECODABLE
from narsil_stream.schemas.errors import Fault, Refused
from narsil_stream.schemas.internal import ExecutorBeat, ModelCard, ModelRef

log = logging.getLogger(__name__)

_decode_cards = msgspec.json.Decoder(list[ModelCard]).decode


class Described(Struct, frozen=True):
    """What an executor said of its models."""

    cards: list[ModelCard]


class Serving(Protocol):
    """The policy's view of an executor."""

    up: bool
    offers: frozenset[ModelKey]


class Entry(Struct, frozen=True):
    card: ModelCard
    admission: Admission


class Catalogue:
    """Executors may call different weights by one name and version, as they do while these are replaced: requests are
    then admitted for those that were known first, as long as somebody offers them.
    """

    def __init__(self, bus: Bus, tell: Callable[[Described], None]) -> None:
        self._bus = bus
        self._tell = tell
        self._cards: dict[str, ModelCard] = {}
        self._offered: dict[str, tuple[ModelRef, ...]] = {}
        self._entries: dict[ModelKey, Entry] = {}
        """In the order in which they became known."""
        self._versions: dict[str, list[ModelKey]] = {}
        """Of each model that is not withdrawn, the newest version first."""
        self._found: dict[tuple[str, str], tuple[ModelKey, Admission]] = {}
        """What `find` said since somebody was last heard, or the fleet was last looked through."""
        self.withdrawn: set[ModelKey] = set()
        """No executor offers them any more, on purpose; requests may still wait for them."""
        self._asking: dict[str, asyncio.Task[None]] = {}
        self.changed = False
        """Set when there is more or less on offer than before."""

    def known_only(self, beat: ExecutorBeat) -> ExecutorBeat:
        """The beat with those models alone that can be served; unknown ones are asked for."""
        self._found.clear()
        if beat.state == "gone":
            self._offered.pop(beat.executor, None)
            return beat
        before = self._offered.get(beat.executor)
        self._offered[beat.executor] = beat.models
        if before != beat.models:
            self.changed = True
            self._withdraw(before or ())
        if any(ref.digest not in self._cards for ref in beat.models):
            self._ask(beat.executor)
        models = tuple(ref for ref in beat.models if self._enter(ref))
        retiring = tuple(ref for ref in beat.retiring if _key(ref) in self._entries)
        if len(models) == len(beat.models) and len(retiring) == len(beat.retiring):
            return beat
        return msgspec.structs.replace(beat, models=models, retiring=retiring)

    def add(self, described: Described) -> None:
        for card in described.cards:
            self._cards[card.digest] = card

    def keep(self, executors: Collection[str]) -> None:
        """Forget the offers of executors that are not heard any more. To be called once in each turn."""
        self._found.clear()
        if len(self._offered) > len(executors):
            self._offered = {name: refs for name, refs in self._offered.items() if name in executors}

    def forget(self, finishing: Collection[ModelKey]) -> list[ModelKey]:
        """Drop withdrawn models that nothing waits for any more, and return them."""
        gone = [key for key in self.withdrawn if key not in finishing]
        for key in gone:
            self.withdrawn.remove(key)
            del self._entries[key]
            self._cards.pop(key.digest, None)
        return gone

    def find(self, model: str, version: str, executors: Collection[Serving]) -> tuple[ModelKey, Admission]:
        """The newest version that is served now, unless one is named. Raises `Refused` NOT_FOUND or UNAVAILABLE."""
        found = self._found.get((model, version))
        if found is None:
            found = self._found[model, version] = self._look_up(model, version, executors)
        return found

    def _look_up(self, model: str, version: str, executors: Collection[Serving]) -> tuple[ModelKey, Admission]:
        keys = [key for key in self._versions.get(model, ()) if version in ("", key.version)]
        served = (key for key in keys if any(e.up and key in e.offers for e in executors))
        key = next(served, keys[0] if keys else None)
        if key is not None:
            return key, self._entries[key].admission
        if not executors or any(_key(ref) not in self._entries for refs in self._offered.values() for ref in refs):
            raise Refused(Fault.UNAVAILABLE, "no executor is alive", 500_000)
        known = sorted({(key.name, key.version) for keys in self._versions.values() for key in keys})
        names = ", ".join(f"'{name}' version {of}" for name, of in known) or "none"
        wanted = f"'{model}'" + (f" version '{version}'" if version else "")
        raise Refused(Fault.NOT_FOUND, f"model {wanted} is not served here; served: {names}")

    def admission(self, key: ModelKey) -> Admission:
        return self._entries[key].admission

    def served(self, executors: Iterable[Serving]) -> tuple[ModelRef, ...]:
        """What some live executor offers now; of each model the newest version last."""
        keys = {key for executor in executors if executor.up for key in executor.offers}
        in_order = sorted(keys, key=lambda key: (key.name, newness(key.version), key.digest))
        return tuple(ModelRef(*key) for key in in_order if key in self._entries)

    def unloaded(self) -> bool:
        """Executors are alive, and none of them offers a model."""
        return bool(self._offered) and not any(self._offered.values())

    def described(self) -> bytes:
        """What the executors said, for gateways and clients."""
        return msgspec.json.encode([entry.card for entry in self._entries.values()])

    def stop(self) -> None:
        for task in self._asking.values():
            task.cancel()

    def _enter(self, ref: ModelRef) -> bool:
        """Whether the model is known here, now at the latest."""
        key = _key(ref)
        if key not in self._entries:
            card = self._cards.get(ref.digest)
            if card is None:
                return False
            self._entries[key] = Entry(card, Admission(card.spec, card.takes_bags))
            log.info("serving model %s version %s", ref.name, ref.version)
        elif key not in self.withdrawn:
            return True
        self.withdrawn.discard(key)
        self.changed = True
        self._sort(ref.name)
        return True

    def _withdraw(self, refs: Iterable[ModelRef]) -> None:
        """An executor that lives on offered these until now."""
        for key in map(_key, refs):
            if key in self._entries and not any(key == _key(ref) for refs in self._offered.values() for ref in refs):
                self.withdrawn.add(key)
                self._sort(key.name)
                log.info("no executor offers model %s version %s any more", key.name, key.version)

    def _sort(self, model: str) -> None:
        keys = [key for key in self._entries if key.name == model and key not in self.withdrawn]
        self._versions[model] = sorted(keys, key=lambda key: newness(key.version), reverse=True)
        if not keys:
            del self._versions[model]

    def _ask(self, executor: str) -> None:
        if executor not in self._asking:
            self._asking[executor] = asyncio.create_task(self._describe(executor), name=f"describe {executor}")

    async def _describe(self, executor: str) -> None:
        try:
            self._tell(Described(_decode_cards(await self._bus.request(subjects.describe(executor)))))
        except (Refused, *UNDECODABLE) as error:
            log.warning("%s did not describe its models: %s", executor, error)
        finally:
            del self._asking[executor]


def _key(ref: ModelRef) -> ModelKey:
    return ModelKey(ref.name, ref.version, ref.digest)
