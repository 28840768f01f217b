"""Stand-ins for what a test has to hold in its hand."""

import gc
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from narsil_stream.kernels import reference
from narsil_stream.kernels.artifact import read
from narsil_stream.kernels.backend import Backend, BackendInfo, RaggedBatch
from narsil_stream.schemas.compute import Capabilities
from narsil_stream.schemas.model import ModelSpec
from tests.support import PATIENCE_S


class Gate:
    """Backends that compute only while it is open: `System(..., loader=gate.load)`, `with gate.closed(): ...`.

    `lanes`: batches of a model that may compute at the same time.
    """

    def __init__(self, lanes: int = 1) -> None:
        self.lanes = lanes
        self._lock = threading.Lock()
        self._open = threading.Event()
        self._open.set()
        self.waiting = 0
        """Batches that stand before it."""
        self.rows: list[int] = []
        """Of each batch that came to it."""
        self.computing: Counter[GatedBackend] = Counter()
        """Batches that came to it and are not computed yet."""
        self.most = 0
        """Of these, at a time, of one model."""

    def load(self, artifact: Path) -> Backend:
        return GatedBackend(reference.load(artifact), self)

    @contextmanager
    def closed(self) -> Iterator[None]:
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()

    @contextmanager
    def passed(self, backend: "GatedBackend", rows: int) -> Iterator[None]:
        with self._lock:
            self.rows.append(rows)
            self.waiting += 1
            self.computing[backend] += 1
            self.most = max(self.most, self.computing[backend])
        opened = self._open.wait(PATIENCE_S)
        with self._lock:
            self.waiting -= 1
        try:
            assert opened, "the gate was never opened"
            yield
        finally:
            with self._lock:
                self.computing[backend] -= 1


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
        return replace(self._inner.info, lanes=self._gate.lanes)

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
        with self._gate.passed(self, batch.rows):
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
