"""NATS's service API, asked as `nats micro ping|info|stats` asks: plain requests with an inbox for the answers."""

import json
import re
from typing import Any

import pytest

from tests.asking import Producer, infer_msgpack, some_rows
from tests.support import System

KINDS = ("batcher", "executor", "gateway")


def asked(system: System, subject: str, count: int) -> list[dict[str, Any]]:
    with Producer(system.url) as producer:
        return [json.loads(message.data) for message in producer.ask_all(subject, b"", count)]


@pytest.mark.parametrize("verb", ["PING", "INFO", "STATS"])
def test_every_actor_answers_a_question_to_all(shared_system: System, verb: str) -> None:
    """`nats micro ls` is the first thing that an operator of NATS tries."""
    answers = asked(shared_system, f"$SRV.{verb}", 3)
    assert {a["name"] for a in answers} == {f"narsil-{kind}" for kind in KINDS}
    assert {a["type"] for a in answers} == {f"io.nats.micro.v1.{verb.lower()}_response"}
    for answer in answers:
        assert re.fullmatch(r"\d+\.\d+\.\d+", answer["version"])
        assert answer["metadata"] == {}


@pytest.mark.parametrize("verb", ["PING", "INFO", "STATS"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_is_asked_by_name_and_by_id(shared_system: System, verb: str, kind: str) -> None:
    """`nats micro info NAME ID` asks this way."""
    (actor,) = shared_system.actors(kind)
    (by_name,) = asked(shared_system, f"$SRV.{verb}.narsil-{kind}", 1)
    (by_id,) = asked(shared_system, f"$SRV.{verb}.narsil-{kind}.{actor.name}", 1)
    assert by_name["id"] == by_id["id"] == actor.name


def test_info_names_the_endpoints_and_stats_count_what_was_asked(shared_system: System) -> None:
    """Tools draw their tables from these fields."""
    (info,) = asked(shared_system, "$SRV.INFO.narsil-batcher", 1)
    assert info["description"] == "narsil-stream batcher"
    (endpoint,) = info["endpoints"]
    assert (endpoint["name"], endpoint["subject"]) == ("infer", "narsil.v1.infer.>")
    assert endpoint["queue_group"] == "narsil-batchers"
    (before,) = asked(shared_system, "$SRV.STATS.narsil-batcher", 1)
    rows = some_rows(shared_system._models[0], 2)
    with Producer(shared_system.url) as producer:
        producer.ask("narsil.v1.infer.ctr", infer_msgpack(rows))
        producer.ask("narsil.v1.infer.ctr", b"nonsense")
    (after,) = asked(shared_system, "$SRV.STATS.narsil-batcher", 1)
    assert after["started"] == before["started"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", after["started"])
    (was,), (now,) = before["endpoints"], after["endpoints"]
    assert now["num_requests"] - was["num_requests"] == 2
    assert now["num_errors"] - was["num_errors"] == 1
    assert now["last_error"].startswith("400: ")
    assert now["processing_time"] > was["processing_time"]
    assert now["average_processing_time"] > 0


def test_a_question_without_an_inbox_harms_nobody(shared_system: System) -> None:
    """There is nobody to answer."""
    with Producer(shared_system.url) as producer:
        producer.publish("$SRV.PING", b"")
    assert len(asked(shared_system, "$SRV.PING", 3)) == 3
