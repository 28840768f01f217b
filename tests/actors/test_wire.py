"""The public subjects as any NATS client meets them: what is asked, what is answered, and to whom."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nats
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from narsil_stream.core.actor import Actor
from narsil_stream.schemas import codec, subjects
from narsil_stream.schemas.errors import Fault
from narsil_stream.schemas.wire import InferRequest
from tests.asking import Producer, RawProducer, Rows, infer_json, infer_msgpack, json_scores, some_rows
from tests.support import PATIENCE_S, System, until

SUBJECT = "narsil.v1.infer.ctr"


@pytest.fixture(scope="module")
def rows(criteo_model: Path) -> Rows:
    return some_rows(criteo_model, 16)


@pytest.fixture(scope="module")
def producer(shared_system: System) -> Iterator[Producer]:
    with Producer(shared_system.url) as running:
        yield running


@pytest.fixture
def batcher(shared_system: System) -> Actor[Any]:
    (only,) = shared_system.actors("batcher")
    return only


def counted(actor: Actor[Any], name: str, **labels: str) -> float:
    return actor.registry.get_sample_value(name, labels) or 0.0


def right(answer: Any, rows: Rows) -> bool:
    """Whether an answer in either spelling holds the scores of these rows."""
    decoded = codec.decode_answer(answer.data)
    assert not decoded.fault, decoded
    return bool(np.allclose(codec.array(decoded.outputs[0]), rows.scores, rtol=0, atol=1e-6))


def fault(answer: Any) -> Fault:
    """Of an answer with an error, whose headers say the same."""
    decoded = codec.decode_answer(answer.data)
    assert answer.headers["Nats-Service-Error"]
    assert int(answer.headers["Nats-Service-Error-Code"]) == Fault[decoded.fault].http
    return Fault[decoded.fault]


@pytest.mark.parametrize("subject", [SUBJECT, f"{SUBJECT}.1"])
def test_json_is_answered_in_json(producer: Producer, rows: Rows, subject: str) -> None:
    """A shell and `nats req` are enough to use all this."""
    answer = producer.ask(subject, infer_json(rows, id="mine"))
    said = json.loads(answer.data)
    assert (said["id"], said["model_name"], said["model_version"]) == ("mine", "ctr", "1")
    assert np.allclose(json_scores(said), rows.scores, rtol=0, atol=1e-6)
    assert not answer.headers


@pytest.mark.parametrize("subject", [SUBJECT, f"{SUBJECT}.1"])
def test_msgpack_is_answered_in_msgpack(producer: Producer, rows: Rows, subject: str) -> None:
    """The spelling for who is in a hurry."""
    answer = producer.ask(subject, infer_msgpack(rows, id="mine"))
    assert codec.spelling_of(answer.data) is codec.Spelling.MSGPACK
    assert codec.decode_answer(answer.data).id == "mine"
    assert right(answer, rows)


@pytest.mark.parametrize(
    ("subject", "expected"),
    [
        ("narsil.v1.infer.nobody", Fault.NOT_FOUND),
        (f"{SUBJECT}.2", Fault.NOT_FOUND),
        (f"{SUBJECT}.1.1", Fault.NOT_FOUND),
        ("narsil.v1.infer.\u00e9", Fault.NOT_FOUND),
        (f"narsil.v1.infer.{'x' * 3_000}", Fault.NOT_FOUND),
    ],
)
@pytest.mark.parametrize("spell", [infer_json, infer_msgpack])
def test_a_model_that_nobody_serves_is_said_to_be_none(
    producer: Producer, rows: Rows, subject: str, expected: Fault, spell: Any
) -> None:
    """A producer with a typing error would otherwise wait for its timeout."""
    assert fault(producer.ask(subject, spell(rows))) is expected


def test_an_error_is_answered_in_the_questions_spelling_with_nats_service_headers(
    producer: Producer, rows: Rows
) -> None:
    """NATS's own tools show these headers."""
    wrong = rows._replace(ids=rows.ids[:1])
    for ask in (infer_json(wrong, id="mine"), infer_msgpack(wrong, id="mine")):
        answer = producer.ask(SUBJECT, ask)
        assert fault(answer) is Fault.INVALID_ARGUMENT
        said = codec.decode_answer(answer.data)
        assert said.id == "mine"
        assert "'sparse' has shape [1, 26]; expected [16, 26]" in said.detail
        assert (answer.data[:1] == b"{") == isinstance(ask, dict)


def test_a_request_without_a_reply_subject_is_counted_and_harms_nobody(
    producer: Producer, rows: Rows, batcher: Actor[Any]
) -> None:
    """Its scores would go nowhere, so they are not computed."""
    before = counted(batcher, "narsil_unanswerable_total", why="no reply subject")
    producer.publish(SUBJECT, infer_msgpack(rows))
    until(lambda: counted(batcher, "narsil_unanswerable_total", why="no reply subject") == before + 1, "it is counted")
    assert right(producer.ask(SUBJECT, infer_msgpack(rows)), rows)


@pytest.mark.parametrize("reply", ["narsil.v1.infer.ctr", "narsil.v1.beat.batcher", "$SRV.PING", "$JS.API.INFO"])
def test_a_reply_subject_of_ours_or_of_the_server_is_refused_and_counted(
    shared_system: System, rows: Rows, batcher: Actor[Any], reply: str
) -> None:
    """A producer would borrow the batcher's permissions, or make it ask itself for ever."""
    why = {"why": "reserved subject"}
    before = counted(batcher, "narsil_unanswerable_total", **why)
    with Producer(shared_system.url) as producer:
        heard = producer.listen(reply)
        producer.publish(SUBJECT, infer_msgpack(rows, id="reserved"), reply)
        until(lambda: counted(batcher, "narsil_unanswerable_total", **why) == before + 1, "it is counted")
        producer.publish(reply, b"the last one")
        while (message := producer.next(heard)).data != b"the last one":
            assert b"scores" not in message.data


@pytest.mark.parametrize("reply", ["feed.scores", "narsilish", "a", "_INBOX.mine.1", "Narsil.v1"])
def test_any_other_reply_subject_works(producer: Producer, rows: Rows, reply: str) -> None:
    """Scores may go on a feed that others read."""
    heard = producer.listen(reply)
    producer.publish(SUBJECT, infer_msgpack(rows), reply)
    assert right(producer.next(heard), rows)


def test_a_request_that_was_sent_too_long_ago_is_not_scored(
    producer: Producer, rows: Rows, batcher: Actor[Any]
) -> None:
    """A reconnecting client's buffer delivers what nobody waits for any more."""
    now_us = time.time_ns() // 1_000
    scored = counted(batcher, "narsil_rows_total")
    for ask in (
        infer_msgpack(rows, budget_us=1_000_000, sent_us=now_us - 3_500_000),
        infer_json(rows, timeout=1_000_000, sent_us=now_us - 3_500_000),
    ):
        assert fault(producer.ask(SUBJECT, ask)) is Fault.DEADLINE_EXCEEDED
    assert counted(batcher, "narsil_rows_total") == scored
    late_but_in_time = infer_msgpack(rows, budget_us=1_000_000, sent_us=now_us - 2_000_000)
    assert right(producer.ask(SUBJECT, late_but_in_time), rows)


def test_a_request_from_the_future_is_scored_and_counted(producer: Producer, rows: Rows, batcher: Actor[Any]) -> None:
    """Clocks disagree: that is worth knowing and no reason to refuse."""
    before = counted(batcher, "narsil_sent_in_future_total")
    ahead = time.time_ns() // 1_000 + 60_000_000
    assert right(producer.ask(SUBJECT, infer_msgpack(rows, sent_us=ahead)), rows)
    assert counted(batcher, "narsil_sent_in_future_total") == before + 1


def test_priority_and_timeout_are_read_from_json_and_bounded(producer: Producer, rows: Rows) -> None:
    """A wrong value must not silently become the default."""
    assert right(producer.ask(SUBJECT, infer_json(rows, priority=1, timeout=5_000_000)), rows)
    for wrong in ({"priority": 256}, {"priority": -1}, {"timeout": -1}, {"timeout": 2**60}):
        assert fault(producer.ask(SUBJECT, infer_json(rows, **wrong))) is Fault.INVALID_ARGUMENT


def test_messages_at_the_limit_are_answered_and_the_connection_holds(producer: Producer, rows: Rows) -> None:
    """One byte too many, headers included, and the server cuts the connection with all that is under way on it."""
    limit = producer.nats.max_payload
    for size in (limit - 1, limit):
        body = json.dumps(infer_json(rows)).encode()
        assert right(producer.ask(SUBJECT, body + b" " * (size - len(body))), rows)
        most = (size - 1_000) // (4 * (13 + 26))
        large = infer_msgpack(Rows(np.resize(rows.dense, (most, 13)), np.resize(rows.ids, (most, 26)), rows.scores))
        assert fault(producer.ask(SUBJECT, large)) is Fault.TOO_LARGE
        bulky = codec.tensor("bulk", np.zeros(size - 100, np.uint8))
        packed = codec.encode_request(InferRequest("", (bulky,)), codec.Spelling.MSGPACK)
        assert fault(producer.ask(SUBJECT, packed + bytes(size - len(packed)))) is Fault.INVALID_ARGUMENT
    with pytest.raises(nats.errors.MaxPayloadError):
        producer.publish(SUBJECT, b" " * (limit + 1))
    assert producer.nats.is_connected
    assert right(producer.ask(SUBJECT, infer_msgpack(rows)), rows)


HEADERS = b"NATS/1.0\r\n\r\n"
HOSTILE = {
    "a subject that is not UTF-8": (b"narsil.v1.infer.\xff\xfe", b"{}", b"feed", b""),
    "a reply subject that is not UTF-8": (SUBJECT.encode(), b"{}", b"\xff\xfe", b""),
    "a subject with a vertical tab": (b"narsil.v1.infer.a\x0bb", b"{}", b"feed", b""),
    "a subject with a form feed and a number": (b"narsil.v1.infer.a\x0c1", b"{}", b"", b""),
    "a reply subject with a vertical tab": (SUBJECT.encode(), b"{}", b"fe\x0bed", b""),
    "signs that steer a terminal": (b"narsil.v1.infer.\x1b[2J\x00", b"{}", b"feed", b""),
    "empty tokens": (b"narsil.v1.infer..", b"{}", b"feed..", b""),
    "wildcards": (b"narsil.v1.infer.*", b"{}", b"feed.>", b""),
    "a reply to everybody": (SUBJECT.encode(), b"{}", b">", b""),
    "no payload": (SUBJECT.encode(), b"", b"feed", b""),
    "headers that say nothing": (SUBJECT.encode(), b"{}", b"feed", HEADERS),
    "headers that are none": (SUBJECT.encode(), b"{}", b"feed", b"NATS/1.0\r\n\xff\xfe\r\n: \r\n\r\n"),
    "a status": (SUBJECT.encode(), b"", b"feed", b"NATS/1.0 503\r\n\r\n"),
    "a status that is none": (SUBJECT.encode(), b"", b"feed", b"NATS/1.0 \xff\xff\xff x\r\n\r\n"),
}


@pytest.mark.parametrize("subject, payload, reply, headers", HOSTILE.values(), ids=HOSTILE)
def test_no_message_cuts_the_batcher_off(
    shared_system: System, rows: Rows, subject: bytes, payload: bytes, reply: bytes, headers: bytes
) -> None:
    """Whoever may publish could otherwise stop the scores of all others."""
    (runtime,) = shared_system.runtimes["batcher"]
    lost: list[str] = []
    runtime.bus.on_lost.append(lambda: lost.append("lost"))
    with RawProducer(shared_system.url) as raw, Producer(shared_system.url) as good:
        assert raw.publish(subject, payload, reply, headers).startswith((b"PONG", b"-ERR"))
        assert right(good.ask(SUBJECT, infer_msgpack(rows), timeout=2), rows)
        assert right(good.ask(SUBJECT, infer_msgpack(rows), timeout=2), rows)
    assert not lost


FUZZED = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@FUZZED
@given(data=st.data())
def test_random_bytes_are_answered_with_an_error_and_the_next_request_with_scores(
    producer: Producer, rows: Rows, data: st.DataObject
) -> None:
    """An actor that falls over takes the requests of others with it."""
    good = infer_msgpack(rows.part(0))
    at = data.draw(st.integers(0, len(good) - 1))
    hostile = data.draw(
        st.binary(max_size=200)
        | st.binary(max_size=80).map(lambda b: b"\x96" + b)
        | st.binary(max_size=80).map(lambda b: b'{"inputs":' + b)
        | st.just(good[:at])
        | st.binary(min_size=1, max_size=4).map(lambda b: good[:at] + b + good[at + len(b) :])
    )
    codec.decode_answer(producer.ask(SUBJECT, hostile).data)
    assert right(producer.ask(SUBJECT, good), rows.part(0))


def test_random_bytes_between_actors_stop_none_of_them(shared_system: System, rows: Rows) -> None:
    """These subjects are not for the public, but a broker without permissions lets everybody publish there."""
    inner = [subjects.BATCHER_BEAT, subjects.EXECUTOR_BEAT, subjects.HELLO, subjects.REPORT]
    for kind, name in (("batcher", subjects.ask), ("batcher", subjects.batcher), ("executor", subjects.executor)):
        for actor in shared_system.actors(kind):
            inner += [name(actor.name), subjects.describe(actor.name)]
    hostile = [b"", b"\xff", b"{}", b"\x93\x01\xa1x\x90", b"\x91" * 5_000, b"\x98\x06", b"\x94\x03\xa0\x91\x01\x90"]
    with Producer(shared_system.url) as producer:
        for subject in inner:
            for payload in hostile:
                producer.publish(subject, payload, "feed")
        for _ in range(3):
            assert right(producer.ask(SUBJECT, infer_msgpack(rows)), rows)


def test_batch_mates_of_bad_requests_are_unharmed(shared_system: System, rows: Rows) -> None:
    """A row that fails must fail alone."""
    with Producer(shared_system.url) as producer:
        heard = {at: producer.listen(f"feed.mates.{at}") for at in range(16)}
        for at in heard:
            bad = rows.part(at)._replace(ids=np.full((1, 26), 1_000, np.int32))
            nan = rows.part(at)._replace(dense=np.full((1, 13), np.nan, np.float32))
            for other in (bad, nan):
                producer._do(producer.nats.publish(SUBJECT, infer_msgpack(other), f"feed.bad.{at}"))
            producer._do(producer.nats.publish(SUBJECT, infer_msgpack(rows.part(at)), f"feed.mates.{at}"))
        for at, listening in heard.items():
            assert right(producer.next(listening, PATIENCE_S), rows.part(at))
