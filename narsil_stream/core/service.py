"""NATS's service API for actors: `nats micro ping|info|stats` sees them. The message types are nats-py's own."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from nats.aio.msg import Msg
from nats.micro.service import (
    EndpointInfo,
    EndpointStats,
    ServiceInfo,
    ServicePing,
    ServiceStats,
    ServiceVerb,
    control_subject,
)

from narsil_stream import __version__
from narsil_stream.core.bus import Bus

PREFIX = "$SRV"


def controls(verb: ServiceVerb, kind: str, actor: str) -> tuple[str, str, str]:
    """The subjects on which an actor is asked `verb`: together with all services, with its kind, and alone."""
    name = f"narsil-{kind}"
    return (
        control_subject(verb, prefix=PREFIX),
        control_subject(verb, name, prefix=PREFIX),
        control_subject(verb, name, actor, PREFIX),
    )


class ServiceApi:
    """Answers PING, INFO and STATS for one actor. All of a kind share a service name, e.g. `narsil-batcher`."""

    def __init__(self, bus: Bus, kind: str, actor: str, endpoints: Callable[[], list[EndpointStats]]) -> None:
        self._bus = bus
        self._identity: dict[str, Any] = {"name": f"narsil-{kind}", "id": actor, "version": __version__, "metadata": {}}
        self._endpoints = endpoints
        self._started = datetime.now(UTC).replace(tzinfo=None)
        answers = {ServiceVerb.PING: self._ping, ServiceVerb.INFO: self._info, ServiceVerb.STATS: self._stats}
        self._answers: dict[str, Callable[[], dict[str, Any]]] = {
            subject: answer for verb, answer in answers.items() for subject in controls(verb, kind, actor)
        }

    async def start(self) -> None:
        for subject in self._answers:
            await self._bus.subscribe(subject, self._on_message, owner=self)

    async def stop(self) -> None:
        await asyncio.gather(*(self._bus.unsubscribe(subject, owner=self) for subject in self._answers))

    def _on_message(self, message: Msg) -> None:
        if message.reply:
            self._bus.publish(message.reply, json.dumps(self._answers[message.subject]()).encode())

    def _ping(self) -> dict[str, Any]:
        ping: dict[str, Any] = ServicePing(**self._identity).to_dict()
        return ping

    def _info(self) -> dict[str, Any]:
        endpoints = [EndpointInfo(e.name, e.subject, e.queue_group, {}) for e in self._endpoints()]
        description = f"narsil-stream {self._identity['name'].removeprefix('narsil-')}"
        info: dict[str, Any] = ServiceInfo(**self._identity, description=description, endpoints=endpoints).to_dict()
        return info

    def _stats(self) -> dict[str, Any]:
        endpoints = [
            replace(e, average_processing_time=e.processing_time // max(1, e.num_requests)) for e in self._endpoints()
        ]
        stats: dict[str, Any] = ServiceStats(**self._identity, started=self._started, endpoints=endpoints).to_dict()
        return stats
