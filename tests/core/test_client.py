"""The Python client as a program uses it: from tasks, from threads, and when there is trouble."""

import asyncio
import threading
import time
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvloop

from narsil_stream import BlockingClient, Client, Fault, Refused
from narsil_stream.core.client import make_request
from narsil_stream.kernels import reference
from narsil_stream.kernels.artifact import read_spec
from narsil_stream.kernels.backend import RaggedBatch
from narsil_stream.kernels.init import random_batch
from narsil_stream.schemas.wire import InferAnswer, InferRequest
from tests.asking import Rows, some_rows
from tests.doubles import Gate
from tests.support import NatsServer, System, until


@pytest.fixture(scope="module")
def rows(criteo_model: Path) -> Rows:
    return some_rows(criteo_model, 64)


def right(scores: Any, rows: Rows) -> bool:
    return bool(np.allclose(scores, rows.scores, rtol=0, atol=1e-6))


def fault_of(asking: Coroutine[Any, Any, Any]) -> Fault:
    """How it ends badly."""

    async def ask() -> Fault:
        with pytest.raises(Refused) as told:
            await asking
        return told.value.fault

    return uvloop.run(ask())


@pytest.mark.parametrize("convert", [lambda a: a, lambda a: a.tolist(), np.asfortranarray], ids=["C", "list", "F"])
def test_arrays_and_lists_go_in_and_scores_come_out(shared_system: System, rows: Rows, convert: Any) -> None:
    """Whatever has numbers in it."""

    async def ask() -> None:
        async with Client(shared_system.url) as client:
            scores = await client.score("ctr", dense=convert(rows.dense), sparse=convert(rows.ids))
            assert scores.dtype == np.float32
            assert right(scores, rows)
            assert right(await client.score("ctr", dense=rows.dense, sparse=rows.ids.astype(np.int64)), rows)
            assert (await client.describe("ctr")).spec.n_sparse == 26
            assert [ref.name for ref in client.models()] == ["ctr"]

    uvloop.run(ask())


def test_multi_hot_rows_go_in_as_values_and_lengths(shared_system: System, criteo_model: Path) -> None:
    """Users have histories, not one click each."""
    batch = random_batch(read_spec(criteo_model), 20, seed=9, bag=3)
    scores = np.empty(20, np.float32)
    reference.load(criteo_model).run(batch, scores)
    with BlockingClient(shared_system.url) as client:
        found = client.score("ctr", dense=batch.dense, values=batch.ids, lengths=batch.lengths)
    assert isinstance(batch, RaggedBatch)
    assert np.allclose(found, scores, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "inputs",
    [{}, {"sparse": [[1]], "values": [1], "lengths": [[1]]}, {"values": [1]}, {"sparse": [[0.5]]}, {"sparse": [["a"]]}],
)
def test_arrays_that_make_no_request_are_a_value_error(inputs: dict[str, Any]) -> None:
    """They are the program's own mistake; nothing needs to be sent to know."""
    with pytest.raises(ValueError):
        make_request([[0.0]], **inputs)


def test_what_the_server_refuses_is_raised_with_its_reason(shared_system: System, rows: Rows) -> None:
    """The same words as over every other door."""
    with BlockingClient(shared_system.url) as client:
        with pytest.raises(Refused, match=r"'sparse' \[0, 0\] is 1000; expected an id from 0 to 999") as told:
            client.score("ctr", dense=rows.dense[:1], sparse=np.full((1, 26), 1_000))
        assert told.value.fault is Fault.INVALID_ARGUMENT
        for model, version in (("nobody", ""), ("ctr", "2"), ("no name", ""), ("ctr.1", "")):
            with pytest.raises(Refused) as told:
                client.score(model, dense=rows.dense, sparse=rows.ids, version=version)
            assert told.value.fault is Fault.NOT_FOUND


def test_an_id_or_a_tenants_name_that_is_too_long_is_refused(shared_system: System, rows: Rows) -> None:
    """Sent, it would spoil the message in which others' requests travel."""
    one = rows.part(0)

    async def refusal(**too_long: str) -> Refused:
        async with Client(shared_system.url) as client:
            with pytest.raises(Refused) as told:
                await client.infer("ctr", make_request(one.dense, one.ids, **too_long))
        return told.value

    for most, too_long in ((128, {"tenant": "x" * 129}), (256, {"id": "x" * 257})):
        told = asyncio.run(refusal(**too_long))
        assert told.fault is Fault.INVALID_ARGUMENT
        assert f"expected at most {most}" in told.detail


def test_a_tenant_is_counted(shared_system: System, rows: Rows) -> None:
    """The longest name that there may be, nearly."""
    one = rows.part(0)
    with BlockingClient(shared_system.url) as client:
        assert right(client.score("ctr", dense=one.dense, sparse=one.ids, tenant="ann" * 42), one)
    (batcher,) = shared_system.actors("batcher")
    assert batcher.registry.get_sample_value("narsil_tenant_rows_total", {"tenant": "ann" * 42}) == 1


class Scripted:
    """In a requester's place: ends one request after the other as it is told."""

    def __init__(self, *ends: Fault | None) -> None:
        self._ends = list(ends)
        self.budgets_us: list[int] = []

    async def ask(self, model: str, version: str, request: InferRequest) -> InferAnswer:
        self.budgets_us.append(request.budget_us)
        end = self._ends.pop(0)
        if end is None:
            return InferAnswer(request.id)
        if len(self.budgets_us) % 2:
            raise Refused(end, "as told", 1_000)
        return InferAnswer(request.id, fault=end.name, detail="as told", retry_after_us=1_000)


def scripted(*ends: Fault | None) -> tuple[Client, Scripted]:
    client, script = Client(), Scripted(*ends)
    client._requester = script  # type: ignore[assignment]
    return client, script


@pytest.mark.parametrize("fault", [fault for fault in Fault if fault.retry])
def test_a_request_is_sent_again_where_the_table_says_that_it_helps(fault: Fault) -> None:
    """All tries share one budget."""
    client, script = scripted(fault, fault, None)
    asyncio.run(client.infer("ctr", InferRequest("mine", ())))
    assert len(script.budgets_us) == 3
    assert script.budgets_us == sorted(script.budgets_us, reverse=True)


@pytest.mark.parametrize("fault", [fault for fault in Fault if not fault.retry])
def test_a_request_is_sent_once_where_it_says_that_it_does_not(fault: Fault) -> None:
    """A wrong request stays wrong; an expired one stays late."""
    client, script = scripted(fault, None)
    assert fault_of(client.infer("ctr", InferRequest("mine", ()))) is fault
    assert len(script.budgets_us) == 1


def test_retries_end_with_the_budget_or_when_they_are_not_wanted() -> None:
    """The caller's time is the caller's."""
    client, script = scripted(*[Fault.UNAVAILABLE] * 100)
    started = time.monotonic()
    assert fault_of(client.infer("ctr", InferRequest("mine", ()), budget_s=0.2)) is Fault.UNAVAILABLE
    assert time.monotonic() - started < 0.3
    assert len(script.budgets_us) > 2
    client, script = scripted(Fault.UNAVAILABLE, None)
    assert fault_of(client.infer("ctr", InferRequest("mine", ()), retry=False)) is Fault.UNAVAILABLE
    assert len(script.budgets_us) == 1


def test_one_blocking_client_serves_many_threads(shared_system: System, rows: Rows) -> None:
    """Web workers and notebooks have threads, and no event loop."""
    with BlockingClient(shared_system.url) as client, ThreadPoolExecutor(16) as threads:

        def ask(row: int) -> bool:
            one = rows.part(row % 64)
            assert client.models()
            return right(client.score("ctr", dense=one.dense, sparse=one.ids, budget_s=20), one)

        assert all(threads.map(ask, range(320)))


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
def held(nats_server: NatsServer, criteo_model: Path, gate: Gate) -> Iterator[System]:
    with System(nats_server.url, criteo_model, loader=gate.load) as running:
        yield running


def test_a_thread_that_waits_while_another_closes_the_client_is_told(held: System, gate: Gate, rows: Rows) -> None:
    """It would wait for ever for an event loop that has ended."""
    ended: list[BaseException] = []

    def ask() -> None:
        try:
            client.score("ctr", dense=rows.dense, sparse=rows.ids, budget_s=60)
        except BaseException as error:
            ended.append(error)

    with gate.closed():
        with BlockingClient(held.url) as client:
            threads = [threading.Thread(target=ask) for _ in range(4)]
            for thread in threads:
                thread.start()
            until(lambda: gate.waiting, "a request is open")
        for thread in threads:
            thread.join(10)
            assert not thread.is_alive()
    assert [getattr(error, "fault", error) for error in ended] == [Fault.UNAVAILABLE] * 4
    with pytest.raises(Refused) as told:
        client.score("ctr", dense=rows.dense, sparse=rows.ids)
    assert told.value.fault is Fault.UNAVAILABLE


def test_without_a_broker_a_client_says_so(rows: Rows) -> None:
    """And where it looked."""
    with pytest.raises(Refused, match=r"127\.0\.0\.1:9"), BlockingClient("nats://127.0.0.1:9", connect_timeout_s=0.3):
        pass


def test_a_broker_that_goes_is_told_at_once_and_nothing_from_before_is_scored_after(
    nats_server: NatsServer, held: System, gate: Gate, rows: Rows
) -> None:
    """What was asked for callers who have been told UNAVAILABLE is work for nobody."""
    one = rows.part(0)

    async def ask(client: Client, budget_s: float) -> Fault | None:
        try:
            await client.score("ctr", dense=one.dense, sparse=one.ids, budget_s=budget_s, retry=False)
        except Refused as refused:
            return refused.fault
        return None

    async def scene() -> None:
        async with Client(held.url) as client:
            assert await ask(client, 20) is None
            with gate.closed():
                open_request = asyncio.create_task(ask(client, 60))
                while not gate.waiting:  # noqa: ASYNC110 nothing tells of it
                    await asyncio.sleep(0.002)
                nats_server.kill()
                started = time.monotonic()
                assert await open_request is Fault.UNAVAILABLE
                for _ in range(20):
                    assert await ask(client, 60) is Fault.UNAVAILABLE
                assert time.monotonic() - started < 5
            computed = len(gate.rows)
            nats_server.start()
            scores = await client.score("ctr", dense=rows.dense, sparse=rows.ids, budget_s=20)
            assert right(scores, rows)
            assert gate.rows[computed:] in ([64], [1, 64]), "[1]: accepted before, and its scores lost on the way"

    uvloop.run(scene())
