"""How far every family is from the reference on trained weights.

`python -m narsil_stream.bench.parity` prints the table. Models are trained on synthetic clicks. Scores are
probabilities; logits are compared as well, because scores near 0 hide wrong rows. `tests/kernels/test_parity.py` holds
the families to the limits that stand here.
"""

import argparse
import functools
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from narsil_stream.core.criteo import Parser
from narsil_stream.kernels import native, torch_family
from narsil_stream.kernels.artifact import Artifact, read
from narsil_stream.kernels.backend import Backend, RaggedBatch
from narsil_stream.kernels.cutting import buckets
from narsil_stream.kernels.init import Cross, criteo_spec, random_batch
from narsil_stream.kernels.metrics import auc
from narsil_stream.kernels.quantize import quantize
from narsil_stream.kernels.reference import Reference, sigmoid
from narsil_stream.kernels.synthetic import clicks
from narsil_stream.kernels.train import Settings, train
from narsil_stream.schemas.model import RowType

ROWS: tuple[RowType, ...] = ("FP32", "FP16", "INT8")
BAGS = {"one-hot": None, "multi-hot": 3}
MAX_ROWS = 4096
"""Backends are warmed up for this; longer batches are cut."""
SIZES = tuple(sorted({1, 16, 17, *(size + near for size in buckets(MAX_ROWS) for near in (-1, 0, 1))}))
"""At and around each bucket."""


class Kind(NamedTuple):
    """A model to train: 26 tables of 1000 rows. DCNv2 pools bags by mean, DLRM by sum."""

    architecture: str
    dim: int

    def __str__(self) -> str:
        return f"{self.architecture} {self.dim}"


KINDS: dict[Kind, tuple[RowType, ...]] = {
    Kind("dlrm-dot", 16): ROWS,
    Kind("dlrm-dot", 32): ("INT8",),
    Kind("dlrm-dot", 64): ("FP16", "INT8"),
    Kind("dcn-v2", 16): ROWS,
    Kind("dcn-v2", 64): ("INT8",),
}
"""Which rows are compared of each."""


class Limit(NamedTuple):
    score: float
    """Of the largest difference."""
    logit: float
    """The same, for logits up to 1; larger ones in proportion."""


LIMITS = {"fp32": Limit(1e-5, 1e-4), "fp16": Limit(2e-3, 2e-2), "bf16": Limit(1e-2, 1e-1)}
"""Against the reference on the same rows, INT8 ones too."""
FP16_ROWS = LIMITS["fp16"]
INT8_TO_FP32 = 2e-2
"""Scores of FP32 arithmetic with INT8 rows against the reference with FP32 rows."""
AUC_DRIFT = 1e-3
"""Of INT8 rows, on synthetic clicks."""

TRAIN_ROWS = 30_000
_SEED = 5


class Family(NamedTuple):
    """A family on a device in a precision."""

    name: str
    precision: str
    load: Callable[[Artifact], Backend]
    takes: tuple[str, ...] = ("dlrm-dot", "dcn-v2")
    """Architectures."""

    def __str__(self) -> str:
        return f"{self.name} {self.precision}"

    def limit(self, rows: RowType) -> Limit:
        """FBGEMM's CUDA kernels turn INT8 rows into numbers in FP16, whatever comes after."""
        return (
            FP16_ROWS
            if rows == "INT8" and self.name == "torch on cuda" and self.precision == "fp32"
            else LIMITS[self.precision]
        )


class Apart(Struct, frozen=True):
    """The largest differences from the reference."""

    score: float
    logit: float
    """Divided by max(1, |logit|)."""


class Question(NamedTuple):
    batch: RaggedBatch
    logits: NDArray[np.floating[Any]]
    """What the reference says."""


def questions(model: Artifact, bags: str, sizes: tuple[int, ...] = SIZES) -> list[Question]:
    """A random batch of each size, one-hot or multi-hot."""
    given = [random_batch(model.spec, size, size, BAGS[bags]) for size in sizes]
    reference = Reference(model)
    return [Question(batch, reference.logits(batch)) for batch in given]


def trained(kind: Kind, rows: int = TRAIN_ROWS) -> Artifact:
    """Of synthetic clicks, FP32 rows."""
    cross = {"dlrm-dot": None, "dcn-v2": Cross(2, 32)}[kind.architecture]
    spec = criteo_spec(rows=1000, dim=kind.dim, cross=cross, pooling="mean" if cross else "sum")
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "clicks.tsv"
        data.write_bytes(b"".join(piece.text for piece in clicks(rows, _SEED)))
        train(data, Path(folder) / "model", spec, Settings(), lambda progress: None)
        return read(Path(folder) / "model")


def torch_on(device: str, precision: str) -> Family:
    def load(artifact: Artifact) -> Backend:
        from narsil_stream.kernels.torch_family.devices import build, resolve

        return build(artifact, resolve(device, precision))

    return Family(f"torch on {device}", precision, load)


def native_in(precision: str, way: str = "") -> Family:
    """`way`: layers or split 1 (one block of the fused kernel for each 64 rows) instead of what it would choose."""
    ways: dict[str, dict[str, Any]] = {
        "": {},
        "layers": {"kernels": "layers"},
        "split 1": {"kernels": "fused", "split": 1},
    }
    options = ways[way]

    def load(artifact: Artifact) -> Backend:
        from narsil_stream.kernels.native.engine import Engine, Options
        from narsil_stream.kernels.native.native import Native

        backend = Native(artifact, precision=precision)
        if options:
            backend.engine.close()
            backend.engine = Engine(artifact, Options(precision=precision, max_rows=MAX_ROWS, **options))
        return backend

    takes = ("dlrm-dot",) if way else Family._field_defaults["takes"]
    return Family(f"native {way}".rstrip(), precision, load, takes)


NATIVE = (*(native_in(precision) for precision in LIMITS), native_in("fp16", "layers"), native_in("fp16", "split 1"))


def here() -> Iterator[Family]:
    """What this machine can compute with."""
    gpu = True
    try:
        native.require_gpu()
    except native.Unavailable:
        gpu = False
    if gpu:
        yield from NATIVE
    try:
        torch_family.require_unit()
    except torch_family.Unavailable:
        return
    from narsil_stream.kernels.torch_family.devices import resolve

    for device in ("cpu", "cuda"):
        for precision in LIMITS:
            try:
                resolve(device, precision)
            except torch_family.Unavailable:
                continue
            yield torch_on(device, precision)


def apart(backend: Backend, question: Question) -> Apart:
    """Compare scores, and the logits that they stand for."""
    batch, logits = question
    scores = np.full(batch.rows, np.nan, np.float32)
    backend.run(batch, scores)
    found = scores.astype(np.float64)
    with np.errstate(divide="ignore"):
        between = np.abs(np.log(found) - np.log1p(-found) - logits) / np.maximum(1, np.abs(logits))
    return Apart(float(np.abs(found - sigmoid(logits)).max()), float(between.max()))


def auc_drift(full: Artifact, small: Artifact, rows: int = 100_000) -> tuple[float, float]:
    """AUC of both on the same synthetic clicks, which neither has seen."""
    labels, pieces = _unseen(rows, tuple(table.rows for table in full.spec.tables))
    found = []
    for artifact in (full, small):
        backend = Reference(artifact)
        value = auc(labels, np.concatenate([sigmoid(backend.logits(piece)) for piece in pieces]))
        assert value is not None
        found.append(value)
    return found[0], found[1]


@functools.cache
def _unseen(rows: int, tables: tuple[int, ...]) -> tuple[NDArray[Any], list[RaggedBatch]]:
    """Labels, and the clicks as models with such tables read them."""
    given = list(clicks(rows, _SEED + 1))
    parsed = [Parser(list(tables)).feed(piece.text) for piece in given]
    return np.concatenate([piece.labels for piece in given]), [
        RaggedBatch(piece.dense, piece.sparse.reshape(-1)) for piece in parsed
    ]


def table(rows: int = TRAIN_ROWS) -> Iterator[str]:
    """Lines of Markdown."""
    yield "| family | model | rows | bags | score | limit | logit |"
    yield "|---|---|---|---|---|---|---|"
    below = []
    for kind, types in KINDS.items():
        full = trained(kind, rows)
        models = {type_: full if type_ == "FP32" else quantize(full, type_) for type_ in types}
        below.append(_quantized(kind, full, models["INT8"]))
        asked = {
            (type_, bags): questions(model, bags, (*SIZES, 10_000)) for type_, model in models.items() for bags in BAGS
        }
        for family in here():
            if kind.architecture not in family.takes:
                continue
            for type_, model in models.items():
                try:
                    backend = family.load(model)
                except (ValueError, RuntimeError) as error:
                    yield f"| {family} | {kind} | {type_} | | refused: {error} | | |"
                    continue
                backend.warm_up(MAX_ROWS)
                for bags in BAGS:
                    worst = [apart(backend, question) for question in asked[type_, bags]]
                    score, logit = max(one.score for one in worst), max(one.logit for one in worst)
                    found = f"{score:.1e} | {family.limit(type_).score:.0e} | {logit:.1e}"
                    yield f"| {family} | {kind} | {type_} | {bags} | {found} |"
                backend.unload()
    yield ""
    yield from below


def _quantized(kind: Kind, full: Artifact, small: Artifact) -> str:
    """What INT8 rows cost, by the reference."""
    score = apart(Reference(small), questions(full, "one-hot", (5_000,))[0]).score
    before, after = auc_drift(full, small)
    return (
        f"- {kind}, INT8 rows against FP32 rows: scores within {score:.1e} (limit {INT8_TO_FP32:.0e}); "
        f"AUC {after:.5f} against {before:.5f} on 100,000 synthetic rows"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--train-rows", type=int, default=TRAIN_ROWS)
    for line in table(parser.parse_args().train_rows):
        print(line, flush=True)


if __name__ == "__main__":
    main()
