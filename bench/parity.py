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
from typing import NamedTuple

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from narsil_stream.core.criteo import Parser
from narsil_stream.kernels import native, torch_family
from narsil_stream.kernels.artifact import Artifact, read
from narsil_stream.kernels.backend import Backend, RaggedBatch
from narsil_stream.kernels.init import Cross, criteo_spec, random_batch
from narsil_stream.kernels.metrics import auc
from narsil_stream.kernels.quantize import quantize
from narsil_stream.kernels.reference import Reference, sigmoid
from narsil_stream.kernels.synthetic import Clicks, clicks
from narsil_stream.kernels.train import Settings, train
from narsil_stream.schemas.model import RowType

ARCHITECTURES = ("dlrm-dot", "dcn-v2")
ROWS: tuple[RowType, ...] = ("FP32", "FP16", "INT8")
BAGS = {"one-hot": None, "multi-hot": 3}
SIZES = (1, 16, 17, 127, 128, 129, 256, 257, 1024, 1025, 2048, 2049)
"""At and around each bucket; the last are cut into pieces by some."""


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


def trained(architecture: str, rows: int = TRAIN_ROWS) -> Artifact:
    """A small model, trained: 26 tables of 1000 rows of 16. DCNv2 pools bags by mean, DLRM by sum."""
    cross = {"dlrm-dot": None, "dcn-v2": Cross(2, 32)}[architecture]
    spec = criteo_spec(rows=1000, dim=16, cross=cross, pooling="mean" if cross else "sum")
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


def native_in(precision: str) -> Family:
    def load(artifact: Artifact) -> Backend:
        from narsil_stream.kernels.native.native import Native

        return Native(artifact, precision=precision)

    return Family("native", precision, load)


def here() -> Iterator[Family]:
    """What this machine can compute with."""
    gpu = True
    try:
        native.require_gpu()
    except native.Unavailable:
        gpu = False
    if gpu:
        yield from (native_in(precision) for precision in LIMITS)
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


def apart(backend: Backend, expected: Artifact, batch: RaggedBatch) -> Apart:
    """Compare scores, and the logits that they stand for."""
    logits = Reference(expected).logits(batch)
    scores = np.full(batch.rows, np.nan, np.float32)
    backend.run(batch, scores)
    found = scores.astype(np.float64)
    with np.errstate(divide="ignore"):
        between = np.abs(np.log(found) - np.log1p(-found) - logits) / np.maximum(1, np.abs(logits))
    return Apart(float(np.abs(found - sigmoid(logits)).max()), float(between.max()))


def auc_drift(full: Artifact, small: Artifact, rows: int = 100_000) -> tuple[float, float]:
    """AUC of both on the same synthetic clicks, which neither has seen."""
    found = []
    pieces = _unseen(rows)
    labels = np.concatenate([piece.labels for piece in pieces])
    for artifact in (full, small):
        backend, scores = Reference(artifact), []
        for piece in pieces:
            parsed = Parser([table.rows for table in artifact.spec.tables]).feed(piece.text)
            part: NDArray[np.float32] = np.empty(len(parsed.lines), np.float32)
            backend.run(RaggedBatch(parsed.dense, parsed.sparse.reshape(-1)), part)
            scores.append(part)
        value = auc(labels, np.concatenate(scores))
        assert value is not None
        found.append(value)
    return found[0], found[1]


@functools.cache
def _unseen(rows: int) -> list[Clicks]:
    return list(clicks(rows, _SEED + 1))


def table(rows: int = TRAIN_ROWS) -> Iterator[str]:
    """Lines of Markdown."""
    yield "| family | model | rows | bags | score | limit | logit |"
    yield "|---|---|---|---|---|---|---|"
    drifts = []
    for architecture in ARCHITECTURES:
        full = trained(architecture, rows)
        models = {kind: full if kind == "FP32" else quantize(full, kind) for kind in ROWS}
        drifts.append((architecture, *auc_drift(full, models["INT8"])))
        for family in here():
            for kind, model in models.items():
                try:
                    backend = family.load(model)
                except (ValueError, RuntimeError) as error:
                    yield f"| {family} | {architecture} | {kind} | | refused: {error} | | |"
                    continue
                backend.warm_up(max(SIZES))
                for bags, bag in BAGS.items():
                    worst = [
                        apart(backend, model, random_batch(model.spec, size, size, bag)) for size in (*SIZES, 10_000)
                    ]
                    score, logit = max(one.score for one in worst), max(one.logit for one in worst)
                    limit = family.limit(kind)
                    found = f"{score:.1e} | {limit.score:.0e} | {logit:.1e}"
                    yield f"| {family} | {architecture} | {kind} | {bags} | {found} |"
                backend.unload()
    yield ""
    for architecture, before, after in drifts:
        yield f"{architecture}: AUC {before:.5f} with FP32 rows, {after:.5f} with INT8 rows, 100,000 synthetic rows."


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--train-rows", type=int, default=TRAIN_ROWS)
    for line in table(parser.parse_args().train_rows):
        print(line, flush=True)


if __name__ == "__main__":
    main()
