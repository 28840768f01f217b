"""Fixtures for tests that need a broker or a whole system. The classes behind them are in `tests/support.py`.

Function scope: yours to break. `shared_*`: one for the whole run, for tests that only ask.
"""

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from narsil_stream.core import ports
from narsil_stream.kernels.artifact import write
from narsil_stream.kernels.init import criteo_spec, random_model
from narsil_stream.kernels.init import demo_model as make_demo_model
from tests.support import NatsServer, System


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What a test logged crosses to the process that prints it, which takes valid Unicode only."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture
def nats_server() -> Iterator[NatsServer]:
    """A broker of the test's own. About 30 ms."""
    with NatsServer() as server:
        yield server


@pytest.fixture
def free_port() -> int:
    """A TCP port that nobody uses now, for a process that cannot say which one it took."""
    return ports.free_port("127.0.0.1", 0, "http.port")


@pytest.fixture(scope="session")
def criteo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact called "ctr" that reads Criteo rows: 26 tables of 1000 rows, small enough to compute in no time."""
    folder = tmp_path_factory.mktemp("models") / "ctr"
    write(folder, random_model(criteo_spec("ctr", rows=1000, dim=4, bottom=(8,), top=(8,)), seed=3))
    return folder


@pytest.fixture
def system(nats_server: NatsServer, criteo_model: Path) -> Iterator[System]:
    """One executor and one batcher that serve `criteo_model` on `nats_server`."""
    with System(nats_server.url, criteo_model) as running:
        yield running


@pytest.fixture(scope="session")
def shared_system(criteo_model: Path) -> Iterator[System]:
    """As `system`, with an HTTP gateway, but started once."""
    with NatsServer() as server, System(server.url, criteo_model, gateways=1) as running:
        yield running


@pytest.fixture(scope="session")
def demo_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The artifact that `narsil serve` shows on a fresh machine, which the examples of documents fit."""
    folder = tmp_path_factory.mktemp("demo") / "dlrm"
    make_demo_model(folder)
    return folder


@pytest.fixture(scope="session")
def demo_system(demo_model: Path) -> Iterator[System]:
    """As `shared_system`, with the demo model, and with a gRPC gateway too."""
    with NatsServer() as server, System(server.url, demo_model, gateways=1, grpc_gateways=1) as running:
        yield running


@pytest.fixture(scope="session")
def real_rows() -> Path:
    """The folder with real Criteo rows, which may not be distributed: named by NARSIL_TEST_DATA."""
    folder = os.environ.get("NARSIL_TEST_DATA")
    if not folder:
        pytest.skip("NARSIL_TEST_DATA does not name a folder with real Criteo rows")
    return Path(folder)
