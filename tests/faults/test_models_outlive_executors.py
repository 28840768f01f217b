"""Models that were loaded or unloaded by a client, when executors die and others take their place."""

import os
import signal
from pathlib import Path

from narsil_stream.core.client import BlockingClient
from narsil_stream.kernels.artifact import write
from narsil_stream.kernels.init import criteo_spec, random_model
from tests.asking import some_rows
from tests.door import Door
from tests.faults.serving import Serve
from tests.faults.traffic import Traffic

MANY = 300


def make(folder: Path, name: str) -> Path:
    write(folder, random_model(criteo_spec(name, rows=50, dim=4, bottom=(8,), top=(8,)), seed=1))
    return folder


def test_a_loaded_model_outlives_each_executor_and_an_unloaded_one_stays_away(tmp_path: Path) -> None:
    """An executor that restarts knows nothing: the others tell it. Else a rollout ends with the next crash."""
    repository = tmp_path / "repository"
    loaded, unloaded = make(repository / "loaded", "loaded"), make(repository / "unloaded", "unloaded")
    options = ("--model-repository", repository, "--model-control", "explicit", "--executor-executors", "2")
    options += ("--placement", "apart")
    with Serve(unloaded, tmp_path, *options) as serve, Door(serve.nats_url) as door:
        assert door.index(ready=True) == {("unloaded", "1"): "READY"}
        door.load("loaded")
        door.unload("unloaded")
        served = {("loaded", "1"): "READY", ("unloaded", "1"): "UNAVAILABLE"}
        with Traffic(loaded, nats=serve.nats_url) as traffic:
            for victim in (before := serve.pids("executor")):
                traffic.answered(MANY)
                os.kill(victim, signal.SIGKILL)
                traffic.answered(MANY)
                with traffic.gentle():
                    serve.until_up("executor", 2)
                assert door.index() == served
        assert not set(before) & set(serve.pids("executor"))
        details = {row["detail"] for row in serve.actors() if row["kind"] == "executor"}
        assert details == {"loaded 1 on cpu (reference, fp64)"}
    assert not traffic.bad, traffic.ended


def test_a_system_without_a_model_starts_and_is_ready_for_its_first_one(tmp_path: Path) -> None:
    """The usual start under explicit control: an empty server, which a deployer fills."""
    repository = tmp_path / "repository"
    repository.mkdir()
    options = ("--model-repository", repository, "--model-control", "explicit")
    with Serve(None, tmp_path, *options) as serve, Door(serve.nats_url) as door:
        assert serve.ready()
        assert serve.health()["healthy"]
        assert door.index() == {}
        model = make(repository / "late", "late")
        door.load("late")
        rows = some_rows(model, 2)
        with BlockingClient(serve.nats_url) as client:
            scores = client.score("late", dense=rows.dense, sparse=rows.ids)
        assert abs(scores - rows.scores).max() < 1e-6


def test_a_repository_is_served_whole_by_default(tmp_path: Path) -> None:
    """One setting, no verbs: that is how most will use it."""
    repository = tmp_path / "repository"
    models = [make(repository / name, name) for name in ("a", "b")]
    with Serve(None, tmp_path, "--model-repository", repository) as serve, BlockingClient(serve.nats_url) as client:
        for model in models:
            rows = some_rows(model, 1)
            scores = client.score(model.name, dense=rows.dense, sparse=rows.ids)
            assert abs(scores - rows.scores).max() < 1e-6
