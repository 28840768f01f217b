"""Models that come, are replaced and go while callers ask: what a client of the repository extension would notice."""

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from narsil_stream.core.config import Config
from narsil_stream.kernels import reference
from narsil_stream.kernels.artifact import WEIGHTS, read, write
from narsil_stream.kernels.backend import PROTOCOL, Backend, unfit
from narsil_stream.kernels.init import criteo_spec, random_model
from narsil_stream.schemas import codec
from narsil_stream.schemas.compute import Capabilities
from narsil_stream.schemas.errors import Fault, Refused
from narsil_stream.schemas.wire import InferAnswer, InferRequest
from tests.asking import Rows, some_rows
from tests.door import Door
from tests.doubles import Gate, Loads
from tests.faults.traffic import Traffic
from tests.support import NatsServer, System, until

MANY = 300


def make(folder: Path, name: str, version: str = "1", seed: int = 1, rows: int = 50) -> Path:
    """A small artifact, in the place of one that may be there."""
    spec = replace(criteo_spec(name, rows=rows, dim=4, bottom=(8,), top=(8,)), version=version)
    write(folder, random_model(spec, seed), overwrite=True)
    return folder


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    return folder


Start = Callable[..., System]


@pytest.fixture
def start(nats_server: NatsServer, repository: Path) -> Iterator[Start]:
    """Starts a system that serves the repository under explicit control, once."""
    systems: list[System] = []

    def begin(*models: Path, control: str = "explicit", load: str = "", mode: str = "batch", **options: Any) -> System:
        config = Config(model_repository=str(repository), model_control=control, load_models=load, mode=mode)
        systems.append(System(nats_server.url, *models, config=config, **options).__enter__())
        return systems[0]

    yield begin
    for system in systems:
        system.__exit__()


@pytest.fixture
def door(nats_server: NatsServer) -> Iterator[Door]:
    """To be asked for after `start`, which it does not wait for."""
    with Door(nats_server.url) as opened:
        yield opened


def request(rows: Rows, budget_us: int = 20_000_000) -> InferRequest:
    return InferRequest("", (codec.tensor("dense", rows.dense), codec.tensor("sparse", rows.ids)), budget_us)


def scored(answer: InferAnswer, rows: Rows) -> bool:
    """Whether these are the rows' scores; False for a fault."""
    return not answer.fault and bool(np.allclose(codec.array(answer.outputs[0]), rows.scores, rtol=0, atol=1e-6))


def refusal(verb: Callable[..., None], *args: str, **parameters: Any) -> Refused:
    with pytest.raises(Refused) as refused:
        verb(*args, **parameters)
    return refused.value


def ask(door: Door, model: str, rows: Rows, version: str = "") -> InferAnswer:
    return door.ask(model, request(rows), version).result(20)


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


def damage_weights(artifact: Path) -> None:
    (artifact / WEIGHTS).write_bytes(b"\0" * 1_000)


def damage_description(artifact: Path) -> None:
    (artifact / "model.json").write_text('{"name": "m"')


@pytest.mark.parametrize("damage", [damage_weights, damage_description])
def test_a_damaged_artifact_is_named_and_the_old_weights_go_on(
    start: Start, nats_server: NatsServer, repository: Path, tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    """A bad upload must not take down what works; nor does the error say where on the machine the files are."""
    old = make(tmp_path / "old", "m")
    shutil.copytree(old, repository / "m")
    start(load="m")
    rows = some_rows(old, 2)
    with Door(nats_server.url) as door:
        make(repository / "m", "m", seed=2)
        damage(repository / "m")
        refused = refusal(door.load, "m")
        assert refused.fault is Fault.INTERNAL
        assert "'m' could not be loaded: m/" in refused.detail and "expected" in refused.detail
        assert str(tmp_path) not in refused.detail
        assert scored(ask(door, "m", rows), rows)
        assert door.index()[("m", "1")] == "READY"
        door.unload("m")
        assert refusal(door.load, "m").fault is Fault.INTERNAL
        (reason,) = (entry.reason for entry in door.do(door.inference.index(False)) if entry.state == "UNAVAILABLE")
        assert "expected" in reason and str(tmp_path) not in reason


def test_a_backend_that_fails_to_load_is_no_end_of_the_executor(
    start: Start, nats_server: NatsServer, repository: Path
) -> None:
    """A device without room for a second model must go on with the first."""
    first = make(repository / "first", "first")
    make(repository / "second", "second")

    def load(artifact: Path) -> Backend:
        if artifact.name == "second":
            raise MemoryError("secret address 0x1234")
        return reference.load(artifact)

    start(load="*", loader=load)
    rows = some_rows(first, 1)
    with Door(nats_server.url) as door:
        refused = refusal(door.load, "second")
        assert refused.fault is Fault.INTERNAL
        assert "MemoryError" in refused.detail and "secret" not in refused.detail
        assert scored(ask(door, "first", rows), rows)
        assert door.index() == {("first", "1"): "READY", ("second", "1"): "UNAVAILABLE"}
        assert "MemoryError" in door.reason("second", "1")


def test_new_weights_without_room_beside_the_old_ones_are_refused_and_the_old_ones_serve_on(
    start: Start, nats_server: NatsServer, repository: Path
) -> None:
    """Both versions are in memory until the new one takes over; a device that is full must not lose the old one."""
    served = make(repository / "m", "m")
    loads, freed = Loads(), []

    class Full(reference.Reference):
        def warm_up(self, max_rows: int) -> None:
            with unfit("the device could not warm up", "another device", MemoryError):
                raise MemoryError("secret address 0x1234")

        def unload(self) -> None:
            freed.append(True)

    def load(artifact: Path) -> Backend:
        return Full(read(artifact)) if loads.begun else loads.load(artifact)

    start(load="m", loader=load, executors=1)
    rows = some_rows(served, 3)
    with Door(nats_server.url) as door, Traffic(served, nats=nats_server.url) as traffic:
        make(served, "m", seed=2)
        refused = refusal(door.load, "m")
        assert refused.fault is Fault.INTERNAL
        assert "model 'm' could not be loaded: the device could not warm up: MemoryError" in refused.detail
        assert "Next: unload another model" in refused.detail and "secret" not in refused.detail
        assert freed, "what the failed load took is free again"
        traffic.answered(MANY)
        assert scored(ask(door, "m", rows), rows), "the old weights"
        assert door.index() == {("m", "1"): "READY"}
    assert not traffic.bad, traffic.ended
    assert loads.in_memory == 1


def test_a_backend_of_a_newer_protocol_is_refused(start: Start, nats_server: NatsServer, repository: Path) -> None:
    """It may rely on calls that this executor does not make."""
    make(repository / "m", "m")

    class Newer(reference.Reference):
        @property
        def capabilities(self) -> Capabilities:
            return replace(super().capabilities, protocol="2.0")

    start(loader=lambda artifact: Newer(read(artifact)))
    with Door(nats_server.url) as door:
        detail = refusal(door.load, "m").detail
        assert f"speaks version 2.0 of the protocol, this executor {PROTOCOL}" in detail


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


def test_a_model_that_is_not_there_is_told_with_what_there_is(
    start: Start, nats_server: NatsServer, repository: Path
) -> None:
    """Most often it is a typing error."""
    make(repository / "m", "m", "7")
    start(load="m")
    with Door(nats_server.url) as door:
        for verb in (door.load, door.unload):
            refused = refusal(verb, "nobody")
            assert refused.fault is Fault.NOT_FOUND
            assert "'nobody'" in refused.detail and "m version 7" in refused.detail
            assert refusal(verb, "../m").fault is Fault.NOT_FOUND
            assert refusal(verb, "").fault is Fault.NOT_FOUND


def test_what_would_change_a_model_on_the_way_in_is_refused(
    start: Start, nats_server: NatsServer, repository: Path
) -> None:
    """Triton's clients can send a configuration, or whole files: neither is ever written or believed here."""
    make(repository / "m", "m")
    start()
    with Door(nats_server.url) as door:
        for parameters in ({"config": "{}"}, {"file:1/model.json": "aGk="}):
            refused = refusal(door.load, "m", **parameters)
            assert refused.fault is Fault.INVALID_ARGUMENT
            assert next(iter(parameters)) in refused.detail
        assert refusal(door.unload, "m", unload_dependents="yes").fault is Fault.INVALID_ARGUMENT
        assert door.index() == {("m", "1"): "UNAVAILABLE"}


def test_a_link_out_of_the_repository_is_not_followed(
    start: Start, nats_server: NatsServer, repository: Path, tmp_path: Path
) -> None:
    """Who may write into one folder must not get files of another one served; links inside are fine."""
    outside = make(tmp_path / "outside", "out")
    (repository / "out").symlink_to(outside)
    (repository / "half").mkdir()
    for name in ("model.json", WEIGHTS):
        (repository / "half" / name).symlink_to(outside / name)
    make(repository / ".hidden" / "in", "in")
    (repository / "in").symlink_to(repository / ".hidden" / "in")
    start()
    with Door(nats_server.url) as door:
        door.load("in")
        refused = refusal(door.load, "out")
        assert refused.fault is Fault.INTERNAL and "leads out of the repository" in refused.detail
        assert door.index() == {("in", "1"): "READY", ("out", ""): "UNAVAILABLE", ("half", ""): "UNAVAILABLE"}


def test_a_version_that_is_there_twice_is_refused(start: Start, nats_server: NatsServer, repository: Path) -> None:
    """Which one was meant, nobody knows."""
    make(repository / "a", "m")
    make(repository / "b", "m", seed=2)
    start()
    with Door(nats_server.url) as door:
        refused = refusal(door.load, "m")
        assert refused.fault is Fault.INTERNAL and "twice" in refused.detail


def test_without_control_all_newest_versions_are_served_and_none_can_be_changed(
    start: Start, nats_server: NatsServer, repository: Path, criteo_model: Path
) -> None:
    """The default, as in Triton: who reaches the port must not change what is served."""
    for version in ("1", "2"):
        make(repository / "m" / version, "m", version)
    make(repository / "n", "n")
    damage_weights(make(repository / "broken", "broken"))
    start(criteo_model, control="none")
    with Door(nats_server.url) as open_door, Door(nats_server.url, Config()) as door:
        expected = {("ctr", "1"): "READY", ("m", "2"): "READY", ("n", "1"): "READY"}
        assert door.index(ready=True) == expected
        assert door.index() == expected | {("m", "1"): "UNAVAILABLE", ("broken", "1"): "UNAVAILABLE"}
        assert "sha256" in door.reason("broken", "1")
        for verb in (door.load, door.unload, open_door.load, open_door.unload):
            refused = refusal(verb, "m")
            assert refused.fault is Fault.PERMISSION_DENIED
            assert "model_control" in refused.detail


def test_one_executor_that_refuses_is_named(start: Start, nats_server: NatsServer, repository: Path) -> None:
    """Else half of a fleet serves the model, and nobody knows."""
    model = make(repository / "m", "m")
    start(executors=1)
    with System(nats_server.url, model) as other, Door(nats_server.url) as door:
        (stubborn,) = other.actors("executor")
        refused = refusal(door.load, "m")
        assert refused.fault is Fault.PERMISSION_DENIED
        assert "1 of 2" in refused.detail and stubborn.name in refused.detail
        rows = some_rows(model, 1)
        assert scored(ask(door, "m", rows), rows)


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
