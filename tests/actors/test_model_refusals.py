"""Loads that are refused, or fail: what is told, and what goes on as before."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec.structs import replace

from narsil_stream.core.config import Config
from narsil_stream.kernels import reference
from narsil_stream.kernels.artifact import WEIGHTS, read
from narsil_stream.kernels.backend import PROTOCOL, Backend, unfit
from narsil_stream.schemas.compute import Capabilities
from narsil_stream.schemas.errors import Fault
from tests.actors.repositories import Start, ask, make, refusal, scored
from tests.asking import some_rows
from tests.door import Door
from tests.doubles import Loads
from tests.faults.traffic import Traffic
from tests.support import NatsServer, System


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
        traffic.answered(300)
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
