"""Train a model on labelled Criteo rows, measure it on rows held out, and write the artifact."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from narsil_stream.core.criteo import read
from narsil_stream.kernels.artifact import Artifact, check_spec, need_free, write
from narsil_stream.kernels.backend import RaggedBatch
from narsil_stream.kernels.init import random_tensors
from narsil_stream.kernels.metrics import auc, log_loss
from narsil_stream.kernels.reference import Reference
from narsil_stream.schemas.model import DcnV2, ModelSpec

_PIECE_BYTES = 4 << 20
"""Read, and shuffled, at a time: about 16 000 rows."""
_ROW_DEVIATION = 0.01
"""Of untrained table rows: small, so that a category never seen says nothing."""


class TrainError(Exception):
    """Training cannot start or go on. The message says why and what to do next."""


class Settings(Struct, frozen=True):
    """How to train. The model that comes out depends on these and on the data alone."""

    epochs: int = 1
    """Passes over the data, at least 1. More: a better fit, up to where rows are learned by heart."""
    batch_rows: int = 512
    """Rows in one step. Larger: quicker, fewer steps."""
    learning_rate: float = 0.02
    """Of Adagrad. Larger: quicker, until the loss diverges."""
    holdout_every: int = 10
    """Every so many lines, at least 2, one is kept for the measurement."""
    seed: int = 0
    """Of the first weights and of the order of rows."""
    skip_bad: bool = False
    """Leave out bad rows and count them, instead of ending at the first."""


class Progress(Struct, frozen=True):
    """Where training stands."""

    stage: str
    """"epoch 1/2" ..., then "measuring"."""
    done: float
    """Of all the work, 0 to 1."""
    rows: int
    """Rows that went through in this stage."""
    loss: float
    """Log loss of the latest rows, before they changed the weights; 0 before the first."""


Watch = Callable[[Progress], None]


class Piece(Struct, frozen=True):
    """Rows of one stage, as they come from the file."""

    done: float
    """Of the file, 0 to 1."""
    dense: NDArray[np.float32]
    sparse: NDArray[np.int32]
    labels: NDArray[np.float32]
    skipped: int
    """Bad rows that were left out."""


def train(
    data: Path, folder: Path, spec: ModelSpec, settings: Settings, watch: Watch, *, overwrite: bool = False
) -> ModelSpec:
    """Train `spec` on the rows of the file `data`, write the artifact, and return its description.

    Metrics: auc and log_loss of the rows held out, by the scores that will be served (absent where they mean nothing:
    rows of one label only), train_rows, holdout_rows, skipped_rows.

    Raises TrainError: no torch, an unreadable file, a bad row, no row to train on, a loss that diverges; ArtifactError:
    `folder` is taken or the description unfit, which is found out first.
    """
    torch = _torch()
    need_free(folder, overwrite)
    spec = check_spec(spec)
    network = _Network(torch, spec, settings)
    # Says that the checks stay off, as they are anyway: torch warns where nothing is said.
    with torch.sparse.check_sparse_tensor_invariants(enable=False):
        rows = _fit(network, data, spec, settings, watch)
    artifact = Artifact(spec, network.tensors())
    metrics = {"train_rows": float(rows)} | _measure(data, artifact, settings, watch)
    measured = Artifact(msgspec.structs.replace(spec, metrics=metrics), artifact.tensors)
    return write(folder, measured, overwrite=overwrite)


def _fit(network: "_Network", data: Path, spec: ModelSpec, settings: Settings, watch: Watch) -> int:
    """Returns the number of rows in one pass."""
    rows, loss = 0, 0.0
    rng = np.random.default_rng(settings.seed)
    for epoch in range(settings.epochs):
        rows = 0
        for piece in _pieces(data, spec, settings, held_out=False):
            order = rng.permutation(len(piece.labels))
            losses = [
                network.step(piece, order[start : start + settings.batch_rows])
                for start in range(0, len(order), settings.batch_rows)
            ]
            rows += len(order)
            if not np.isfinite(losses).all():
                raise TrainError(f"the loss became infinite within {rows} rows. Next: a lower learning rate.")
            loss = float(np.mean(losses)) if losses else loss
            done = (epoch + piece.done) / (settings.epochs + 1)
            watch(Progress(f"epoch {epoch + 1}/{settings.epochs}", done, rows, loss))
        if not rows:
            raise TrainError(f"{data}: found no rows to train on. Next: a file with labelled rows.")
    return rows


def _measure(data: Path, artifact: Artifact, settings: Settings, watch: Watch) -> dict[str, float]:
    """Metrics by the reference backend: what is measured is what will be served."""
    backend = Reference(artifact)
    seen: list[NDArray[np.float32]] = []
    given: list[NDArray[np.float32]] = []
    rows, skipped, loss = 0, 0, 0.0
    for piece in _pieces(data, artifact.spec, settings, held_out=True):
        part = np.empty(len(piece.labels), np.float32)
        backend.run(RaggedBatch(piece.dense, piece.sparse.reshape(-1)), part)
        seen.append(piece.labels)
        given.append(part)
        rows += len(part)
        skipped += piece.skipped
        loss = log_loss(piece.labels, part) or loss
        watch(Progress("measuring", (settings.epochs + piece.done) / (settings.epochs + 1), rows, loss))
    labels, scores = np.concatenate(seen), np.concatenate(given)
    found = {"auc": auc(labels, scores), "log_loss": log_loss(labels, scores)}
    counts = {"holdout_rows": float(rows), "skipped_rows": float(skipped)}
    return {name: value for name, value in found.items() if value is not None} | counts


def _pieces(data: Path, spec: ModelSpec, settings: Settings, *, held_out: bool) -> Iterator[Piece]:
    """Which rows are held out depends on their line numbers alone."""
    try:
        size = max(data.stat().st_size, 1)
        with data.open("rb") as file:
            for rows in read(file, [table.rows for table in spec.tables], labelled=True, piece_bytes=_PIECE_BYTES):
                if rows.bad and not settings.skip_bad:
                    raise TrainError(
                        f"{data}, {rows.bad[0]}. Next: correct the row, or leave bad rows out (--skip-bad)."
                    )
                kept = (rows.lines % settings.holdout_every == 0) == held_out
                labels = np.empty(0, np.float32) if rows.labels is None else rows.labels
                yield Piece(file.tell() / size, rows.dense[kept], rows.sparse[kept], labels[kept], len(rows.bad))
    except OSError as error:
        raise TrainError(f"{data}: {error.strerror or error}. Next: check the path and its permissions.") from error


class _Network:
    """The model as torch layers, and its optimizer."""

    def __init__(self, torch: Any, spec: ModelSpec, settings: Settings) -> None:
        """All tables are one embedding, a table's ids moved to where its rows begin: one lookup instead of 26."""
        self._torch = torch
        self._spec = spec
        start = random_tensors(spec, settings.seed, _ROW_DEVIATION)
        self._weights = {
            name: torch.nn.Parameter(torch.from_numpy(t)) for name, t in start.items() if not name.startswith("tables.")
        }
        rows = np.concatenate([start[f"tables.{table.name}.weight"] for table in spec.tables])
        self._rows = torch.nn.Embedding.from_pretrained(torch.from_numpy(rows), freeze=False, sparse=True)
        self._first_row = np.cumsum([0, *(table.rows for table in spec.tables[:-1])])
        self._pairs = torch.tril_indices(spec.n_sparse + 1, spec.n_sparse + 1, offset=-1)
        learned = [*self._weights.values(), self._rows.weight]
        self._optimizer = torch.optim.Adagrad(learned, lr=settings.learning_rate)

    def step(self, piece: Piece, chosen: NDArray[np.intp]) -> float:
        """One step on the chosen rows of a piece. Returns their log loss before it."""
        torch = self._torch
        logits = self._logits(piece.dense[chosen], piece.sparse[chosen] + self._first_row)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.from_numpy(piece.labels[chosen]))
        self._optimizer.zero_grad()
        loss.backward()
        self._optimizer.step()
        return float(loss.detach())

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The weights as an artifact names them."""
        found = {name: weight.detach().numpy() for name, weight in self._weights.items()}
        rows = np.split(self._rows.weight.detach().numpy(), self._first_row[1:])
        return found | {f"tables.{t.name}.weight": part for t, part in zip(self._spec.tables, rows, strict=True)}

    def _logits(self, dense: NDArray[np.float32], rows: NDArray[np.int64]) -> Any:
        torch, shape = self._torch, self._spec.architecture
        x = torch.from_numpy(dense)
        for i in range(len(shape.bottom)):
            x = torch.relu(self._layer("bottom", i, x))
        vectors = torch.cat([x[:, None], self._rows(torch.from_numpy(rows))], dim=1)
        x = self._cross(vectors.flatten(1), shape.cross_layers) if isinstance(shape, DcnV2) else self._dot(vectors)
        for i in range(len(shape.top) - 1):
            x = torch.relu(self._layer("top", i, x))
        return self._layer("top", len(shape.top) - 1, x)[:, 0]

    def _layer(self, part: str, i: int, x: Any) -> Any:
        weights = self._weights
        return self._torch.nn.functional.linear(x, weights[f"{part}.{i}.weight"], weights[f"{part}.{i}.bias"])

    def _dot(self, vectors: Any) -> Any:
        products = self._torch.bmm(vectors, vectors.transpose(1, 2))[:, self._pairs[0], self._pairs[1]]
        return self._torch.cat([vectors[:, 0], products], dim=1)

    def _cross(self, first: Any, layers: int) -> Any:
        linear, weights = self._torch.nn.functional.linear, self._weights
        x = first
        for i in range(layers):
            product = linear(linear(x, weights[f"cross.{i}.v"]), weights[f"cross.{i}.w"], weights[f"cross.{i}.bias"])
            x = first * product + x
        return x


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise TrainError(
            "training needs torch, which is not installed here. Next: `make setup`, then use .venv/bin/narsil."
        ) from error
    return torch
