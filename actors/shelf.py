"""The models of one executor: how they come, are replaced and go while others compute, with no request lost.

A model that comes is offered once it is warm. One that goes is not offered any more, but computes what batchers
admitted before; when they say that nothing waits for it, its memory is freed. New weights under an old name do both.
"""

import asyncio
import contextlib
import logging
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import ParamSpec, TypeVar
from weakref import WeakValueDictionary

from narsil_stream.actors.peers import Served
from narsil_stream.actors.queue import ModelKey
from narsil_stream.actors.repository import Found, Loaded, Loader, Missing, Name, Repository, digest, load
from narsil_stream.core.config import Config
from narsil_stream.kernels.artifact import ArtifactError
from narsil_stream.kernels.backend import Unfit
from narsil_stream.schemas.errors import Fault, Refused
from narsil_stream.schemas.internal import BatcherBeat, ModelRef
from narsil_stream.schemas.oip import RepositoryEntry

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")
Heard = Callable[[], Iterable[BatcherBeat | None]]

KNOWN_LEASES = 2
"""So long a new model waits for batchers to know it before it takes the place of an old one."""


class Shelf:
    """Methods belong to the executor's event loop. Weights are read, warmed up and freed in a thread of their own.

    `announce` lets the next heartbeat go at once; `heard` gives the newest heartbeat of each batcher that is alive.
    """

    def __init__(
        self, config: Config, repository: Repository, loader: Loader, announce: Callable[[], None], heard: Heard
    ) -> None:
        self._config = config
        self._repository = repository
        self._load = loader
        self._announce = announce
        self._heard = heard
        self._lease_s = config.timing.lease_ms / 1e3
        self.offered: dict[ModelKey, Loaded] = {}
        self.retiring: dict[ModelKey, Loaded] = {}
        self.unloaded: set[str] = set()
        """Names that somebody unloaded."""
        self.running: Counter[ModelKey] = Counter()
        """Batches that are being computed."""
        self._states: dict[Name, RepositoryEntry] = {}
        """Of versions that are not, or not yet, offered."""
        self._controlled: set[str] = set()
        """Names that were loaded or unloaded by a control since this executor has started."""
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._waiting: list[tuple[Callable[[], bool], asyncio.Future[None]]] = []
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader")

    # For the executor

    def find(self, key: ModelKey) -> Loaded | None:
        return self.offered.get(key) or self.retiring.get(key)

    def refs(self) -> tuple[ModelRef, ...]:
        return tuple(loaded.ref for loaded in self.offered.values())

    def retiring_refs(self) -> tuple[ModelRef, ...]:
        return tuple(loaded.ref for loaded in self.retiring.values())

    def loaded(self) -> list[Loaded]:
        return [*self.offered.values(), *self.retiring.values()]

    def turn(self) -> None:
        """Wake whoever waits for what has come true."""
        for condition, future in self._waiting:
            if not future.done() and condition():
                future.set_result(None)

    async def start(self, names: Collection[str] | None, peers: Served | None) -> None:
        """Load what is to be served at first. Raises ArtifactError when that cannot be."""
        must, rest = await self._in_thread(self._repository.at_start, names)
        if peers is not None:
            self.unloaded |= peers.unloaded
            others = self.unloaded | {ref.name for ref in peers.refs}  # those in the versions that they serve
            must = [found for found in must if found.spec.name not in others]
            rest = [found for found in rest if found.spec.name not in others]
        for found in must:
            await self._put(found)
        for found in rest:
            with contextlib.suppress(Exception):  # said in the log and in the index
                await self._put(found)
        if peers is not None:
            await self._add(peers.refs)
        elif not self.offered:
            raise ArtifactError("the model repository", "no model that can be served", "one at least", "put one there")

    async def follow(self, peers: Served) -> None:
        """Serve what the others do, if it was loaded or unloaded while this executor started."""
        have = {(ref.name, ref.version) for ref in self.refs()}
        await self._add(ref for ref in peers.refs if (ref.name, ref.version) not in have)
        for name in peers.unloaded - self.unloaded:
            async with self._lock(name):
                if name not in self._controlled:
                    await self._drop(name)

    async def stop(self) -> None:
        """Free everything. No batch is being computed any more."""
        self._thread.shutdown(wait=False, cancel_futures=True)

        def free() -> None:
            self._thread.shutdown(wait=True)
            for loaded in self.loaded():
                loaded.backend.unload()

        await asyncio.to_thread(free)

    # Controls

    async def load(self, model: str) -> None:
        """Serve the newest version as the repository has it now, and no other. Raises `Refused`."""
        async with self._lock(model):
            self._controlled.add(model)
            try:
                found = await asyncio.to_thread(self._repository.find, model)
                ref = await self._put(found)
            except Missing as error:
                raise Refused(Fault.NOT_FOUND, str(error)) from None
            except (ArtifactError, Unfit) as error:
                detail = f"model '{model}' could not be loaded: {self._repository.plain(error)}"
                raise Refused(Fault.INTERNAL, detail) from None
            except Exception as error:
                raise Refused(Fault.INTERNAL, f"model '{model}' could not be loaded: {_kind(error)}") from None
            self.unloaded.discard(model)
            await self._until(lambda: self._is_known(ref), KNOWN_LEASES * self._lease_s)
            await self._retire([key for key in self.offered if key.name == model and key.digest != ref.digest])

    async def unload(self, model: str) -> None:
        """Serve no version of it; returns when its memory is free. Raises `Refused` NOT_FOUND."""
        async with self._lock(model):
            if not any(key.name == model for key in self.offered):
                try:
                    await asyncio.to_thread(self._repository.find, model)
                except Missing as error:
                    raise Refused(Fault.NOT_FOUND, str(error)) from None
                except ArtifactError:
                    log.info("model %s, which is to be unloaded, is damaged and not loaded", model)
            self._controlled.add(model)
            await self._drop(model)

    async def index(self) -> tuple[RepositoryEntry, ...]:
        """Every version in the repository or in memory. Raises `Refused` when the folder cannot be read."""
        try:
            listing = await asyncio.to_thread(self._repository.look)
        except ArtifactError as error:
            raise Refused(Fault.INTERNAL, self._repository.plain(error)) from None
        entries = {name: RepositoryEntry(*name, "UNAVAILABLE") for name in listing.found}
        for name, entry in list(self._states.items()):
            if name in entries or entry.state != "UNAVAILABLE":
                entries[name] = entry
            else:
                del self._states[name]
        for name, damage in listing.damaged.items():
            entries[name] = RepositoryEntry(*name, "UNAVAILABLE", self._repository.plain(damage))
        for ref in self.refs():
            entries[ref.name, ref.version] = RepositoryEntry(ref.name, ref.version, "READY")
        return tuple(entries.values())

    # Steps

    async def _put(self, found: Found) -> ModelRef:
        """Load it and offer it, unless these very weights are offered already. Raises ArtifactError."""
        if (same := self._same(found)) is not None:
            return same
        self._states[found.name] = RepositoryEntry(*found.name, "LOADING")
        try:
            loaded = await self._in_thread(load, found, self._load, self._config.batch.max_rows)
        except (ArtifactError, Unfit) as error:
            log.error("model %s version %s was not loaded: %s", *found.name, error)
            self._states[found.name] = RepositoryEntry(*found.name, "UNAVAILABLE", self._repository.plain(error))
            raise
        except Exception as error:
            log.exception("model %s version %s was not loaded", *found.name)
            self._states[found.name] = RepositoryEntry(*found.name, "UNAVAILABLE", _kind(error))
            raise
        except BaseException:
            del self._states[found.name]
            raise
        del self._states[found.name]
        self.offered[_key(loaded.ref)] = loaded
        self._announce()
        log.info("loaded model %s", loaded)
        return loaded.ref

    def _same(self, found: Found) -> ModelRef | None:
        try:
            return next((ref for ref in self.refs() if ref == ModelRef(*found.name, digest(found.folder))), None)
        except OSError:
            return None

    async def _add(self, refs: Iterable[ModelRef]) -> None:
        """Serve what others do, beside what is served here."""
        for ref in sorted(refs, key=lambda ref: (ref.name, ref.version)):
            async with self._lock(ref.name):
                if ref.name in self._controlled:
                    continue
                try:
                    found = await asyncio.to_thread(self._repository.find, ref.name, ref.version)
                    own = await self._put(found)
                except Exception as error:
                    log.error("others serve model %s version %s, this one cannot: %s", ref.name, ref.version, error)
                    continue
                if own != ref:
                    log.warning("others serve model %s version %s with other weights", ref.name, ref.version)

    async def _drop(self, model: str) -> None:
        self.unloaded.add(model)
        await self._retire([key for key in self.offered if key.name == model])

    async def _retire(self, keys: list[ModelKey]) -> None:
        """Offer these no more, compute what waits for them, free them."""
        for key in keys:
            self.retiring[key] = self.offered.pop(key)
        for name in {(key.name, key.version) for key in keys} - {(ref.name, ref.version) for ref in self.refs()}:
            self._states[name] = RepositoryEntry(*name, "UNLOADING")
        self._announce()
        if not keys:
            return
        await asyncio.sleep(self._lease_s)  # every batcher that is alive has heard of it by then
        before = list(self._heard())
        await self._until(lambda: not self._awaited(keys, before))
        gone = [self.retiring.pop(key) for key in keys]
        self._announce()
        await self._until(lambda: not any(self.running[key] for key in keys))
        for loaded in gone:
            await self._in_thread(loaded.backend.unload)
        for key in keys:
            del self.running[key]
            log.info("unloaded model %s version %s (%s)", *key)
            if (state := self._states.get((key.name, key.version))) is not None and state.state == "UNLOADING":
                self._states[key.name, key.version] = RepositoryEntry(*key[:2], "UNAVAILABLE", "unloaded")

    # What batchers say

    def _is_known(self, ref: ModelRef) -> bool:
        return all(beat is not None and ref in beat.models for beat in self._heard())

    def _awaited(self, keys: list[ModelKey], before: list[BatcherBeat | None]) -> bool:
        """Whether requests wait for these somewhere, or a batcher has said nothing since these heartbeats."""
        digests = {key.digest for key in keys}
        return any(
            any(beat is old for old in before) or not digests.isdisjoint(beat.finishing)
            for beat in self._heard()
            if beat is not None
        )

    async def _until(self, condition: Callable[[], bool], timeout_s: float | None = None) -> None:
        """Returns when it holds after a turn of the executor, or after that time."""
        if condition():
            return
        waiting = condition, asyncio.get_running_loop().create_future()
        self._waiting.append(waiting)
        try:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(waiting[1], timeout_s)
        finally:
            self._waiting.remove(waiting)

    # Helpers

    def _lock(self, model: str) -> asyncio.Lock:
        """One for each name, for as long as somebody holds or wants it."""
        return self._locks.setdefault(model, asyncio.Lock())

    async def _in_thread(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, partial(work, *args, **kwargs))


def _kind(error: Exception) -> str:
    """What may be said of an error of the backend's: it may name anything."""
    return f"the backend failed with {type(error).__name__}"


def _key(ref: ModelRef) -> ModelKey:
    return ModelKey(ref.name, ref.version, ref.digest)
