"""`narsil tune` on a real system: limits change while it runs, and stay changed for who comes later."""

import asyncio
import json

import nats
import pytest
from msgspec.structs import replace

from narsil_stream.core.client import BlockingClient
from narsil_stream.core.config import BatchConfig, Config
from narsil_stream.schemas import subjects
from narsil_stream.schemas.errors import Fault, Refused
from tests.asking import some_rows
from tests.support import NatsServer, System, invoke, until


def tune(system: System, *arguments: str) -> list[dict[str, dict[str, int]]]:
    """What each process answered."""
    result = invoke("tune", "--json", "--nats-url", system.url, *arguments)
    assert result.exit_code == 0, result.output
    answers: list[dict[str, dict[str, int]]] = json.loads(result.stdout)
    return answers


def test_a_limit_that_is_changed_holds_for_the_next_request_and_is_given_back(system: System, criteo_model):
    """At 3 a.m. nobody wants to restart what is under load."""
    rows = some_rows(criteo_model, 20)
    with BlockingClient(system.url) as client:
        assert len(client.score("ctr", dense=rows.dense, sparse=rows.ids)) == 20
        tune(system, "batch.max_rows=10")
        with pytest.raises(Refused, match="expected at most 10") as refused:
            client.score("ctr", dense=rows.dense, sparse=rows.ids)
        assert refused.value.fault is Fault.TOO_LARGE
        tune(system, "--reset", "batch.max_rows")
        assert len(client.score("ctr", dense=rows.dense, sparse=rows.ids)) == 20


def test_all_that_can_be_changed_is_shown_with_what_differs_from_the_configuration(system: System):
    """Who takes over has to see what the last one did."""
    tune(system, "batch.linger_us=300")
    result = invoke("tune", "--nats-url", system.url)
    (linger,) = [line for line in result.stdout.splitlines() if line.startswith("batch.linger_us")]
    assert linger.split() == ["batch.linger_us", "300", "live"]
    (budget,) = [line for line in result.stdout.splitlines() if line.startswith("batch.max_budget_us")]
    assert "live" not in budget


def test_gateways_take_it_too(nats_server: NatsServer, criteo_model):
    """A default budget counts where a request comes in."""
    with System(nats_server.url, criteo_model, gateways=1, grpc_gateways=1) as system:
        answers = tune(system, "batch.default_budget_us=5000", "batch.stale_grace_us=0")
    assert len(answers) == 3
    assert all(answer["set"] == {"batch.default_budget_us": 5_000, "batch.stale_grace_us": 0} for answer in answers)


def test_who_starts_later_hears_of_it(system: System, criteo_model):
    """A batcher that was killed would come back with the limit that made the trouble."""
    tune(system, "batch.linger_us=300")
    with System(system.url, criteo_model, gateways=1):
        until(
            lambda: [answer["values"]["batch.linger_us"] for answer in tune(system)] == [300, 300, 300],
            "the newcomers have it",
        )


def test_an_actor_that_is_replaced_after_a_failure_keeps_it(system: System):
    """The runtime makes a new one from the configuration it was started with."""
    tune(system, "batch.linger_us=300")
    (batcher,) = system.actors("batcher")
    batcher.turn = lambda: 1 // 0  # type: ignore[method-assign]
    until(lambda: batcher not in system.actors("batcher"), "another one is there")
    (fresh,) = system.actors("batcher")
    assert fresh.policy.rules.linger_us == 300  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("change", "status", "told"),
    [
        ("batch.linger=1", 2, "did you mean batch.linger_us?"),
        ("batch.linger_us=soon", 2, "expected a whole number from 0 to 1000000"),
        ("http.port=80", 2, "does not change while actors run"),
        ("batch.linger_us", 2, "expected KEY=VALUE"),
        ("batch.queue_rows=20", 1, "must hold at least one full batch"),
        ("batch.max_rows=5000", 1, "prepared for batches of up to 4096 rows"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason_and_changes_nothing(
    shared_system: System, change: str, status: int, told: str
):
    """Half of a change would be worse than none."""
    before = tune(shared_system)
    result = invoke("tune", "--nats-url", shared_system.url, "batch.linger_us=7", change)
    assert (result.exit_code, told in result.stderr) == (status, True), result.output
    assert tune(shared_system) == before


def test_any_nats_client_can_do_it(system: System):
    """`nats req` from a shell, or a script in any language; what is no request of this kind says so."""

    async def ask(*payloads: bytes) -> list[dict[str, object]]:
        client = await nats.connect(system.url)
        answers = [json.loads((await client.request(subjects.TUNE, one)).data) for one in payloads]
        await client.close()
        return answers

    changed, older, ahead, wrong, unknown = asyncio.run(
        ask(
            b'{"set": {"batch.linger_us": 200}}',
            b'{"set": {"batch.linger_us": 100}, "at_us": 1}',
            b'{"set": {"batch.linger_us": 100}, "at_us": 9000000000000000}',
            b'{"set": [1]}',
            b'{"reset": ["batch.linger"]}',
        )
    )
    assert changed["set"] == {"batch.linger_us": 200} and not changed["fault"]
    for refused in (older, ahead, wrong, unknown):
        assert refused["fault"] == "INVALID_ARGUMENT" and refused["detail"]
        assert refused["set"] == {"batch.linger_us": 200}


def test_without_a_system_the_next_step_is_named(nats_server: NatsServer):
    """Silence would read as success."""
    result = invoke("tune", "--nats-url", nats_server.url, "batch.linger_us=1")
    assert result.exit_code == 1
    assert "nobody on it answered" in result.stderr and "narsil serve" in result.stderr


def test_what_was_configured_is_what_a_reset_goes_back_to(nats_server: NatsServer, criteo_model):
    """And not what the schema has as default."""
    config = replace(Config(), batch=BatchConfig(linger_us=50))
    with System(nats_server.url, criteo_model, config=config) as system:
        tune(system, "batch.linger_us=60")
        (answer,) = tune(system, "--reset", "all")
    assert answer["values"]["batch.linger_us"] == 50 and answer["set"] == {}
