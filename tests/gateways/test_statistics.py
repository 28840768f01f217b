"""Triton's statistics: what was asked, over whichever door and batcher, is what is counted."""

import time
from pathlib import Path

import msgspec
import numpy as np
import pytest
from msgspec.structs import asdict
from numpy.typing import NDArray

from narsil_stream.actors.statistics import EXACT_ROWS, counted_size
from narsil_stream.core.statistics import merged
from narsil_stream.kernels import reference
from narsil_stream.kernels.backend import Backend, RaggedBatch
from narsil_stream.schemas import codec
from narsil_stream.schemas.errors import Fault, Refused
from narsil_stream.schemas.oip import (
    BatchStatistics,
    Duration,
    InferStatistics,
    ModelStatistics,
    StatisticsReport,
)
from narsil_stream.schemas.wire import InferRequest
from tests.asking import Producer, Rows, infer_json, some_rows
from tests.door import Door
from tests.doubles import Gate, GatedBackend
from tests.support import NatsServer, System, until

INFER = "narsil.v1.infer.ctr"


def request(rows: Rows, **fields: int) -> InferRequest:
    return InferRequest("", (codec.tensor("dense", rows.dense), codec.tensor("sparse", rows.ids)), **fields)


def counted(door: Door, model: str = "ctr") -> ModelStatistics:
    (only,) = door.statistics(model)
    return only


def test_what_two_batchers_count_adds_up_to_what_was_asked(nats_server: NatsServer, criteo_model: Path) -> None:
    """Requests over NATS never meet a gateway, and each batcher sees only some: nobody else knows the sum."""
    rows = some_rows(criteo_model, 60)
    began_ms = time.time_ns() // 1_000_000
    with (
        System(nats_server.url, criteo_model, batchers=2) as system,
        Door(nats_server.url) as door,
        Producer(nats_server.url) as producer,
    ):
        assert counted(door) == ModelStatistics("ctr", "1"), "a model that nobody asked is there, with zeros"
        futures = [door.ask("ctr", request(rows.part(*range(at, at + 1 + at % 3)))) for at in range(40)]
        assert not any(future.result(20).fault for future in futures)
        for at in range(20):
            assert b"scores" in producer.ask(INFER, infer_json(rows.part(at, at + 20))).data
        wrong = replace_ids(rows.part(0))
        assert door.ask("ctr", request(wrong)).result(20).fault == Fault.INVALID_ARGUMENT.name
        assert b"INVALID_ARGUMENT" in producer.ask(INFER, infer_json(wrong)).data
        assert b"NOT_FOUND" in producer.ask("narsil.v1.infer.nobody", infer_json(rows.part(0))).data
        batchers = system.actors("batcher")
        under_way = lambda: any(one.registry.get_sample_value("narsil_in_flight") for one in batchers)  # noqa: E731
        until(lambda: not under_way(), "the batch of the wrong row, which was refused before, is computed")
        total = counted(door)
        shares = [batcher._endings.counts.report() for batcher in batchers]
        (same,) = door.statistics()
    assert all(b'"success":{"count":0' not in share for share in shares), "both batchers had a share"
    assert same == total
    assert total.inference_count == sum(1 + at % 3 for at in range(40)) + 20 * 2
    assert began_ms <= total.last_inference <= time.time_ns() // 1_000_000
    spans = asdict(total.inference_stats)
    counts = {name: span.count for name, span in spans.items()}
    assert counts.pop("fail") == 2
    assert (counts.pop("cache_hit"), counts.pop("cache_miss")) == (0, 0)
    assert set(counts.values()) == {60}, counts
    assert all(spans[name].ns > 0 for name in counts)
    parts_ns = sum(spans[name].ns for name in counts if name != "success")
    assert parts_ns <= spans["success"].ns + spans["compute_output"].ns
    assert 1 <= total.execution_count <= 60
    assert sum(batch.compute_infer.count for batch in total.batch_stats) == total.execution_count
    computed = sum(batch.batch_size * batch.compute_infer.count for batch in total.batch_stats)
    # A row whose id was found bad when its batch was made is computed, as zeros, beside the others.
    assert computed - total.inference_count in (0, 1)


def replace_ids(rows: Rows) -> Rows:
    """With an id that no table has."""
    return rows._replace(ids=np.full_like(rows.ids, 10**6))


class Failing(GatedBackend):
    """Fails once its gate has opened."""

    def run(self, batch: RaggedBatch, scores: NDArray[np.float32]) -> None:
        super().run(batch, scores)
        raise RuntimeError("the device is gone")


def test_a_failure_is_no_success_whatever_it_comes_from(nats_server: NatsServer, criteo_model: Path) -> None:
    """A failed pass, a budget that ran out, a caller who left: dashboards divide by the count of successes."""
    gate = Gate()
    rows = some_rows(criteo_model, 1)

    def load(artifact: Path) -> Backend:
        return Failing(reference.load(artifact), gate)

    with System(nats_server.url, criteo_model, loader=load) as system, Door(nats_server.url) as door:
        assert door.ask("ctr", request(rows)).result(20).fault == Fault.INTERNAL.name
        with gate.closed():
            late = door.ask("ctr", request(rows, budget_us=100_000))
            assert late.result(20).fault == Fault.DEADLINE_EXCEEDED.name
            gone = door.ask("ctr", request(rows, budget_us=20_000_000))
            (batcher,) = system.actors("batcher")
            until(lambda: batcher._endings.open, "the caller who will leave")
            gone.cancel()
            total = until(lambda: (c := counted(door)).inference_stats.fail.count == 3 and c, "three failures")
    stats = total.inference_stats
    assert stats.fail.ns >= 100_000_000
    assert stats.success == stats.queue == stats.compute_infer == Duration()
    assert (total.inference_count, total.execution_count, total.last_inference) == (0, 0, 0)


def test_a_version_or_model_that_nobody_serves_has_no_statistics(shared_system: System) -> None:
    """An empty answer would look like a model that nobody asks."""
    with Door(shared_system.url) as door:
        assert [one.version for one in door.statistics("ctr", "1")] == ["1"]
        for model, version in (("nobody", ""), ("ctr", "2")):
            with pytest.raises(Refused) as refused:
                door.statistics(model, version)
            assert refused.value.fault is Fault.NOT_FOUND


def test_a_batcher_that_does_not_answer_is_left_out(nats_server: NatsServer, criteo_model: Path) -> None:
    """One that has just died must not hide what the others know."""
    with System(nats_server.url, criteo_model, batchers=2) as system, Door(nats_server.url) as door:
        until(lambda: len(door.inference._requester._router.peers) == 2, "two batchers")
        silent, other = system.actors("batcher")
        system.submit(silent._bus.unsubscribe(f"narsil.v1.statistics.{silent.name}", owner=silent)).result(20)
        rows = some_rows(criteo_model, 1)
        for future in [door.ask("ctr", request(rows)) for _ in range(64)]:
            assert not future.result(20).fault
        (share,) = msgspec.json.decode(other._endings.counts.report(), type=StatisticsReport).model_stats
        assert 0 < share.inference_count < 64
        assert counted(door) == share


def test_merging_adds_every_number_and_takes_the_latest_time() -> None:
    """A field that is left out would be wrong only with two batchers, where nobody looks."""

    def report(scale: int, *sizes: int) -> StatisticsReport:
        def spans(first: int, names: tuple[str, ...]) -> dict[str, Duration]:
            return {name: Duration(scale * (first + i), scale * 100 * (first + i)) for i, name in enumerate(names)}

        batches = [BatchStatistics(size, **spans(size, BatchStatistics.__struct_fields__[1:])) for size in sizes]
        stats = InferStatistics(**spans(1, InferStatistics.__struct_fields__))
        return StatisticsReport((ModelStatistics("m", "1", 10 * scale, 7 * scale, 5 * scale, stats, batches),))

    (both,) = merged([report(1, 1, 4), report(2, 2, 4)]).values()
    (triple,) = report(3, 4).model_stats
    assert both.last_inference == 20
    assert (both.inference_count, both.execution_count) == (21, 15)
    assert both.inference_stats == triple.inference_stats
    assert [batch.batch_size for batch in both.batch_stats] == [1, 2, 4]
    assert both.batch_stats[2] == triple.batch_stats[0]


def test_batch_sizes_are_exact_where_it_matters_and_few_where_it_does_not() -> None:
    """With each size told apart a report could outgrow a message, and then there is none."""
    sizes = [counted_size(rows) for rows in range(1, 65_537)]
    assert sizes[:EXACT_ROWS] == list(range(1, EXACT_ROWS + 1))
    assert sizes == sorted(sizes)
    assert all(rows <= size <= rows * 33 / 32 for rows, size in enumerate(sizes, 1))
    assert len(set(sizes)) == EXACT_ROWS + 32 * 8
    assert sizes[-1] == 65_536
