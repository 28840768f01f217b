"""Every row of real clicks, through every door and every way of coalescing: the scores are the reference backend's."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from io import BytesIO
from pathlib import Path

import nats
import numpy as np
import pytest
import uvloop
from msgspec.structs import replace

from narsil_stream import Client
from narsil_stream.core import criteo
from narsil_stream.core.config import Config
from narsil_stream.kernels.artifact import read_spec, write
from narsil_stream.kernels.init import criteo_spec, random_model
from narsil_stream.schemas import codec
from tests.asking import Rows, infer_json, infer_msgpack, json_scores
from tests.support import NatsServer, System, expected

FILES = ("criteo_rows.tsv", "criteo_terabyte_rows.tsv", "criteo_unlabelled_rows.tsv")
ROWS = 300 + 1_000 + 1_999
CALLERS = 64
BUDGET_US = 30_000_000

SUBJECT = "narsil.v1.infer.ctr"
Ask = Callable[[Rows], Awaitable[list[float]]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model called "ctr". Its first layer is scaled for counts as large as real ones are: where logits are sums
    of numbers in the hundreds, the rounding of FP32 differs by more than 1e-6 between sizes of a batch."""
    made = random_model(criteo_spec("ctr", rows=1000, dim=4, bottom=(8,), top=(8,)), seed=3)
    first = {"bottom.0.weight": made.tensors["bottom.0.weight"] * np.float32(0.3)}
    folder = tmp_path_factory.mktemp("real") / "ctr"
    write(folder, replace(made, tensors={**made.tensors, **first}))
    return folder


@pytest.fixture(scope="module")
def real(real_rows: Path, model: Path) -> Rows:
    """All rows, preprocessed for the model, and their scores."""
    tables = [table.rows for table in read_spec(model).tables]
    parts = [part for name in FILES for part in criteo.read(BytesIO((real_rows / name).read_bytes()), tables)]
    assert not any(part.bad for part in parts)
    dense = np.concatenate([part.dense for part in parts])
    ids = np.concatenate([part.sparse for part in parts])
    assert len(dense) == ROWS
    return Rows(dense, ids, expected(model, dense, ids))


@pytest.fixture(scope="module", params=["batch", "worker", "inline"])
def system(request: pytest.FixtureRequest, model: Path) -> Iterator[System]:
    """A system in each of the three ways of coalescing."""
    config = replace(Config(), mode=request.param)
    with NatsServer() as server, System(server.url, model, config=config, gateways=1) as running:
        yield running


def assert_each_row_gets_its_own_score(real: Rows, open_door: Callable[[AsyncExitStack], Awaitable[list[Ask]]]) -> None:
    """64 callers at once, with 1 to 4 rows in a request. `open_door` gives each its way to ask."""
    scores = np.full(ROWS, np.nan, np.float32)

    async def call(caller: int, ask: Ask) -> None:
        mine = range(caller, ROWS, CALLERS)
        at = 0
        while at < len(mine):
            rows = list(mine[at : at + 1 + at % 4])
            scores[rows] = await ask(real.part(*rows))
            at += len(rows)

    async def call_all() -> None:
        async with AsyncExitStack() as stack:
            ways = await open_door(stack)
            await asyncio.gather(*(call(at, ask) for at, ask in enumerate(ways)))

    uvloop.run(call_all())
    np.testing.assert_allclose(scores, real.scores, rtol=0, atol=1e-6)
    assert len(np.unique(scores)) > ROWS * 0.9, "the rows are too alike to tell a mix-up"


@pytest.mark.parametrize("spelling", ["JSON", "msgpack"])
def test_over_nats(system: System, real: Rows, spelling: str) -> None:
    """What any NATS client gets."""

    async def open_door(stack: AsyncExitStack) -> list[Ask]:
        connection = await stack.enter_async_context(await nats.connect(system.url))

        async def ask(rows: Rows) -> list[float]:
            if spelling == "JSON":
                body = json.dumps(infer_json(rows, timeout=BUDGET_US)).encode()
                return json_scores(json.loads((await connection.request(SUBJECT, body, timeout=30)).data))
            body = infer_msgpack(rows, budget_us=BUDGET_US)
            answer = codec.decode_answer((await connection.request(SUBJECT, body, timeout=30)).data)
            assert not answer.fault, answer
            return codec.array(answer.outputs[0]).tolist()

        return [ask] * CALLERS

    assert_each_row_gets_its_own_score(real, open_door)


def test_over_http(system: System, real: Rows) -> None:
    """What any client of the Open Inference Protocol gets."""

    async def open_door(stack: AsyncExitStack) -> list[Ask]:
        return [await connected(stack) for _ in range(CALLERS)]

    async def connected(stack: AsyncExitStack) -> Ask:
        reader, writer = await asyncio.open_connection("127.0.0.1", system.http_port)
        stack.callback(writer.close)

        async def ask(rows: Rows) -> list[float]:
            body = json.dumps(infer_json(rows, timeout=BUDGET_US)).encode()
            writer.write(b"POST /v2/models/ctr/infer HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n" % len(body))
            writer.write(body)
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            length = int(head.partition("content-length: ")[2].partition("\r")[0])
            return json_scores(json.loads(await reader.readexactly(length)))

        return ask

    assert_each_row_gets_its_own_score(real, open_door)


def test_with_our_client(system: System, real: Rows) -> None:
    """What a Python program gets."""

    async def open_door(stack: AsyncExitStack) -> list[Ask]:
        client = await stack.enter_async_context(Client(system.url))

        async def ask(rows: Rows) -> list[float]:
            return (await client.score("ctr", dense=rows.dense, sparse=rows.ids, budget_s=30)).tolist()

        return [ask] * CALLERS

    assert_each_row_gets_its_own_score(real, open_door)
