"""What the other executors serve, for one that joins them under explicit control: it serves the same."""

import asyncio

import msgspec
from msgspec import Struct

from narsil_stream.core.bus import Bus
from narsil_stream.schemas import subjects
from narsil_stream.schemas.internal import ExecutorBeat, ModelRef

_decode_beat = msgspec.msgpack.Decoder(ExecutorBeat).decode


class Served(Struct, frozen=True):
    refs: frozenset[ModelRef]
    unloaded: frozenset[str]
    """Names of models that were unloaded, and not loaded again anywhere."""


class Peers:
    """`own` is the name of the executor that looks."""

    def __init__(self, bus: Bus, own: str, lease_ms: int) -> None:
        self._bus = bus
        self._own = own
        self._lease_s = lease_ms / 1e3

    async def look(self) -> Served:
        """Takes a lease: everybody who is alive has been heard by then."""
        heard: dict[str, ExecutorBeat] = {}

        def on_beat(beat: ExecutorBeat) -> None:
            heard[beat.executor] = beat

        await self._bus.listen(subjects.EXECUTOR_BEAT, on_beat, _decode_beat, owner=self)
        try:
            await self._bus.flush()
            self._bus.signal(subjects.HELLO)
            await asyncio.sleep(self._lease_s)
        finally:
            await self._bus.unsubscribe(subjects.EXECUTOR_BEAT, owner=self)
        beats = [beat for beat in heard.values() if beat.state == "up" and beat.executor != self._own]
        refs = frozenset(ref for beat in beats for ref in beat.models)
        unloaded = {name for beat in beats for name in beat.unloaded}
        return Served(refs, frozenset(unloaded - {ref.name for ref in refs}))
