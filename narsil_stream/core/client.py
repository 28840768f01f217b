"""The Python client: NumPy in, NumPy out, over NATS to a live batcher."""

import asyncio
import random
import threading
import uuid
from collections.abc import Coroutine
from concurrent.futures import CancelledError
from typing import Any, Self, TypeVar

import numpy as np
from msgspec import structs
from numpy.typing import ArrayLike, NDArray

from narsil_stream.core.actor import now_us
from narsil_stream.core.bus import Bus
from narsil_stream.core.config import Config, NatsConfig
from narsil_stream.core.requester import Requester
from narsil_stream.schemas import codec
from narsil_stream.schemas.errors import Fault, Refused
from narsil_stream.schemas.internal import ModelCard, ModelRef
from narsil_stream.schemas.wire import InferAnswer, InferRequest, Tensor

T = TypeVar("T")
Scores = NDArray[np.float32]
RETRY_FIRST_S = 0.02
RETRY_MOST_S = 0.5


class Client:
    """Asyncio client. Use as `async with Client("nats://127.0.0.1:4222") as client`.

    One connection for all requests; call `score` from as many tasks as you like. Raises `Refused` without a broker.
    """

    def __init__(self, nats: str | NatsConfig = "nats://127.0.0.1:4222", *, connect_timeout_s: float = 5.0) -> None:
        login = NatsConfig(url=nats) if isinstance(nats, str) else nats
        self._config = Config(nats=login)
        self._connect_timeout_s = connect_timeout_s
        self._bus = Bus(login, "narsil-client")
        self._requester = Requester(self._config, self._bus)

    async def __aenter__(self) -> Self:
        await self._bus.connect(self._connect_timeout_s)
        try:
            await self._requester.start()
            await self._requester.wait_ready(self._connect_timeout_s)
        except BaseException:
            await self._bus.close()
            raise
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._requester.stop()
        await self._bus.flush()
        await self._bus.close()

    async def score(
        self,
        model: str,
        *,
        dense: ArrayLike,
        sparse: ArrayLike | None = None,
        values: ArrayLike | None = None,
        lengths: ArrayLike | None = None,
        version: str = "",
        budget_s: float = 1.0,
        priority: int = 0,
        tenant: str = "",
        retry: bool = True,
    ) -> Scores:
        """Scores [rows] FP32 of one request.

        dense: [rows, n_dense], made FP32. One-hot: sparse [rows, n_sparse] integers. Multi-hot: values [N] integers
        with lengths [rows, n_sparse], batch-major. budget_s: seconds for all tries together. priority: 1 is the most
        urgent, 0 the server's default. tenant: on whose behalf, at most 128 characters; tenants share what there is.
        With `retry` a request is sent again while the error says that this helps.
        Raises `Refused`, whose `fault` is a row of the error table.
        """
        request = make_request(dense, sparse, values, lengths, priority=priority, tenant=tenant)
        answer = await self.infer(model, request, version=version, budget_s=budget_s, retry=retry)
        return codec.array(answer.outputs[0])

    async def infer(
        self, model: str, request: InferRequest, *, version: str = "", budget_s: float = 1.0, retry: bool = True
    ) -> InferAnswer:
        """A ready-made request. Returns an answer without a fault, or raises `Refused`."""
        deadline_us = now_us() + int(budget_s * 1e6)
        pause_s = RETRY_FIRST_S
        while True:
            left_us = max(1, deadline_us - now_us())
            try:
                answer = await self._requester.ask(model, version, structs.replace(request, budget_us=left_us))
                if not answer.fault:
                    return answer
                refused = codec.refusal(answer)
            except Refused as error:
                refused = error
            wait_s = max(pause_s, refused.retry_after_us / 1e6) * random.uniform(0.8, 1.2)
            if refused.fault is Fault.UNAVAILABLE:
                wait_s = pause_s * random.uniform(0.8, 1.2)
            if not (retry and refused.fault.retry) or now_us() + int(wait_s * 1e6) >= deadline_us:
                raise refused
            await asyncio.sleep(wait_s)
            pause_s = min(2 * pause_s, RETRY_MOST_S)

    async def describe(self, model: str, version: str = "") -> ModelCard:
        """What a served model is: inputs, tables, backend. Raises `Refused`."""
        return await self._requester.card(model, version)

    def models(self) -> tuple[ModelRef, ...]:
        """What is served now."""
        return self._requester.models()


class BlockingClient:
    """The same for code without asyncio; safe to use from several threads. `with BlockingClient(url) as client`."""

    def __init__(self, nats: str | NatsConfig = "nats://127.0.0.1:4222", *, connect_timeout_s: float = 5.0) -> None:
        self._nats = nats
        self._connect_timeout_s = connect_timeout_s
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="narsil-client", daemon=True)
        self._client: Client | None = None
        self._taking = threading.Lock()
        self._closed = False

    def __enter__(self) -> Self:
        self._thread.start()
        try:
            self._client = self._wait(self._open())
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        try:
            self._wait(self._opened.__aexit__(*error))
        finally:
            self._end()

    def score(self, model: str, **arguments: Any) -> Scores:
        """See `Client.score`."""
        return self._wait(self._opened.score(model, **arguments))

    def describe(self, model: str, version: str = "") -> ModelCard:
        """See `Client.describe`."""
        return self._wait(self._opened.describe(model, version))

    def models(self) -> tuple[ModelRef, ...]:
        """What is served now."""
        return self._wait(self._models())

    async def _models(self) -> tuple[ModelRef, ...]:
        return self._opened.models()

    async def _open(self) -> Client:
        return await Client(self._nats, connect_timeout_s=self._connect_timeout_s).__aenter__()

    @property
    def _opened(self) -> Client:
        if self._client is None:
            raise RuntimeError("use as `with BlockingClient(url) as client`")
        return self._client

    def _wait(self, coroutine: Coroutine[Any, Any, T]) -> T:
        with self._taking:
            if self._closed:
                coroutine.close()
                raise Refused(Fault.UNAVAILABLE, "this client is closed")
            future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except CancelledError:
            raise Refused(Fault.UNAVAILABLE, "this client was closed") from None
        except BaseException:
            future.cancel()  # interrupted, e.g. by Ctrl-C: nobody waits for it any more
            raise

    def _end(self) -> None:
        """Other threads may still wait for their scores: none of them shall wait for ever."""
        with self._taking:
            self._closed = True
        asyncio.run_coroutine_threadsafe(_cancel_others(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _cancel_others() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


def make_request(
    dense: ArrayLike,
    sparse: ArrayLike | None = None,
    values: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    *,
    id: str = "",
    priority: int = 0,
    tenant: str = "",
) -> InferRequest:
    """A request from arrays; see `Client.score` for their shapes. Raises ValueError for arrays that make no request."""
    tensors: list[Tensor] = [codec.tensor("dense", np.asarray(dense, np.float32))]
    if sparse is not None and values is None and lengths is None:
        tensors.append(codec.tensor("sparse", _ids(sparse)))
    elif sparse is None and values is not None and lengths is not None:
        tensors += [codec.tensor("values", _ids(values)), codec.tensor("lengths", np.asarray(lengths, np.int32))]
    else:
        raise ValueError("give either `sparse` (one-hot), or `values` and `lengths` (multi-hot)")
    return InferRequest(id or uuid.uuid4().hex, tuple(tensors), priority=priority, tenant=tenant)


def _ids(given: ArrayLike) -> NDArray[Any]:
    ids = np.asarray(given)
    if ids.size == 0:
        return ids.astype(np.int32)
    if ids.dtype.kind not in "iu":
        raise ValueError(f"ids have dtype {ids.dtype}; expected integers")
    return ids if ids.dtype in (np.int32, np.int64) else ids.astype(np.int64)
