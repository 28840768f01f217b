"""Stand-ins for what a test has to hold in its hand."""

import gc
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from narsil_stream.kernels import reference
from narsil_stream.kernels.artifact import read
from narsil_stream.kernels.backend import Backend, BackendInfo, RaggedBatch
from narsil_stream.schemas.compute import Capabilities
from narsil_stream.schemas.model import ModelSpec
from tests.support import PATIENCE_S


class Gate:
    """Backends that compute only while it is open: `System(..., loader=gate.load)`, `with gate.closed(): ...`."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._open.set()
        self.waiting = 0
        """Batches that stand before it."""
        self.rows: list[int] = []
        """Of each batch that came to it."""

    def load(self, artifact: Path) -> Backend:
        return GatedBackend(reference.load(artifact), self)

    @contextmanager
    def closed(self) -> Iterator[None]:
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()

    def enter(self, rows: int) -> None:
        self.rows.append(rows)
        self.waiting += 1
        try:
            assert self._open.wait(PATIENCE_S), "the gate was never opened"
        finally:
            self.waiting -= 1


class GatedBackend:
    """The reference backend behind a gate."""

    def __init__(self, inner: Backend, gate: Gate) -> None:
        self._inner = inner
        self._gate = gate

    @property
    def spec(self) -> ModelSpec:
        return self._inner.spec

    @property
    def info(self) -> BackendInfo:
        return self._inner.info

    @property
    def capabilities(self) -> Capabilities:
        return self._inner.capabilities

    @property
    def unprepared(self) -> int:
        return self._inner.unprepared

    def warm_up(self, max_rows: int) -> None:
        self._inner.warm_up(max_rows)

    def empty(self, rows: int) -> NDArray[np.float32]:
        return self._inner.empty(rows)

    def run(self, batch: RaggedBatch, scores: NDArray[np.float32]) -> None:
        self._gate.enter(batch.rows)
        self._inner.run(batch, scores)

    def unload(self) -> None:
        self._inner.unload()


class Loads:
    """What was loaded, and whether its memory is still held: `System(..., loader=loads.load)`.

    `with loads.held(): ...` keeps loads from ending meanwhile.
    """

    def __init__(self) -> None:
        self._go = threading.Event()
        self._go.set()
        self.begun: list[Path] = []
        self._backends: weakref.WeakSet[reference.Reference] = weakref.WeakSet()

    def load(self, artifact: Path) -> Backend:
        self.begun.append(artifact)
        assert self._go.wait(PATIENCE_S), "the load was never let go"
        backend = reference.Reference(read(artifact))
        self._backends.add(backend)
        return backend

    @contextmanager
    def held(self) -> Iterator[None]:
        self._go.clear()
        try:
            yield
        finally:
            self._go.set()

    @property
    def in_memory(self) -> int:
        """Models that somebody still holds."""
        gc.collect()
        return len(self._backends)
