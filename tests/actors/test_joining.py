"""Requests are joined to a batch, and their values are looked at there: a bad one fails alone."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from narsil_stream.actors.answering import Caller
from narsil_stream.actors.decisions import Dispatch
from narsil_stream.actors.joining import join
from narsil_stream.actors.queue import ModelKey, Ticket
from narsil_stream.actors.reception import Work
from narsil_stream.core.admission import Admission
from narsil_stream.core.telemetry import text
from narsil_stream.kernels.init import criteo_spec
from narsil_stream.schemas import codec
from narsil_stream.schemas.errors import Fault, Refused
from narsil_stream.schemas.internal import Demand, Slot
from narsil_stream.schemas.wire import InferRequest
from tests.asking import Producer, infer_msgpack, metric, some_rows
from tests.doubles import Gate
from tests.support import NatsServer, System, until

SPEC = criteo_spec("m", rows=5, dim=4, bottom=(8,), top=(8,))
ADMISSION = Admission(SPEC)
WIDE = SPEC.n_sparse
KINDS = ("good", "INT64", "multi-hot", "id too large", "id negative", "NaN", "infinite")
BAD = {"id too large", "id negative", "NaN", "infinite"}
PATIENT_US = 20_000_000


def request(kind: str, rows: int, value: int) -> InferRequest:
    """Every good number in it is `value`, an id."""
    dense = np.full((rows, SPEC.n_dense), value, np.float32)
    ids = np.full((rows, WIDE), value, np.int64 if kind == "INT64" else np.int32)
    if kind in ("NaN", "infinite"):
        dense[-1, -1] = np.nan if kind == "NaN" else -np.inf
    if kind.startswith("id"):
        ids[-1, -1] = 5 if kind == "id too large" else -1
    inputs: dict[str, Any] = {"dense": dense, "sparse": ids}
    if kind == "multi-hot":
        lengths = np.full((rows, WIDE), 2, np.int32)
        inputs = {"dense": dense, "values": np.full(2 * rows * WIDE, value, np.int32), "lengths": lengths}
    return InferRequest("", tuple(codec.tensor(name, array) for name, array in inputs.items()))


def ticket(number: int, asked: InferRequest) -> Ticket:
    rows = ADMISSION.shaped(asked)
    return Ticket(
        number, ModelKey("m", "1", "d"), rows.count, rows.nbytes, 1, 0, 1, Work(rows, Caller("r", number, ""))
    )


@given(st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 3), st.integers(0, 4)), min_size=1, max_size=8))
def test_good_requests_keep_their_rows_and_bad_ones_are_named_and_made_harmless(
    asked: list[tuple[str, int, int]],
) -> None:
    """What a backend gets must be in range whoever was in the batch, and each error must meet its own caller."""
    requests = [request(*one) for one in asked]
    tickets = [ticket(number, one) for number, one in enumerate(requests)]
    count = sum(one.rows for one in tickets)
    decision = Dispatch(1, "e", Slot(0, 0), tickets[0].model, tickets, count, 1, Demand("b", 0, 0), False)
    batch, unsound = join("b", decision, ADMISSION)
    assert [one.id for one, _ in unsound] == [at for at, (kind, _, _) in enumerate(asked) if kind in BAD]
    for one, refused in unsound:
        with pytest.raises(Refused) as alone:
            ADMISSION.rows(requests[one.id])
        assert (refused.fault, refused.detail) == (alone.value.fault, alone.value.detail)
    shown = [(0 if kind in BAD else value, 2 if kind == "multi-hot" else 1, rows) for kind, rows, value in asked]
    dense = np.concatenate([np.full(rows * SPEC.n_dense, value, np.float32) for value, _, rows in shown])
    ids = np.concatenate([np.full(rows * WIDE * each, value, np.int32) for value, each, rows in shown])
    assert np.array_equal(np.frombuffer(batch.dense, np.float32), dense)
    assert np.array_equal(np.frombuffer(batch.ids, np.int32), ids)
    lengths = np.concatenate([np.full(rows * WIDE, each, np.int32) for _, each, rows in shown])
    if any(kind == "multi-hot" for kind, _, _ in asked):
        assert np.array_equal(np.frombuffer(batch.lengths, np.int32), lengths)
    else:
        assert not len(batch.lengths)


def test_a_bad_request_in_a_batch_is_told_what_was_wrong_and_counted_as_refused(
    nats_server: NatsServer, criteo_model: Path
) -> None:
    """It is noticed when the batch is made, after it was queued: it must end all the same, once, and alone."""
    gate, rows = Gate(), some_rows(criteo_model, 16)
    with System(nats_server.url, criteo_model, loader=gate.load) as system, Producer(nats_server.url) as producer:
        subject, before = "narsil.v1.infer.ctr", len(gate.rows)
        heard = producer.listen("feed.*")
        with gate.closed():
            for at in range(2):  # both slots
                producer.publish(subject, infer_msgpack(rows.part(at), budget_us=PATIENT_US), f"feed.{at}")
                until(lambda want=at + 1: system.actors("executor")[0].endpoints()[0].num_requests >= want, "a batch")
            for at in range(2, 16):
                one = rows.part(at)
                if at % 2:
                    one = one._replace(ids=np.full((1, 26), 1_000, np.int32))
                producer.publish(subject, infer_msgpack(one, budget_us=PATIENT_US), f"feed.{at}")
            (batcher,) = system.actors("batcher")
            until(lambda: metric(text(batcher.registry), "narsil_queue_rows") == 14, "they wait together")
        for _ in range(16):
            message = producer.next(heard)
            at, answer = int(message.subject.rpartition(".")[2]), codec.decode_answer(message.data)
            if at > 1 and at % 2:
                assert answer.fault == Fault.INVALID_ARGUMENT.name
                assert "'sparse' [0, 0] is 1000; expected an id from 0 to" in answer.detail
            else:
                assert np.allclose(codec.array(answer.outputs[0]), rows.scores[at], rtol=0, atol=1e-6)
        assert gate.rows[before:] == [1, 1, 14]
        counts = {
            how: metric(text(batcher.registry), "narsil_requests_total", outcome=how) for how in ("answered", "refused")
        }
        assert counts == {"answered": 9, "refused": 7}
