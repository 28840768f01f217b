"""The gRPC gateway: Open Inference Protocol v2 in, one call to a batcher, the answer out. Nothing is decided here."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
from grpc import aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from grpc_reflection.v1alpha.reflection import ReflectionServicer

from narsil_stream.core.bus import Bus
from narsil_stream.core.config import Config, GrpcConfig
from narsil_stream.core.ports import address, reserve
from narsil_stream.core.telemetry import gauges
from narsil_stream.gateways.door import Door
from narsil_stream.gateways.grpc_codec import parsed, serialized, to_response, to_stream_response
from narsil_stream.gateways.grpc_health import Health
from narsil_stream.gateways.grpc_stream import Context, InferStream
from narsil_stream.gateways.grpc_verbs import VERBS, Run, Verbs, abort
from narsil_stream.gateways.inference import TENANT
from narsil_stream.gateways.tls import grpc_credentials
from narsil_stream.schemas import codec
from narsil_stream.schemas.errors import Fault, Refused
from narsil_stream.schemas.protobuf import POOL, SERVICE, message_class
from narsil_stream.schemas.wire import InferAnswer

log = logging.getLogger(__name__)

PARALLEL = 8_192
"""Calls that one gateway process works on at a time; more are refused as RESOURCE_EXHAUSTED."""
PING_TIMEOUT_MS = 10_000
"""A connection whose ping is not answered for this long is closed."""
FASTEST_PINGS_MS = 5_000
"""Clients may ping an idle connection this often; gRPC's own limit of five minutes cuts those that do every minute."""
LAST_WORDS_S = 0.5
"""At the end, for answers on their way to the socket."""


class GrpcGateway(Door):
    """One process's share of the gRPC port. There may be one event loop with gRPC in a process."""

    scheme = "grpc"

    def __init__(self, config: Config, bus: Bus, share_port: bool = False) -> None:
        super().__init__(config, bus, config.grpc, share_port)
        self._verbs = Verbs(config, self._inference)
        self._health = Health((SERVICE.full_name,), lambda: self._inference.ready)
        self._streams: set[InferStream] = set()
        self._server: aio.Server | None = None
        gauges(
            self.registry,
            narsil_requests_open=("Requests being worked on", lambda: self._verbs.open),
            narsil_streams_open=("ModelStreamInfer calls", lambda: len(self._streams)),
        )

    # Life

    async def start(self) -> None:
        await self._inference.start()
        where = self._config.grpc
        self._server = aio.server(options=_options(where), maximum_concurrent_rpcs=PARALLEL)
        self._server.add_generic_rpc_handlers((self._handlers(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection_pb2_grpc.add_ServerReflectionServicer_to_server(
            ReflectionServicer(SERVICES, pool=POOL), self._server
        )
        with reserve(where.host, where.port, "grpc.port", share=self._share_port) as self.port:
            self._open_port(self._server, address(where.host, self.port))
            await self._server.start()
        await self._inference.wait_ready(1.0)

    def _open_port(self, server: aio.Server, where: str) -> None:
        if (credentials := grpc_credentials(self._config.access)) is not None:
            server.add_secure_port(where, credentials)
        else:
            server.add_insecure_port(where)

    async def drain(self) -> None:
        """Not ready from now on; turn newcomers away once callers had a moment to notice; finish what is open.

        grpc.aio itself turns away, as CANCELLED, what it has not begun when it stops: nothing should wait by then.
        """
        self._inference.closing = True
        await asyncio.sleep(self._config.timing.notice_ms / 1e3)
        self._health.ended = True
        for stream in self._streams:
            stream.end()
        await self._inference.turn_away()
        if self._server is not None:
            await self._server.stop(self._config.timing.drain_ms / 1e3)

    async def stop(self) -> None:
        """Who still waits gets UNAVAILABLE."""
        self._inference.closing = True
        self._health.ended = True
        server, self._server = self._server, None
        stopping = asyncio.create_task(server.stop(LAST_WORDS_S)) if server is not None else None
        await self._inference.stop()
        if stopping is not None:
            await stopping

    # Calls. Messages come and go as bytes: what cannot be decoded is answered by the error table.

    def _handlers(self) -> grpc.GenericRpcHandler:
        handlers = {
            "ModelInfer": grpc.unary_unary_rpc_method_handler(self._infer),
            "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(self._stream_infer),
        }
        for method in SERVICE.methods:
            if method.name in VERBS:
                handlers[method.name] = grpc.unary_unary_rpc_method_handler(
                    self._unary(method.name, VERBS[method.name], message_class(method.input_type.name))
                )
        return grpc.method_handlers_generic_handler(SERVICE.full_name, handlers)

    def _check(self, verb: str, context: Context) -> str:
        """The tenant: whose token it is or, where none is needed, whom the metadata names. Raises `Refused`."""
        if self._access.reads_tokens:
            return self._access.check(_said(context, "authorization"), verb)
        return self._access.check(None, verb) or _said(context, TENANT) or ""

    async def _infer(self, data: bytes, context: Context) -> bytes:
        try:
            tenant = self._check("ModelInfer", context)
        except Refused as refused:
            await abort(context, refused)
        answer = await self._answer(data, context, tenant)
        if answer.fault:
            await abort(context, codec.refusal(answer))
        return serialized(to_response(answer))

    async def _stream_infer(self, _: object, context: Context) -> None:
        async def answered(data: bytes) -> bytes:
            try:
                tenant = self._check("ModelStreamInfer", context)  # a token may be taken back while its stream is open
            except Refused as refused:
                answer = InferAnswer("", fault=refused.fault.name, detail=refused.detail)
            else:
                answer = await self._answer(data, context, tenant)
            return serialized(to_stream_response(answer))

        try:
            self._check("ModelStreamInfer", context)
        except Refused as refused:
            await abort(context, refused)
        stream = InferStream(context, answered)
        self._streams.add(stream)
        try:
            await stream.run()
        finally:
            self._streams.discard(stream)
        if stream.cut:
            await abort(context, Refused(Fault.UNAVAILABLE, "this process is stopping; open another stream", 1_000))

    async def _answer(self, data: bytes, context: Context, tenant: str) -> InferAnswer:
        try:
            return await self._verbs.infer(data, context.time_remaining(), tenant)
        except Exception:
            log.exception("an infer request failed")
            return InferAnswer("", fault=Fault.INTERNAL.name, detail="internal error")

    def _unary(self, name: str, run: Run, kind: Any) -> Callable[[bytes, Context], Awaitable[bytes]]:
        async def handle(data: bytes, context: Context) -> bytes:
            try:
                self._check(name, context)
                return serialized(await run(self._verbs, parsed(kind, data)))
            except Refused as error:
                refused = error
            except Exception:
                log.exception("a call of %s failed", kind.DESCRIPTOR.name)
                refused = Refused(Fault.INTERNAL, "internal error")
            await abort(context, refused)
            raise AssertionError("an aborted call went on")

        return handle


def _said(context: Context, name: str) -> str | None:
    given = next((value for key, value in context.invocation_metadata() or () if key == name), None)
    return given if isinstance(given, str) else None


def _options(config: GrpcConfig) -> list[tuple[str, int]]:
    return [
        ("grpc.so_reuseport", 1),  # `reserve` holds the port while the server binds it
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_concurrent_streams", config.max_streams),
        ("grpc.keepalive_time_ms", config.keepalive_ms),
        ("grpc.keepalive_timeout_ms", min(PING_TIMEOUT_MS, config.keepalive_ms)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", FASTEST_PINGS_MS),
    ]


def _described(module: Any, service: str) -> str:
    """The full name of another's service, once our pool knows it too: reflection tells what is in there."""
    POOL.AddSerializedFile(module.DESCRIPTOR.serialized_pb)
    return str(module.DESCRIPTOR.services_by_name[service].full_name)


SERVICES = (SERVICE.full_name, _described(health_pb2, "Health"), _described(reflection_pb2, "ServerReflection"))
"""What reflection lists."""
