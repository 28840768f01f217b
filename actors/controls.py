"""What gateways ask an executor about its models: answered when it is done, on subjects of their own."""

import asyncio
import logging

import msgspec

from narsil_stream.actors.shelf import Shelf
from narsil_stream.core.bus import Bus
from narsil_stream.schemas import subjects
from narsil_stream.schemas.errors import Fault, Refused
from narsil_stream.schemas.internal import Control, Done, Look
from narsil_stream.schemas.oip import RepositoryEntry

log = logging.getLogger(__name__)

MOST = 256
"""Questions that are worked on at a time."""

_decode_control = msgspec.msgpack.Decoder(Control).decode
_decode_look = msgspec.msgpack.Decoder(Look).decode


class Controls:
    """Of one executor. `allowed`: whether models may be loaded and unloaded from outside."""

    def __init__(self, bus: Bus, executor: str, shelf: Shelf, allowed: bool) -> None:
        self._bus = bus
        self._executor = executor
        self._shelf = shelf
        self._allowed = allowed
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        await self._bus.listen(subjects.admin(self._executor), self._take, _decode_control, owner=self)
        await self._bus.listen(subjects.repository(self._executor), self._take, _decode_look, owner=self)

    async def stop(self) -> None:
        """Whoever still waits hears by the last heartbeat that this executor is gone."""
        await self._bus.unsubscribe(subjects.admin(self._executor), owner=self)
        await self._bus.unsubscribe(subjects.repository(self._executor), owner=self)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _take(self, message: Control | Look) -> None:
        if subjects.reserved(message.reply):
            log.warning("a question with a reserved reply subject was dropped")
            return
        if len(self._tasks) >= MOST:
            self._say(message, Refused(Fault.OVERLOADED, "too many questions at once", 1_000_000))
            return
        task = asyncio.create_task(self._answer(message), name=f"{self._executor} answers")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, message: Control | Look) -> None:
        try:
            if isinstance(message, Look):
                self._say(message, entries=await self._shelf.index())
                return
            await self._control(message)
            self._say(message)
        except Refused as refused:
            self._say(message, refused)
        except Exception:
            log.exception("a question about models failed")
            self._say(message, Refused(Fault.INTERNAL, "internal error"))

    async def _control(self, control: Control) -> None:
        if not self._allowed:
            detail = "models are neither loaded nor unloaded here; set model_control to explicit to allow it"
            raise Refused(Fault.PERMISSION_DENIED, detail)
        if control.verb == "load":
            await self._shelf.load(control.model)
        else:
            await self._shelf.unload(control.model)

    def _say(
        self, to: Control | Look, refused: Refused | None = None, entries: tuple[RepositoryEntry, ...] = ()
    ) -> None:
        done = Done(self._executor, to.slot, entries=entries)
        if refused is not None:
            done = Done(self._executor, to.slot, refused.fault.name, refused.detail)
        try:
            self._bus.send(to.reply, done)
        except Refused as unsent:
            log.warning("an answer about models was not sent: %s", unsent.detail)
