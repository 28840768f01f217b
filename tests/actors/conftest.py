"""A system over a repository of models, which the tests of this folder share."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from narsil_stream.core.config import Config
from tests.actors.repositories import Start
from tests.door import Door
from tests.support import NatsServer, System


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    return folder


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
