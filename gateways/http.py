"""The HTTP gateway: Open Inference Protocol v2 in, one call to a batcher, the answer out. Nothing is decided here."""

import asyncio
import contextlib
import logging
import math
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any, NamedTuple, Self

import msgspec
from granian.constants import HTTPModes, Interfaces
from granian.rsgi import HTTPProtocol, Scope
from granian.server.embed import Server

from narsil_stream.core.actor import Actor
from narsil_stream.core.bus import Bus
from narsil_stream.core.config import Config
from narsil_stream.core.ports import reserve
from narsil_stream.core.telemetry import gauges, text
from narsil_stream.gateways.inference import Inference
from narsil_stream.gateways.metadata import SERVER
from narsil_stream.schemas import codec
from narsil_stream.schemas.errors import Fault, Refused, named
from narsil_stream.schemas.wire import InferAnswer, InferRequest, JsonError

log = logging.getLogger(__name__)

Headers = list[tuple[str, str]]
JSON = ("content-type", "application/json")
PARALLEL = 8_192
"""Requests that one gateway process works on at a time; more wait in their sockets."""
COMING_BYTES = 512 << 20
"""Bytes of bodies that one gateway process reads at the same time. A body of unknown length counts as the largest."""


WATCH_AFTER_S = 0.01
"""Whether a caller is still there is asked only when its answer takes longer than this: asking costs 8 µs."""


class Reply(NamedTuple):
    status: int
    body: bytes
    headers: Headers


class Problem(Exception):
    """What only HTTP knows: 404 of a path, 405, 408."""

    def __init__(self, status: HTTPStatus, detail: str, *headers: tuple[str, str]) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = headers


class WhileThere:
    """`with WhileThere(proto) as caller`: from `watch` on, the block is cancelled when the caller leaves.

    `caller.left` is true then.
    """

    def __init__(self, proto: HTTPProtocol) -> None:
        self._proto = proto
        self._timer: asyncio.TimerHandle | None = None
        self._gone: asyncio.Future[None] | None = None
        self.left = False

    def __enter__(self) -> Self:
        self._task = asyncio.current_task()
        return self

    def watch(self) -> None:
        """The body is there: from now on the caller only waits."""
        self._timer = asyncio.get_running_loop().call_later(WATCH_AFTER_S, self._watch)

    def __exit__(self, *error: object) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._gone is not None:
            self._gone.remove_done_callback(self._leave)
            self._gone.cancel()

    def _watch(self) -> None:
        self._gone = asyncio.ensure_future(self._proto.client_disconnect())
        self._gone.add_done_callback(self._leave)

    def _leave(self, _: asyncio.Future[None]) -> None:
        if self._task is not None:
            self.left = self._task.cancel()


class HttpGateway(Actor[None]):
    """One process's share of the HTTP port."""

    kind = "gateway"

    def __init__(self, config: Config, bus: Bus, share_port: bool = False) -> None:
        super().__init__(1)
        self._config = config
        self._share_port = share_port
        self._inference = Inference(config, bus, self.registry)
        self._serving: asyncio.Task[None] | None = None
        self._server: Server | None = None
        self._open = 0
        self._coming_bytes = 0
        self._closed = asyncio.Event()
        self.port = config.http.port
        gauges(self.registry, narsil_requests_open=("Requests being worked on", lambda: self._open))

    # Life

    async def start(self) -> None:
        await self._inference.start()
        http = self._config.http
        with reserve(http.host, http.port, "http.port", share=self._share_port) as self.port:
            self._server = Server(
                self._on_request,
                address=http.host,
                port=self.port,
                interface=Interfaces.RSGI,
                http=HTTPModes.auto,
                websockets=False,
                backlog=1_024,
                backpressure=PARALLEL,
                log_enabled=False,
            )
            self._serving = asyncio.create_task(self._server.serve(), name=f"{self.name} http")
            await self._listening()
        await self._inference.wait_ready(1.0)

    async def _listening(self) -> None:
        while True:
            if self._serving is not None and self._serving.done():
                self._serving.result()
            try:
                _, writer = await asyncio.open_connection(self._config.http.host, self.port)
            except OSError:
                await asyncio.sleep(0.01)
                continue
            writer.close()
            return

    async def drain(self) -> None:
        """Not ready from now on; take no new connection once callers had a moment to notice; finish what is open."""
        self._inference.closing = True
        await asyncio.sleep(self._config.timing.notice_ms / 1e3)
        await self._stop_server()
        while self._open:
            self._closed.clear()
            await self._closed.wait()

    async def stop(self) -> None:
        await self._stop_server()
        await self._inference.stop()

    async def _stop_server(self) -> None:
        server, self._server = self._server, None
        if server is not None and self._serving is not None:
            server.stop()
            with contextlib.suppress(Exception):
                await self._serving

    def receive(self, message: None) -> None:
        """Requests do not pass through the mailbox: each is a task of the HTTP server."""

    def detail(self) -> str:
        models = ", ".join(f"{ref.name} {ref.version}" for ref in self._inference.models()) or "no model"
        ready = "ready" if self._inference.ready else "not ready"
        return f"http://{self._config.http.host}:{self.port}, {models}, {ready}"

    # One request

    async def _on_request(self, scope: Scope, proto: HTTPProtocol) -> None:
        self._open += 1
        try:
            reply = await self._reply(scope, proto)
            proto.response_bytes(reply.status, reply.headers, reply.body)
        finally:
            self._open -= 1
            if not self._open:
                self._closed.set()

    async def _reply(self, scope: Scope, proto: HTTPProtocol) -> Reply:
        try:
            handler = self._route(scope)
            return await handler(scope, proto)
        except Refused as refused:
            return _refusal(InferAnswer("", fault=refused.fault.name, detail=refused.detail,
                                        retry_after_us=refused.retry_after_us))  # fmt: skip
        except Problem as problem:
            return Reply(problem.status, _error(problem.detail), [JSON, *problem.headers])
        except Exception:
            log.exception("a request to %s failed", scope.path)
            return Reply(HTTPStatus.INTERNAL_SERVER_ERROR, _error("internal error"), [JSON])

    def _route(self, scope: Scope) -> Callable[[Scope, HTTPProtocol], Awaitable[Reply]]:
        handlers: dict[str, Callable[[Scope, HTTPProtocol], Awaitable[Reply]]]
        match scope.path.strip("/").split("/"):
            case ["v2", "models", model, "infer"]:
                handlers = {"POST": lambda _, proto: self._infer(scope, proto, model, "")}
            case ["v2", "models", model, "versions", version, "infer"]:
                handlers = {"POST": lambda _, proto: self._infer(scope, proto, model, version)}
            case ["v2", "health", "live"]:
                handlers = {"GET": self._live}
            case ["v2", "health", "ready"]:
                handlers = {"GET": self._ready}
            case ["v2"]:
                handlers = {"GET": self._server_metadata}
            case ["v2", "models", model, "ready"]:
                handlers = {"GET": lambda *_: self._model_ready(model, "")}
            case ["v2", "models", model, "versions", version, "ready"]:
                handlers = {"GET": lambda *_: self._model_ready(model, version)}
            case ["v2", "models", model]:
                handlers = {"GET": lambda *_: self._model_metadata(model, "")}
            case ["v2", "models", model, "versions", version]:
                handlers = {"GET": lambda *_: self._model_metadata(model, version)}
            case ["metrics"]:
                handlers = {"GET": self._own_metrics}
            case _:
                raise Problem(HTTPStatus.NOT_FOUND, f"no such path: {scope.path}; the protocol's paths begin with /v2")
        method = "GET" if scope.method == "HEAD" else scope.method
        if method not in handlers:
            allowed = ", ".join([*handlers, "HEAD"] if "GET" in handlers else handlers)
            raise Problem(
                HTTPStatus.METHOD_NOT_ALLOWED, f"{scope.method} is not possible here; use {allowed}", ("allow", allowed)
            )
        return handlers[method]

    async def _infer(self, scope: Scope, proto: HTTPProtocol, model: str, version: str) -> Reply:
        caller = WhileThere(proto)

        async def read() -> InferRequest:
            request = codec.decode_json_request(await self._body(scope, proto))
            caller.watch()
            return request

        try:
            with caller:
                answer = await self._inference.ask(model, version, read)
        except asyncio.CancelledError:
            if not caller.left:
                raise
            answer = InferAnswer("", fault=Fault.CANCELLED.name, detail="the caller has left")
        if answer.fault:
            return _refusal(answer)
        return Reply(HTTPStatus.OK, codec.encode_answer(answer, codec.Spelling.JSON), [JSON])

    async def _body(self, scope: Scope, proto: HTTPProtocol) -> bytes:
        """Raises `Refused(TOO_LARGE)`; Problem 408 when it does not come in time."""
        limit = self._config.http.max_body_bytes
        declared = scope.headers.get("content-length", "")
        if declared.isdigit() and int(declared) > limit:
            raise Refused(Fault.TOO_LARGE, f"a body of {declared} bytes; expected at most {limit}")
        coming = int(declared) if declared.isdigit() else limit
        if self._coming_bytes + coming > max(COMING_BYTES, limit):
            raise Refused(Fault.OVERLOADED, "too many large bodies are coming in at once", 100_000)
        self._coming_bytes += coming
        try:
            async with asyncio.timeout(self._config.http.body_timeout_ms / 1e3):
                if declared.isdigit():
                    return bytes(await proto())
                chunks = bytearray()
                async for chunk in proto:
                    chunks += chunk
                    if len(chunks) > limit:
                        raise Refused(Fault.TOO_LARGE, f"a body of more than {limit} bytes")
                return bytes(chunks)
        except TimeoutError:
            wait = self._config.http.body_timeout_ms
            detail = f"the body did not come within {wait} ms"
            raise Problem(HTTPStatus.REQUEST_TIMEOUT, detail, ("connection", "close")) from None
        finally:
            self._coming_bytes -= coming

    # Everything else

    async def _live(self, _: Scope, __: HTTPProtocol) -> Reply:
        return _json(HTTPStatus.OK, {"live": True})

    async def _ready(self, _: Scope, __: HTTPProtocol) -> Reply:
        ready = self._inference.ready
        return _json(HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE, {"ready": ready})

    async def _server_metadata(self, _: Scope, __: HTTPProtocol) -> Reply:
        return _json(HTTPStatus.OK, SERVER)

    async def _model_ready(self, model: str, version: str) -> Reply:
        ready = self._inference.model_ready(model, version)
        status = HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE
        return _json(status, {"name": model, "ready": ready})

    async def _model_metadata(self, model: str, version: str) -> Reply:
        return _json(HTTPStatus.OK, await self._inference.metadata(model, version))

    async def _own_metrics(self, _: Scope, __: HTTPProtocol) -> Reply:
        exposition = text(self.registry).encode()
        return Reply(HTTPStatus.OK, exposition, [("content-type", "text/plain; version=0.0.4; charset=utf-8")])


def _json(status: int, body: Any) -> Reply:
    return Reply(status, msgspec.json.encode(body), [JSON])


def _error(detail: str) -> bytes:
    return msgspec.json.encode(JsonError(detail))


def _refusal(answer: InferAnswer) -> Reply:
    headers = [JSON]
    if answer.retry_after_us:
        headers.append(("retry-after", str(math.ceil(answer.retry_after_us / 1e6))))
    return Reply(named(answer.fault).http, codec.encode_answer(answer, codec.Spelling.JSON), headers)
