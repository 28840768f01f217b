"""On whose behalf a request counts, whichever door it came through."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import nats
import pytest
import uvloop
from msgspec.structs import replace

from narsil_stream import Client
from narsil_stream.core import tokens
from narsil_stream.core.config import AccessConfig, BatchConfig, Config
from narsil_stream.schemas import codec
from tests.asking import Rows, ask_http, infer_json, infer_msgpack, some_rows
from tests.doubles import Gate
from tests.gateways.calling import GrpcCaller, infer_message
from tests.support import PATIENCE_S, NatsServer, System

INFER = "/v2/models/ctr/infer"
SUBJECT = "narsil.v1.infer.ctr"
BUDGET_US = 20_000_000


@pytest.fixture(scope="module")
def rows(criteo_model: Path) -> Rows:
    return some_rows(criteo_model, 1)


@pytest.fixture(scope="module")
def open_doors(criteo_model: Path) -> Iterator[System]:
    """No token is needed."""
    with NatsServer() as server, System(server.url, criteo_model, gateways=1, grpc_gateways=1) as running:
        yield running


@pytest.fixture(scope="module")
def guarded(criteo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """Doors that want a token: "secret", which is ann's, or "other", which is nobody's."""
    file = tmp_path_factory.mktemp("tokens") / "tokens"
    scopes = frozenset[tokens.Scope]({"infer"})
    file.write_text(f"{tokens.line('secret', scopes, 'ann')}\n{tokens.line('other', scopes)}\n")
    file.chmod(0o600)
    config = replace(Config(), access=AccessConfig(tokens_file=str(file)))
    with (
        NatsServer() as server,
        System(server.url, criteo_model, config=config, gateways=1, grpc_gateways=1) as running,
    ):
        yield running


def rows_of(system: System, tenant: str) -> float:
    (batcher,) = system.actors("batcher")
    return batcher.registry.get_sample_value("narsil_tenant_rows_total", {"tenant": tenant}) or 0.0


def test_http_names_the_tenant_in_a_header_or_in_the_parameters(open_doors: System, rows: Rows) -> None:
    """Everybody would share one place in the queue."""
    port = open_doors.http_port
    body = infer_json(rows) | {"parameters": {"tenant": "from json"}}
    assert ask_http(port, "POST", INFER, body).status == 200
    assert rows_of(open_doors, "from json") == 1
    assert ask_http(port, "POST", INFER, body, **{"narsil-tenant": "from header"}).status == 200
    assert (rows_of(open_doors, "from json"), rows_of(open_doors, "from header")) == (1, 1)


def test_grpc_names_the_tenant_in_the_metadata_or_in_the_parameters(open_doors: System, rows: Rows) -> None:
    """The same question gets the same place, whichever door it came through."""
    message = infer_message(rows)
    message.parameters["tenant"].string_param = "from parameter"
    with GrpcCaller(open_doors.grpc_port) as call:
        assert len(call("ModelInfer", message).scores) == 1
        assert len(call("ModelInfer", message, metadata=(("narsil-tenant", "from metadata"),)).scores) == 1
    assert (rows_of(open_doors, "from parameter"), rows_of(open_doors, "from metadata")) == (1, 1)


def test_a_name_that_is_too_long_or_no_text_is_refused(open_doors: System, rows: Rows) -> None:
    """It would travel with every request, and fill the metrics."""
    answer = ask_http(open_doors.http_port, "POST", INFER, infer_json(rows), **{"narsil-tenant": "x" * 129})
    assert answer.status == 400
    assert b"expected at most 128" in answer.body
    message = infer_message(rows, tenant=7)
    with GrpcCaller(open_doors.grpc_port) as call:
        refused = call("ModelInfer", message)
    assert (refused.code.name, "'tenant'" in refused.detail) == ("INVALID_ARGUMENT", True)


def test_where_a_token_is_needed_its_name_counts_whatever_the_request_says(guarded: System, rows: Rows) -> None:
    """A caller could ask in another's name, and use up what is the other's."""
    said = {"narsil-tenant": "bob", "authorization": "Bearer secret"}
    body = infer_json(rows) | {"parameters": {"tenant": "bob"}}
    assert ask_http(guarded.http_port, "POST", INFER, body, **said).status == 200
    with GrpcCaller(guarded.grpc_port) as call:
        assert len(call("ModelInfer", infer_message(rows), metadata=tuple(said.items())).scores) == 1
    assert (rows_of(guarded, "ann"), rows_of(guarded, "bob")) == (2, 0)


def test_a_token_without_a_name_is_a_tenant_of_its_own(guarded: System, rows: Rows) -> None:
    """All of them together would have the share of one."""
    assert ask_http(guarded.http_port, "POST", INFER, infer_json(rows), authorization="Bearer other").status == 200
    assert rows_of(guarded, f"token {tokens.digest('other').hex()[:8]}") == 1


# Who is served when, whichever door it came through

Ask = Callable[[str, Rows], Awaitable[object]]


def over_nats(spelling: str) -> Callable[[System], AbstractAsyncContextManager[Ask]]:
    @asynccontextmanager
    async def opened(system: System) -> AsyncIterator[Ask]:
        async with await nats.connect(system.url) as connection:

            async def ask(tenant: str, rows: Rows) -> None:
                if spelling == "JSON":
                    body = infer_json(rows)
                    body["parameters"] = {"tenant": tenant, "timeout": BUDGET_US}
                    sent = json.dumps(body).encode()
                else:
                    sent = infer_msgpack(rows, budget_us=BUDGET_US, tenant=tenant)
                answer = codec.decode_answer((await connection.request(SUBJECT, sent, timeout=PATIENCE_S)).data)
                assert not answer.fault, answer

            yield ask

    return opened


@asynccontextmanager
async def client(system: System) -> AsyncIterator[Ask]:
    async with Client(system.url) as opened:

        async def ask(tenant: str, rows: Rows) -> None:
            await opened.score("ctr", dense=rows.dense, sparse=rows.ids, tenant=tenant, budget_s=BUDGET_US / 1e6)

        yield ask


@pytest.mark.parametrize(
    "door",
    [over_nats("JSON"), over_nats("msgpack"), client],
    ids=["plain NATS in JSON", "plain NATS in msgpack", "the Python client"],
)
def test_a_modest_tenant_does_not_wait_for_all_of_a_greedy_one(
    nats_server: NatsServer, criteo_model: Path, door: Callable[[System], AbstractAsyncContextManager[Ask]]
) -> None:
    """Who asks much would make everybody else late."""
    gate, served, one = Gate(), [], some_rows(criteo_model, 1)
    config = replace(Config(), batch=BatchConfig(max_rows=1))

    async def scene(system: System) -> None:
        async def ask(tenant: str) -> None:
            await asking(tenant, one)
            served.append(tenant)

        async with door(system) as asking, asyncio.TaskGroup() as group:
            with gate.closed():
                for tenant, count, waiting in (("greedy", 20, 18), ("modest", 3, 21)):
                    for _ in range(count):
                        group.create_task(ask(tenant))
                    async with asyncio.timeout(PATIENCE_S):
                        while waiting_rows(system) != waiting:  # noqa: ASYNC110 nothing tells of it
                            await asyncio.sleep(0.005)

    with System(nats_server.url, criteo_model, config=config, loader=gate.load) as system:
        uvloop.run(scene(system))
    assert served.count("greedy") == 20
    last = max(at for at, tenant in enumerate(served) if tenant == "modest")
    assert last < 12, f"turn by turn behind the two that were computed already: {served}"


def waiting_rows(system: System) -> float | None:
    (batcher,) = system.actors("batcher")
    return batcher.registry.get_sample_value("narsil_queue_rows")
