"""How many threads an executor computes with."""

import os

import pytest

from narsil_stream.cli.actors import _limit_threads
from narsil_stream.core.config.schema import ExecutorConfig

VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@pytest.fixture(autouse=True)
def environ(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them set, and all as before afterwards."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


def limited(monkeypatch: pytest.MonkeyPatch, cores: int, config: ExecutorConfig) -> tuple[int, list[str | None]]:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    return _limit_threads(config), [os.environ.get(name) for name in VARIABLES]


@pytest.mark.parametrize(
    ("cores", "executors", "own", "openblas"),
    [(1, 1, 1, "1"), (2, 1, 2, "1"), (2, 2, 1, "1"), (3, 1, 2, "1"), (4, 1, 2, "2"), (16, 1, 8, "8"), (16, 3, 2, "2")],
)
def test_two_cores_compute_and_of_more_a_half(
    monkeypatch: pytest.MonkeyPatch, cores: int, executors: int, own: int, openblas: str
) -> None:
    """One thread on two cores leaves half of the machine to what needs a fifth of it."""
    found = limited(monkeypatch, cores, ExecutorConfig(executors=executors))
    assert found == (own, ["1", "1", openblas])


def test_what_is_configured_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Above the environment, for every family."""
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert limited(monkeypatch, 2, ExecutorConfig(threads=3, executors=2)) == (3, ["1", "1", "3"])


def test_the_environment_counts_where_nothing_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who sets it knows why."""
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "5")
    assert limited(monkeypatch, 2, ExecutorConfig()) == (0, ["7", "1", "5"])
