"""Live settings of one process: changed by administrators over the broker, and the same for who starts later."""

import asyncio
import logging
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
from nats.aio.msg import Msg

from narsil_stream.core.actor import Actor, unix_us
from narsil_stream.core.bus import Bus
from narsil_stream.core.config import Config, ConfigError, changed
from narsil_stream.core.config.settings import settings
from narsil_stream.schemas import subjects
from narsil_stream.schemas.errors import Fault, Refused
from narsil_stream.schemas.internal import Tune, Tuned

log = logging.getLogger(__name__)

ALL = "all"
SOURCE = "narsil tune"
AHEAD_US = 5_000_000
"""By so much clocks may differ."""

_decode_tune = msgspec.json.Decoder(Tune).decode
_decode_tuned = msgspec.json.Decoder(Tuned).decode

Value = str | int | float | bool


class Tuning:
    """Of the actors of one process. What was configured counts again once no process remembers anything else."""

    def __init__(self, bus: Bus, configured: Config, actors: Callable[[], list[Actor[Any]]]) -> None:
        self._bus = bus
        self._configured = configured
        self._actors = actors
        self._set: dict[str, Value] = {}
        self._at_us = 0
        self._catching_up: asyncio.Task[None] | None = None
        self.config = configured
        """What is in force."""

    async def start(self) -> None:
        """Once. Others may know of changes that were made before: asked for here, and after each break."""
        if self._catching_up is not None:
            return
        await self._bus.subscribe(subjects.TUNE, self._on_tune, owner=self)
        await self._bus.subscribe(subjects.TUNED, self._on_look, owner=self)
        self._bus.on_back.append(self._catch_up)
        self._catch_up()

    async def stop(self) -> None:
        if self._catching_up is None:
            return
        self._bus.on_back.remove(self._catch_up)
        self._catching_up.cancel()
        await asyncio.gather(self._catching_up, return_exceptions=True)
        await asyncio.gather(*(self._bus.unsubscribe(one, owner=self) for one in (subjects.TUNE, subjects.TUNED)))

    def _catch_up(self) -> None:
        self._catching_up = asyncio.create_task(self._ask_others(), name="tuning")

    async def _ask_others(self) -> None:
        try:
            others = _decode_tuned(await self._bus.request(subjects.TUNED))
        except (Refused, msgspec.MsgspecError):
            return  # nobody is there
        if others.at_us > self._at_us:
            try:
                self._apply(others.set, others.at_us)
            except ConfigError as error:
                log.warning("what others were told does not fit here: %s", error)

    def _on_look(self, message: Msg) -> None:
        if self._at_us and message.reply and not subjects.reserved(message.reply):  # who knows of none says nothing
            self._bus.publish(message.reply, msgspec.json.encode(self._state()))

    def _on_tune(self, message: Msg) -> None:
        state = self._told(message.data)
        if message.reply and not subjects.reserved(message.reply):
            self._bus.publish(message.reply, msgspec.json.encode(state))

    def _told(self, payload: bytes) -> Tuned:
        try:
            tune = _decode_tune(payload or b"{}")
            if tune.set or tune.reset:
                self._change(tune)
        except (msgspec.MsgspecError, ValueError, RecursionError, ConfigError) as error:
            return msgspec.structs.replace(self._state(), fault=Fault.INVALID_ARGUMENT.name, detail=str(error))
        return self._state()

    def _change(self, tune: Tune) -> None:
        now = unix_us()
        at_us = tune.at_us or now
        if at_us > now + AHEAD_US:  # no later change would count
            raise ConfigError(f"a change of {at_us - now} us ahead of this machine's clock: set the clocks alike")
        if at_us < self._at_us:
            raise ConfigError("a change that was sent later is in force")
        kept = {} if ALL in tune.reset else {key: value for key, value in self._set.items() if key not in tune.reset}
        if unknown := set(tune.reset) - {ALL, *_live()}:
            raise ConfigError(f"no live setting is called {', '.join(sorted(unknown))}")
        self._apply(kept | tune.set, at_us)

    def _apply(self, values: dict[str, Value], at_us: int) -> None:
        """All of them or none. Raises `ConfigError`."""
        config = changed(self._configured, values, SOURCE)
        if config.batch.max_rows > (prepared := self._configured.batch.max_rows):
            raise ConfigError(f"batch.max_rows: executors prepared for batches of up to {prepared} rows at their start")
        before, self.config, self._at_us = self.config, config, at_us
        self._set = {key: settings()[key].of(config) for key in values}
        for actor in self._actors():
            actor.tune(config)
        for key, old, new in _differences(before, config):
            log.info("%s is %s now, and was %s", key, new, old)

    def _state(self) -> Tuned:
        names = tuple(actor.name for actor in self._actors() if actor.tunable)
        return Tuned(names, dict(_live_values(self.config)), self._set, self._at_us)


def _live() -> list[str]:
    return [setting.key for setting in settings().values() if setting.live]


def _live_values(config: Config) -> Iterator[tuple[str, Value]]:
    return ((key, settings()[key].of(config)) for key in _live())


def _differences(before: Config, after: Config) -> Iterator[tuple[str, Value, Value]]:
    for (key, old), (_, new) in zip(_live_values(before), _live_values(after), strict=True):
        if old != new:
            yield key, old, new
