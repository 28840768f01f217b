"""The verbs of the HTTP gateway: each decodes its request, makes one call, and encodes what comes back."""

import asyncio
import math
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, cast

import msgspec
from prometheus_client import CollectorRegistry

from narsil_stream.core.access import CHALLENGES
from narsil_stream.core.config import Config
from narsil_stream.core.telemetry import text
from narsil_stream.gateways.http_body import Bodies, Problem, WhileThere
from narsil_stream.gateways.http_codec import JSON_BYTES, JSON_LENGTH, Body, decode, deflated, encode, is_msgpack
from narsil_stream.gateways.http_documents import OPENAPI, OPENAPI_HEADERS, PAGE, PAGE_HEADERS
from narsil_stream.gateways.http_routes import Call, Headers, Reply, Route
from narsil_stream.gateways.inference import TENANT, Inference
from narsil_stream.gateways.metadata import SERVER
from narsil_stream.schemas.codec import Spelling
from narsil_stream.schemas.errors import Fault, Refused, invalid, named
from narsil_stream.schemas.oip import IndexRequest, ModelReady, RepositoryAction, ServerLive, ServerReady
from narsil_stream.schemas.wire import InferAnswer, InferRequest, JsonError

JSON = ("content-type", "application/json")

_decode_index = msgspec.json.Decoder(IndexRequest).decode
_decode_action = msgspec.json.Decoder(RepositoryAction).decode


class Verbs:
    """One for each gateway. Verbs raise `Refused` and `Problem`."""

    def __init__(self, config: Config, inference: Inference, registry: CollectorRegistry) -> None:
        self._inference = inference
        self._registry = registry
        self._bodies = Bodies(config.http)
        self._most_bytes = config.http.max_body_bytes

    async def infer(self, call: Call) -> Reply:
        headers, caller = call.scope.headers, WhileThere(call.proto)
        content_type = headers.get("content-type", "")
        spelling, binary_output = Spelling.MSGPACK if is_msgpack(content_type) else Spelling.JSON, False
        in_json = spelling is Spelling.JSON and JSON_LENGTH not in headers
        most = JSON_BYTES if in_json else self._most_bytes
        held, instead = self._bodies.held(), None

        async def read() -> InferRequest:
            nonlocal binary_output, instead
            try:
                body = await self._bodies.read(call.scope, call.proto, held, most)
            except Problem as problem:  # counted as a refusal, answered as HTTP has it
                # Not the exception itself: it holds this frame, and both would hold the connection.
                instead = error(problem.status, problem.detail, *problem.headers)
                raise invalid(problem.detail) from None
            request, binary_output = decode(body, spelling, headers.get(JSON_LENGTH))
            caller.watch()
            return request

        try:
            with caller, held:
                tenant = call.who or headers.get(TENANT, "")
                answer = await self._inference.ask(call.model, call.version, read, tenant)
        except asyncio.CancelledError:
            if not caller.left:
                raise
            answer = InferAnswer("", fault=Fault.CANCELLED.name, detail="the caller has left")
        if instead is not None:
            return instead
        status, more = HTTPStatus.OK.value, retry_after(answer.retry_after_us)
        if answer.fault:
            status = named(answer.fault).http
        body = deflated(encode(answer, spelling, binary_output), headers.get("accept-encoding", ""))
        return Reply(status, body.content, body.headers + more)

    async def live(self, _: Call) -> Reply:
        return _json(HTTPStatus.OK, ServerLive(True))

    async def ready(self, _: Call) -> Reply:
        ready = self._inference.ready
        return _json(HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE, ServerReady(ready))

    async def server_metadata(self, _: Call) -> Reply:
        return _json(HTTPStatus.OK, SERVER)

    async def model_ready(self, call: Call) -> Reply:
        ready = self._inference.model_ready(call.model, call.version)
        status = HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE
        return _json(status, ModelReady(call.model, ready))

    async def model_metadata(self, call: Call) -> Reply:
        return _json(HTTPStatus.OK, await self._inference.metadata(call.model, call.version))

    async def model_config(self, call: Call) -> Reply:
        return _json(HTTPStatus.OK, await self._inference.config(call.model, call.version))

    async def statistics(self, call: Call) -> Reply:
        return _json(HTTPStatus.OK, await self._inference.statistics(call.model, call.version))

    async def index(self, call: Call) -> Reply:
        wanted = read_index(await self._short_body(call))
        return _json(HTTPStatus.OK, await self._inference.index(wanted.ready))

    async def load(self, call: Call) -> Reply:
        await self._inference.load(call.model, await self._action(call))
        return _json(HTTPStatus.OK, {})

    async def unload(self, call: Call) -> Reply:
        await self._inference.unload(call.model, await self._action(call))
        return _json(HTTPStatus.OK, {})

    async def _action(self, call: Call) -> RepositoryAction:
        return read_action(await self._short_body(call))

    async def _short_body(self, call: Call) -> bytes:
        with self._bodies.held() as held:
            return await self._bodies.read(call.scope, call.proto, held)

    async def metrics(self, _: Call) -> Reply:
        exposition = text(self._registry).encode()
        return Reply(HTTPStatus.OK, exposition, [("content-type", "text/plain; version=0.0.4; charset=utf-8")])

    async def openapi(self, call: Call) -> Reply:
        return _document(call, OPENAPI, OPENAPI_HEADERS)

    async def docs(self, call: Call) -> Reply:
        return _document(call, PAGE, PAGE_HEADERS)

    async def not_offered(self, call: Call) -> Reply:
        raise Refused(Fault.UNIMPLEMENTED, f"{call.scope.path} is an extension of Triton's that is not offered here")


def read_index(body: bytes) -> IndexRequest:
    """Raises INVALID_ARGUMENT. An empty body asks for nothing in particular."""
    return cast(IndexRequest, _read(_decode_index, body) or IndexRequest())


def read_action(body: bytes) -> RepositoryAction:
    """Raises INVALID_ARGUMENT. An empty body has no parameters."""
    return cast(RepositoryAction, _read(_decode_action, body) or RepositoryAction())


def _read(decode: Callable[[bytes], Any], body: bytes) -> Any:
    if not body.strip():
        return None
    try:
        return decode(body)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise invalid(f"the body is not what this path takes: {error}") from None


def _document(call: Call, content: bytes, headers: Headers) -> Reply:
    body = deflated(Body(content, headers), call.scope.headers.get("accept-encoding", ""))
    return Reply(HTTPStatus.OK, body.content, body.headers)


def _json(status: int, body: Any) -> Reply:
    return Reply(status, msgspec.json.encode(body), [JSON])


def error(status: int, detail: str, *headers: tuple[str, str]) -> Reply:
    """What only HTTP knows, in the protocol's form."""
    return Reply(status, msgspec.json.encode(JsonError(detail)), [JSON, *headers])


def refusal(refused: Refused) -> Reply:
    """A row of the error table."""
    body = JsonError(refused.detail, refused.fault.name, refused.retry_after_us)
    headers = [JSON, *retry_after(refused.retry_after_us)]
    if challenge := CHALLENGES.get(refused.fault):
        headers.append(("www-authenticate", challenge))
    return Reply(refused.fault.http, msgspec.json.encode(body), headers)


def retry_after(us: int) -> Headers:
    return [("retry-after", str(math.ceil(us / 1e6)))] if us else []


def _model_routes(method: str, path: str, verb: str, handler: Any) -> list[Route]:
    """With and without a version."""
    return [
        Route(method, f"/v2/models/{{model}}{version}{path}", verb, handler) for version in ("", "/versions/{version}")
    ]


_NOT_OFFERED = (
    ("GET", "/v2/systemsharedmemory/status", "SystemSharedMemoryStatus"),
    ("GET", "/v2/systemsharedmemory/region/{region}/status", "SystemSharedMemoryStatus"),
    ("POST", "/v2/systemsharedmemory/region/{region}/register", "SystemSharedMemoryRegister"),
    ("POST", "/v2/systemsharedmemory/unregister", "SystemSharedMemoryUnregister"),
    ("POST", "/v2/systemsharedmemory/region/{region}/unregister", "SystemSharedMemoryUnregister"),
    ("GET", "/v2/cudasharedmemory/status", "CudaSharedMemoryStatus"),
    ("GET", "/v2/cudasharedmemory/region/{region}/status", "CudaSharedMemoryStatus"),
    ("POST", "/v2/cudasharedmemory/region/{region}/register", "CudaSharedMemoryRegister"),
    ("POST", "/v2/cudasharedmemory/unregister", "CudaSharedMemoryUnregister"),
    ("POST", "/v2/cudasharedmemory/region/{region}/unregister", "CudaSharedMemoryUnregister"),
    ("GET", "/v2/trace/setting", "TraceSetting"),
    ("POST", "/v2/trace/setting", "TraceSetting"),
    ("GET", "/v2/logging", "LogSettings"),
    ("POST", "/v2/logging", "LogSettings"),
)
"""Triton's own extensions whose clients get a clear answer."""

ROUTES = (
    *_model_routes("POST", "/infer", "ModelInfer", Verbs.infer),
    Route("GET", "/v2/health/live", "ServerLive", Verbs.live),
    Route("GET", "/v2/health/ready", "ServerReady", Verbs.ready),
    Route("GET", "/v2", "ServerMetadata", Verbs.server_metadata),
    *_model_routes("GET", "/ready", "ModelReady", Verbs.model_ready),
    *_model_routes("GET", "", "ModelMetadata", Verbs.model_metadata),
    *_model_routes("GET", "/config", "ModelConfig", Verbs.model_config),
    *_model_routes("GET", "/stats", "ModelStatistics", Verbs.statistics),
    Route("GET", "/v2/models/stats", "ModelStatistics", Verbs.statistics),
    Route("POST", "/v2/repository/index", "RepositoryIndex", Verbs.index),
    Route("POST", "/v2/repository/models/{model}/load", "RepositoryModelLoad", Verbs.load),
    Route("POST", "/v2/repository/models/{model}/unload", "RepositoryModelUnload", Verbs.unload),
    Route("GET", "/metrics", "Metrics", Verbs.metrics),
    Route("GET", "/openapi.json", "Documents", Verbs.openapi),
    Route("GET", "/docs", "Documents", Verbs.docs),
    *(Route(method, path, verb, Verbs.not_offered) for method, path, verb in _NOT_OFFERED),
)
