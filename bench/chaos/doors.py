"""The ways into the system: HTTP, gRPC, the Python client, and a plain NATS producer."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, Protocol

import msgspec
from msgspec.structs import replace

from narsil_stream.bench.callers import CONNECT_S, content_length, http_request, nats_connection, within
from narsil_stream.bench.chaos.asks import MODEL
from narsil_stream.bench.questions import GRPC_INFER, Question
from narsil_stream.core.client import Client
from narsil_stream.core.config import NatsConfig
from narsil_stream.schemas import codec, subjects
from narsil_stream.schemas.errors import Fault, Refused
from narsil_stream.schemas.protobuf import message_class
from narsil_stream.schemas.wire import InferAnswer, InferRequest, Tensor

CHANNELS = 4
"""Of gRPC: each is one connection, so that several gateways have some."""
CHANNEL_OPTIONS = [
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 200),
    ("grpc.enable_retries", 0),
]
BY_GRPC = {fault.grpc: fault for fault in reversed(Fault)}
BY_HTTP = {fault.http: fault for fault in Fault}


class Broken(Exception):
    """The connection could not be made, or ended before the answer came: no word from the server."""


class Door(Protocol):
    surplus: int
    """Answers that came although nobody waited for one: a second answer to some request."""

    async def open(self) -> None:
        """Raises TimeoutError, which says what did not answer."""

    async def ask(self, request: InferRequest, left_s: float) -> InferAnswer:
        """An answer without a fault. Raises Refused and Broken; waits longer than `left_s` if nothing comes."""

    async def close(self) -> None: ...


class Http:
    """The wire's msgpack as a body, over as many keep-alive connections as there are requests in flight."""

    def __init__(self, address: str) -> None:
        self._host, _, self._port = address.rpartition(":")
        self._path = f"/v2/models/{MODEL}/infer"
        self.idle: list[_Connection] = []
        self.surplus = 0

    async def open(self) -> None:
        pass

    async def ask(self, request: InferRequest, left_s: float) -> InferAnswer:
        request = replace(request, budget_us=int(left_s * 1e6))
        body = codec.encode_request(request, codec.Spelling.MSGPACK)
        connection = self.idle.pop() if self.idle else await self._connect()
        try:
            status, content = await connection.ask(
                http_request(Question("http", self._path, {"content-type": "application/msgpack"}, body))
            )
        except BaseException:
            connection.transport.abort()
            raise
        if not connection.transport.is_closing():
            self.idle.append(connection)
        if status != 200:
            raise http_refusal(status, content)
        return codec.decode_answer(content)

    async def _connect(self) -> "_Connection":
        try:
            _, connection = await asyncio.get_running_loop().create_connection(
                lambda: _Connection(self), self._host, int(self._port)
            )
        except OSError as error:
            raise Broken(str(error)) from None
        return connection

    async def close(self) -> None:
        for connection in list(self.idle):
            connection.transport.abort()


def http_refusal(status: int, body: bytes) -> Refused:
    """By the status alone, whoever answered: what the HTTP parser refuses carries none of our errors. The body may say
    when to come back."""
    said = InferAnswer("", ())
    with contextlib.suppress(msgspec.MsgspecError):
        said = codec.decode_answer(body)
    return Refused(BY_HTTP.get(status, Fault.INTERNAL), said.detail or f"HTTP status {status}", said.retry_after_us)


class _Connection(asyncio.Protocol):
    """One request at a time."""

    def __init__(self, door: Http) -> None:
        self._door = door
        self._answer: asyncio.Future[tuple[int, bytes]] | None = None
        self._buffer = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport

    async def ask(self, request: bytes) -> tuple[int, bytes]:
        """Status and body."""
        if self.transport.is_closing():
            raise Broken("the connection is closed")
        self._answer = asyncio.get_running_loop().create_future()
        self.transport.write(request)
        return await self._answer

    def data_received(self, data: bytes) -> None:
        if self._answer is None or self._answer.done():
            self._door.surplus += 1
            return
        self._buffer += data
        head, end, rest = self._buffer.partition(b"\r\n\r\n")
        length = content_length(head)
        if end and length < 0:  # an error of the server's parser: it is all that comes
            self.transport.abort()
            length = len(rest)
        if end and len(rest) >= length:
            self._door.surplus += len(rest) > length
            self._buffer = b""
            self._answer.set_result((int(head.split(b" ", 2)[1]), rest[:length]))

    def connection_lost(self, error: Exception | None) -> None:
        if self in self._door.idle:
            self._door.idle.remove(self)
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(Broken(str(error or "the connection was closed")))


class Grpc:
    """Unary calls with raw contents."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._next = 0
        self.surplus = 0  # HTTP/2 carries one answer for each unary call

    async def open(self) -> None:
        from grpc import aio

        self._channels = [aio.insecure_channel(self._address, CHANNEL_OPTIONS) for _ in range(CHANNELS)]
        self._infer = [channel.unary_unary(GRPC_INFER) for channel in self._channels]
        async with within(CONNECT_S, f"gRPC server at {self._address}"):
            await asyncio.gather(*(channel.channel_ready() for channel in self._channels))

    async def ask(self, request: InferRequest, left_s: float) -> InferAnswer:
        from grpc import StatusCode
        from grpc.aio import AioRpcError

        self._next += 1
        try:
            answer = await self._infer[self._next % CHANNELS](_message(request, left_s))
        except AioRpcError as error:
            said = {str(key): value for key, value in error.trailing_metadata() or ()}
            if error.code() is StatusCode.UNAVAILABLE and "retry-after-ms" not in said:
                raise Broken(error.details()) from None
            wait_us = 1_000 * int(said.get("retry-after-ms", 0))
            raise Refused(BY_GRPC.get(error.code().name, Fault.INTERNAL), error.details() or "", wait_us) from None
        message = message_class("ModelInferResponse").FromString(answer)
        scores = memoryview(message.raw_output_contents[0])
        return InferAnswer(message.id, (Tensor("scores", "FP32", (scores.nbytes // 4,), scores),))

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()


def _message(request: InferRequest, left_s: float) -> bytes:
    message = message_class("ModelInferRequest")(model_name=MODEL, id=request.id)
    for tensor in request.inputs:
        message.inputs.add(name=tensor.name, datatype=tensor.dtype, shape=tensor.shape)
        message.raw_input_contents.append(bytes(tensor.data))
    message.parameters["timeout"].int64_param = int(left_s * 1e6)
    return bytes(message.SerializeToString())


class Nats:
    """Our Python client. `retry`: as its users have it, within the budget."""

    def __init__(self, address: str, retry: bool) -> None:
        self._client = Client(NatsConfig(url=address))
        self._retry = retry
        self.surplus = 0  # it ends each request once, and drops what comes after

    async def open(self) -> None:
        await self._client.__aenter__()

    async def ask(self, request: InferRequest, left_s: float) -> InferAnswer:
        return await self._client.infer(MODEL, request, budget_s=left_s, retry=self._retry)

    async def close(self) -> None:
        await self._client.__aexit__()


class Producer:
    """Any NATS client that publishes to the public subject: at most one answer is promised, and all that come count."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._asked: dict[str, asyncio.Future[InferAnswer]] = {}
        self.surplus = 0

    async def open(self) -> None:
        self._nats = await nats_connection(self._address, reconnect_time_wait=2.0)  # nats-py's own
        self._inbox = self._nats.new_inbox()
        await self._nats.subscribe(f"{self._inbox}.*", cb=self._on_answer)
        await self._nats.flush()

    async def ask(self, request: InferRequest, left_s: float) -> InferAnswer:
        reply = f"{self._inbox}.{request.id}"
        self._asked[reply] = asyncio.get_running_loop().create_future()
        request = replace(request, budget_us=int(left_s * 1e6))
        await self._nats.publish(
            subjects.infer(MODEL), codec.encode_request(request, codec.Spelling.MSGPACK), reply=reply
        )
        answer = await self._asked[reply]
        if answer.fault:
            raise codec.refusal(answer)
        return answer

    async def _on_answer(self, message: Any) -> None:
        future = self._asked[message.subject]
        if future.done() and not future.cancelled():
            self.surplus += 1
        elif not future.done():
            if (message.headers or {}).get("Status") == "503":
                future.set_exception(Refused(Fault.UNAVAILABLE, "no batcher listens"))
                return
            try:
                future.set_result(codec.decode_answer(message.data))
            except msgspec.MsgspecError as error:
                future.set_exception(error)

    async def close(self) -> None:
        with contextlib.suppress(Exception):
            await self._nats.close()


def door(way: str, address: str, retry: bool) -> Door:
    """`retry`: of the Python client."""
    doors: dict[str, Callable[[str], Door]] = {
        "http": Http, "grpc": Grpc, "client": lambda at: Nats(at, retry), "producer": Producer,
    }  # fmt: skip
    return doors[way](address)
