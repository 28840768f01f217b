"""The HTTP gateway: Open Inference Protocol v2 in, one call to a batcher, the answer out. Nothing is decided here."""

import asyncio
import contextlib
import logging
import tempfile
from http import HTTPStatus
from pathlib import Path

from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings, HTTP2Settings
from granian.rsgi import HTTPProtocol, ProtocolClosed, Scope
from granian.server.embed import Server

from narsil_stream.core.bus import Bus
from narsil_stream.core.config import Config
from narsil_stream.core.ports import reserve
from narsil_stream.core.telemetry import gauges
from narsil_stream.gateways.door import Door
from narsil_stream.gateways.http1 import Http1Server
from narsil_stream.gateways.http_body import Problem, discard
from narsil_stream.gateways.http_routes import Call, Reply, Route, Router
from narsil_stream.gateways.http_verbs import ROUTES, Verbs, error, refusal
from narsil_stream.gateways.tls import granian_tls
from narsil_stream.schemas.errors import Fault, Refused

log = logging.getLogger(__name__)

BACKLOG = 1_024
PARALLEL = 8_192
"""Requests that one gateway process works on at a time; more wait in their sockets."""
HEADER_BYTES = 64 << 10
STREAMS = 256
"""At a time on one HTTP/2 connection."""
PING_MS = 30_000
"""A HTTP/2 connection without traffic is checked this often."""


class HttpGateway(Door):
    """One process's share of the HTTP port."""

    scheme = "http"

    def __init__(self, config: Config, bus: Bus, share_port: bool = False) -> None:
        super().__init__(config, bus, config.http, share_port)
        self._verbs = Verbs(config, self._inference, self.registry)
        self._router = Router(ROUTES)
        self._serving: asyncio.Task[None] | None = None
        self._server: Server | None = None
        self._plain: Http1Server | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._open = 0
        self._closed = asyncio.Event()
        gauges(self.registry, narsil_requests_open=("Requests being worked on", lambda: self._open))

    # Life

    async def start(self) -> None:
        await self._inference.start()
        http = self._config.http
        with reserve(http.host, http.port, "http.port", share=self._share_port) as self.port:
            tls = granian_tls(self._config.access)
            if not tls:
                self._folder = tempfile.TemporaryDirectory(prefix="narsil-http-")
            where = {"address": http.host, "port": self.port} if tls else {"uds": self._unix_socket}
            self._server = Server(
                self._on_request,
                **where,
                interface=Interfaces.RSGI,
                http=HTTPModes.auto,
                websockets=False,
                backlog=BACKLOG,
                backpressure=PARALLEL,
                http1_settings=HTTP1Settings(header_read_timeout=http.body_timeout_ms, max_buffer_size=HEADER_BYTES),
                http2_settings=HTTP2Settings(
                    keep_alive_interval=PING_MS, max_concurrent_streams=STREAMS, max_headers_size=HEADER_BYTES
                ),
                log_enabled=False,
                **tls,
            )
            self._serving = asyncio.create_task(self._server.serve(), name=f"{self.name} http")
            await self._listening()
            if not tls:
                self._plain = Http1Server(
                    self._on_request, str(self._unix_socket), HEADER_BYTES, http.body_timeout_ms / 1e3, PARALLEL
                )
                await self._plain.start(http.host, self.port, BACKLOG)
        await self._inference.wait_ready(1.0)

    async def _listening(self) -> None:
        while True:
            if self._serving is not None and self._serving.done():
                self._serving.result()
            try:
                if self._folder is not None:
                    _, writer = await asyncio.open_unix_connection(self._unix_socket)
                else:
                    _, writer = await asyncio.open_connection(self._config.http.host, self.port)
            except OSError:
                await asyncio.sleep(0.01)
                continue
            writer.close()
            return

    async def drain(self) -> None:
        """Not ready from now on; turn newcomers away once callers had a moment to notice; finish what is open."""
        self._inference.closing = True
        await asyncio.sleep(self._config.timing.notice_ms / 1e3)
        await self._inference.turn_away()
        await self._stop_server()
        while self._open:
            self._closed.clear()
            await self._closed.wait()

    async def stop(self) -> None:
        """Who still waits gets UNAVAILABLE."""
        stopping = asyncio.create_task(self._stop_server())
        await self._inference.stop()
        plain, self._plain = self._plain, None
        if plain is not None:
            await plain.end()  # HTTP/2's server waits for callers who take nothing until they are cut
        await stopping
        folder, self._folder = self._folder, None
        if folder is not None:
            folder.cleanup()

    @property
    def _unix_socket(self) -> Path:
        """Where HTTP/2 without TLS is spoken. Only this user can reach it."""
        return Path(self._folder.name if self._folder is not None else "") / "http2"

    async def _stop_server(self) -> None:
        if self._plain is not None:
            self._plain.stop()
        server, self._server = self._server, None
        if server is not None and self._serving is not None:
            server.stop()
            with contextlib.suppress(Exception):
                await self._serving

    # One request

    async def _on_request(self, scope: Scope, proto: HTTPProtocol) -> None:
        self._open += 1
        try:
            reply = await self._reply(scope, proto)
            if reply.status >= HTTPStatus.BAD_REQUEST and reply.status != HTTPStatus.REQUEST_TIMEOUT:
                await discard(scope, proto)
            if self._inference.closing and scope.http_version.startswith("1"):
                reply.headers.append(("connection", "close"))  # or the next request could meet a closed connection
            proto.response_bytes(reply.status, reply.headers, reply.body)
        finally:
            self._open -= 1
            if not self._open:
                self._closed.set()

    async def _reply(self, scope: Scope, proto: HTTPProtocol) -> Reply:
        try:
            route, names = self._route(scope)
            who = self._access.check(scope.headers.get("authorization"), route.verb)
            call = Call(scope, proto, *names)
            return await route.handler(self._verbs, call._replace(who=who) if who else call)
        except Refused as refused:
            return refusal(refused)
        except Problem as problem:
            return error(problem.status, problem.detail, *problem.headers)
        except ProtocolClosed:  # in the middle of its body
            return error(Fault.CANCELLED.http, "the caller has left")
        except Exception:
            log.exception("a request to %s failed", scope.path)
            return error(HTTPStatus.INTERNAL_SERVER_ERROR, "internal error")

    def _route(self, scope: Scope) -> tuple[Route, list[str]]:
        routes, names = self._router.find(scope.path)
        if not routes:
            detail = f"no such path: {scope.path[:200]}; /openapi.json lists those that there are"
            raise Problem(HTTPStatus.NOT_FOUND, detail)
        route = routes.get("GET" if scope.method == "HEAD" else scope.method)
        if route is None:
            allowed = ", ".join([*routes, "HEAD"] if "GET" in routes else routes)
            detail = f"{scope.method} is not possible here; use {allowed}"
            raise Problem(HTTPStatus.METHOD_NOT_ALLOWED, detail, ("allow", allowed))
        return route, names
