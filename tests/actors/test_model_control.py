"""Models that come, are replaced and go while callers ask: what a client of the repository extension would notice."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from narsil_stream.schemas.errors import Fault
from tests.actors.repositories import Start, ask, make, request, scored
from tests.asking import some_rows
from tests.door import Door
from tests.doubles import Gate, Loads
from tests.faults.traffic import Traffic
from tests.support import NatsServer, System, until

MANY = 300


def test_a_load_serves_the_newest_version_at_once_and_an_unload_ends_it(
    start: Start, nats_server: NatsServer, repository: Path
) -> None:
    """Clients ask for scores right after the verb has returned."""
    make(repository / "a", "m", "9")
    newest = make(repository / "m" / "any", "m", "10", seed=2)
    loads = Loads()
    start(loader=loads.load)
    rows = some_rows(newest, 3)
    with Door(nats_server.url) as door:
        assert door.inference.ready, "a system without a model can be told to load one"
        assert ask(door, "m", rows).fault == Fault.NOT_FOUND.name
        assert door.index() == {("m", "9"): "UNAVAILABLE", ("m", "10"): "UNAVAILABLE"}
        for _ in range(3):
            door.load("m")
            answer = ask(door, "m", rows)
            assert scored(answer, rows) and answer.version == "10"
            assert door.index(ready=True) == {("m", "10"): "READY"}
            door.unload("m", unload_dependents=True)
            assert ask(door, "m", rows).fault == Fault.NOT_FOUND.name
            assert door.index() == {("m", "9"): "UNAVAILABLE", ("m", "10"): "UNAVAILABLE"}
            assert door.reason("m", "10") == "unloaded"
            assert loads.in_memory == 0
        assert len(loads.begun) == 3


def test_loads_and_unloads_of_one_model_do_not_touch_callers_of_another(
    start: Start, nats_server: NatsServer, repository: Path
) -> None:
    """A rollout of one model that fails requests of another would have to wait for the night."""
    first = make(repository / "first", "first")
    make(repository / "second", "second", seed=2)
    start(load="first")
    with Door(nats_server.url) as door, Traffic(first, nats=nats_server.url) as traffic:
        for _ in range(3):
            door.load("second")
            traffic.answered(MANY)
            door.unload("second")
            traffic.answered(MANY)
    assert not traffic.bad, traffic.ended


def test_new_weights_take_over_under_load_and_no_request_is_lost(
    start: Start, nats_server: NatsServer, repository: Path, tmp_path: Path
) -> None:
    """Each answer is by the old weights or by the new ones; once the verb has returned, by the new ones alone."""
    old, new = make(tmp_path / "old", "m", seed=1), make(tmp_path / "new", "m", seed=2)
    loads = Loads()
    served = repository / "m"
    shutil.copytree(old, served)
    start(load="m", loader=loads.load, executors=2, batchers=2)
    with Door(nats_server.url) as door, Traffic(old, nats=nats_server.url, other=new) as traffic:
        for before, after, seed in (("right", "other", 2), ("other", "right", 1)):
            traffic.answered(MANY)
            assert traffic.ended[before]
            make(served, "m", seed=seed)
            door.load("m")
            with Traffic(old, nats=nats_server.url, other=new) as later:
                later.answered(MANY)
            assert not later.ended[before], "answered by weights that were replaced before it was asked"
            assert later.ended[after]
            assert loads.in_memory == 2, "one copy for each executor"
        traffic.answered(MANY)
    assert not traffic.bad, traffic.ended
    assert not later.bad, later.ended


def test_a_newer_version_takes_the_place_of_an_older_one_under_load(
    start: Start, nats_server: NatsServer, repository: Path
) -> None:
    """Who names no version gets the newest; the memory of the old one is free."""
    old = make(repository / "m" / "1", "m", "1")
    loads = Loads()
    start(load="m", loader=loads.load)
    new = make(repository / "m" / "2", "m", "2", seed=2)
    with Door(nats_server.url) as door, Traffic(old, nats=nats_server.url, other=new) as traffic:
        traffic.answered(MANY)
        assert not traffic.ended["other"]
        door.load("m")
        traffic.answered(MANY)
        assert door.index() == {("m", "1"): "UNAVAILABLE", ("m", "2"): "READY"}
        assert loads.in_memory == 1
    assert not traffic.bad, traffic.ended
    assert traffic.ended["other"]


def test_an_unload_under_load_ends_each_request_once(start: Start, nats_server: NatsServer, repository: Path) -> None:
    """Scores, or a clear error; and after a load, scores again."""
    model = make(repository / "m", "m")
    start(load="m", executors=2)
    with Door(nats_server.url) as door, Traffic(model, nats=nats_server.url) as traffic:
        traffic.answered(MANY)
        door.unload("m")
        traffic.until_ended(Fault.NOT_FOUND.name)
        door.load("m")
        traffic.answered(MANY)
    assert set(traffic.bad) <= {Fault.NOT_FOUND.name, Fault.UNAVAILABLE.name}, traffic.ended


def test_what_was_admitted_before_an_unload_is_answered_and_what_comes_later_is_refused_at_once(
    start: Start, nats_server: NatsServer, repository: Path
) -> None:
    """A queue may hold seconds of work: it must neither be thrown away nor grow."""
    model = make(repository / "m", "m")
    gate = Gate()
    system = start(load="m", loader=gate.load)
    rows = some_rows(model, 40)
    with Door(nats_server.url) as door, ThreadPoolExecutor(1) as threads:
        with gate.closed():
            (batcher,) = system.actors("batcher")
            asked = []
            for slot in range(2):
                asked.append(door.ask("m", request(rows.part(slot))))
                until(lambda: sum(len(e.flights) for e in batcher.policy.executors.values()) == len(asked), "a batch")
            asked += [door.ask("m", request(rows.part(row))) for row in range(2, 40)]
            until(lambda: batcher.policy.rows == 38, "a queue")
            unloading = threads.submit(door.unload, "m")
            until(lambda: door.index()[("m", "1")] == "UNLOADING", "the unload")
            until(lambda: ask(door, "m", rows.part(0)).fault == Fault.NOT_FOUND.name, "later requests are refused")
            assert not unloading.done()
        answers = [future.result(20) for future in asked]
        assert all(scored(answer, rows.part(row)) for row, answer in enumerate(answers))
        unloading.result(20)


def test_requests_are_never_scored_by_weights_that_they_were_not_checked_for(
    start: Start, nats_server: NatsServer, repository: Path
) -> None:
    """An id that the old table has and the new one has not would read past its end."""
    make(repository / "m", "m", rows=1_000)
    rows = some_rows(repository / "m", 8)
    gate = Gate()
    system = start(load="m", loader=gate.load)
    with Door(nats_server.url) as door, ThreadPoolExecutor(1) as threads:
        with gate.closed():
            asked = [door.ask("m", request(rows.part(row))) for row in range(8)]
            until(lambda: gate.waiting, "a batch")
            make(repository / "m", "m", seed=2, rows=5)
            loading = threads.submit(door.load, "m")
            (executor,) = system.actors("executor")
            until(lambda: executor._shelf.retiring, "the new weights")
            # INT64 is checked on arrival, INT32 when its batch is made.
            wide = rows.part(0)._replace(ids=rows.ids[:1].astype(np.int64))
            until(lambda: ask(door, "m", wide).fault == Fault.INVALID_ARGUMENT.name, "checked for the new ones")
            late = door.ask("m", request(rows.part(0)))
        assert late.result(20).fault == Fault.INVALID_ARGUMENT.name
        assert all(scored(future.result(20), rows.part(row)) for row, future in enumerate(asked))
        loading.result(20)


def test_loads_of_one_model_at_once_read_it_once(start: Start, nats_server: NatsServer, repository: Path) -> None:
    """Several deployers that retry must not fill the memory with copies."""
    model = make(repository / "m", "m")
    loads = Loads()
    start(loader=loads.load)
    with Door(nats_server.url) as door, ThreadPoolExecutor(8) as threads:
        for done in [threads.submit(door.load, "m") for _ in range(8)]:
            done.result(20)
        rows = some_rows(model, 2)
        assert scored(ask(door, "m", rows), rows)
    assert len(loads.begun) == 1


def test_others_are_scored_while_a_load_takes_its_time(start: Start, nats_server: NatsServer, repository: Path) -> None:
    """A load of minutes must hold up neither heartbeats nor batches."""
    first = make(repository / "first", "first")
    make(repository / "second", "second")
    loads = Loads()
    start(load="first", loader=loads.load)
    with Door(nats_server.url) as door, ThreadPoolExecutor(1) as threads:
        with loads.held():
            loading = threads.submit(door.load, "second")
            until(lambda: len(loads.begun) == 2, "the load")
            with Traffic(first, nats=nats_server.url) as traffic:
                traffic.answered(MANY)
            assert door.index() == {("first", "1"): "READY", ("second", "1"): "LOADING"}
            assert not loading.done()
        loading.result(20)
    assert not traffic.bad, traffic.ended


def test_a_model_that_goes_waits_for_the_batches_that_compute_at_once(
    start: Start, nats_server: NatsServer, repository: Path
) -> None:
    """Memory that is freed under a running batch is read all the same, and scores are nonsense."""
    served = make(repository / "m", "m")
    gate = Gate(lanes=2)
    start(load="m", loader=gate.load)
    rows = some_rows(served, 3)
    with Door(nats_server.url) as door, ThreadPoolExecutor(1) as threads:
        with gate.closed():
            asked = []
            for i in range(3):
                asked.append(door.ask("m", request(rows.part(i))))
                until(lambda i=i: gate.waiting == min(i + 1, 2), "a batch computes")  # type: ignore[misc]
            unloading = threads.submit(door.unload, "m")
            until(lambda: not door.index(ready=True), "the model is offered no more")
            assert not unloading.done()
        assert all(scored(answer.result(20), rows.part(i)) for i, answer in enumerate(asked))
        unloading.result(20)
    assert gate.most == 2


def test_in_one_process_too_models_come_and_go(start: Start, nats_server: NatsServer, repository: Path) -> None:
    """Inline, nothing crosses the broker: questions and answers are handed over."""
    model = make(repository / "m", "m")
    system = start(mode="inline", gateways=1)
    rows = some_rows(model, 2)
    (gateway,) = system.actors("gateway")
    inference = gateway._inference
    door = InlineDoor(system, inference)
    door.load("m")
    answer = ask(door, "m", rows)
    assert scored(answer, rows)
    (counted,) = door.statistics("m")
    assert (counted.inference_count, counted.execution_count) == (2, 1)
    assert door.index() == {("m", "1"): "READY"}
    door.unload("m")
    assert ask(door, "m", rows).fault == Fault.NOT_FOUND.name


class InlineDoor(Door):
    """The one of a gateway that runs already."""

    def __init__(self, system: System, inference: Any) -> None:
        self.inference = inference
        self.submit = system.submit  # type: ignore[method-assign]
