"""gRPC's standard health service, for balancers and orchestrators: what `ServerReady` says, under its own protocol."""

import asyncio
from collections.abc import Callable
from typing import Any

from grpc import StatusCode
from grpc_health.v1 import health_pb2, health_pb2_grpc

from narsil_stream.gateways.grpc_stream import Context

WATCH_EVERY_S = 0.05
"""How late news may come to who watches."""

Response = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # it has no types
    """Of the whole server, which is "", and of each of its services, all of which are ready at the same time."""

    def __init__(self, services: tuple[str, ...], ready: Callable[[], bool]) -> None:
        self._services = ("", *services)
        self._ready = ready
        self.ended = False
        """Whoever still watches is let go."""

    def _status(self, service: str) -> Any:
        if service not in self._services:
            return Response.SERVICE_UNKNOWN
        return Response.SERVING if self._ready() else Response.NOT_SERVING

    async def Check(self, request: Any, context: Context) -> Any:
        status = self._status(request.service)
        if status == Response.SERVICE_UNKNOWN:
            await context.abort(StatusCode.NOT_FOUND, f"unknown service; expected one of {', '.join(self._services)}")
        return Response(status=status)

    async def Watch(self, request: Any, context: Context) -> None:
        told = None
        while not self.ended:
            if (status := self._status(request.service)) != told:
                await context.write(Response(status=status))
                told = status
            await asyncio.sleep(WATCH_EVERY_S)
