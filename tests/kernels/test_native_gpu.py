"""The native backend on a GPU, against the reference on the same weights."""

import functools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from narsil_stream.kernels import native
from narsil_stream.kernels.artifact import Artifact, write
from narsil_stream.kernels.backend import IdOutOfRange, RaggedBatch
from narsil_stream.kernels.init import Cross, criteo_spec, plain_spec, random_batch, random_model
from narsil_stream.kernels.native.engine import Engine, Options
from narsil_stream.kernels.quantize import quantize
from narsil_stream.kernels.reference import Reference, sigmoid
from narsil_stream.schemas.model import DcnV2, DlrmDot, ModelSpec, RowType, Table

pytestmark = pytest.mark.gpu

SCORES = {"fp32": 1e-5, "tf32": 2e-3, "fp16": 2e-3, "bf16": 3e-2}
LOGITS = {"fp32": 5e-5, "tf32": 1e-2, "fp16": 1e-2, "bf16": 0.1}
RELATIVE = {"fp32": 1e-5, "tf32": 5e-3, "fp16": 5e-3, "bf16": 0.1}
"""Logits of one-hot rows have deviation 1, those of bags more: a wrong row or column is off by far more than these.
BF16: the largest errors of random models, with some rows far out, are several times those of trained ones."""
WAYS = [
    ("fp16", "fused", 0),
    ("fp16", "fused", 1),
    ("fp16", "fused", 2),
    ("fp16", "layers", 0),
    ("bf16", "layers", 0),
    ("fp32", "layers", 0),
]
"""Precision, kernels, split: the fused kernel chooses its split by itself with 0."""

Build = Callable[..., Engine]
Way = tuple[Artifact, str]


@pytest.fixture(scope="module")
def big() -> dict[RowType, Artifact]:
    """The reference configuration with small tables, in each row type."""
    spec = criteo_spec(rows=3000, dim=64, bottom=(512, 256), top=(512, 512, 256))
    full = random_model(spec, seed=1)
    return {"FP32": full, "FP16": quantize(full, "FP16"), "INT8": quantize(full, "INT8")}


@pytest.fixture(scope="module")
def crossed() -> dict[RowType, Artifact]:
    """The same tables and MLPs around a cross network."""
    spec = criteo_spec(rows=3000, dim=64, bottom=(512, 256), top=(512, 512, 256), cross=Cross(3, 512))
    full = random_model(spec, seed=1)
    return {"FP32": full, "FP16": quantize(full, "FP16"), "INT8": quantize(full, "INT8")}


@pytest.fixture(params=["fused", "layers", "cross"])
def way(request: pytest.FixtureRequest, big: dict[RowType, Artifact], crossed: dict[RowType, Artifact]) -> Way:
    """A model with INT8 rows, and the kernels that compute it in FP16."""
    if request.param == "cross":
        return crossed["INT8"], "layers"
    return big["INT8"], request.param


@pytest.fixture
def engine() -> Iterator[Build]:
    built: list[Engine] = []

    def build(artifact: Artifact, precision: str = "fp16", kernels: str = "auto", **options: object) -> Engine:
        chosen = Options(precision=precision, kernels=kernels, **options)  # type: ignore[arg-type]
        built.append(Engine(artifact, chosen))
        return built[-1]

    yield build
    for one in built:
        one.close()


def tolerance(artifact: Artifact, precision: str) -> float:
    """Of scores. Cross networks multiply what is far out once more in each layer; trained ones are held to 2e-3 in FP16
    and 1e-2 in BF16 by test_parity.py."""
    crossed = isinstance(artifact.spec.architecture, DcnV2) and precision != "fp32"
    return SCORES[precision] * (2 if crossed else 1)


def check(engine: Engine, artifact: Artifact, batch: RaggedBatch, expected: Any = None) -> None:
    """Scores of `run`, and the logits of one slot when the batch fits it. `expected`: logits, if they are known."""
    expected = Reference(artifact).logits(batch) if expected is None else expected
    scores = np.full(batch.rows, np.nan, np.float32)
    engine.run(batch, scores)
    allowed = tolerance(artifact, engine.options.precision)
    np.testing.assert_allclose(scores, sigmoid(expected), rtol=0, atol=allowed)
    if 0 < batch.rows == engine.slots[0].rows:  # not cut into pieces
        logits = engine.slots[0].logits.get()[: batch.rows]
        np.testing.assert_allclose(
            logits, expected, rtol=RELATIVE[engine.options.precision], atol=LOGITS[engine.options.precision]
        )


SIZES = (1, 2, 15, 16, 17, 63, 64, 65, 100, 127, 128, 129, 255, 256, 257, 511, 512, 513, 1023, 1024, 1025, 1600)
"""And `LARGE`: at and around each bucket, and around the tiles of rows; the last are cut into pieces."""
LARGE = (2047, 2048, 2049, 2303, 2304, 2305, 5000)


@pytest.fixture(scope="module")
def known(big: dict[RowType, Artifact]) -> Callable[[RowType, int | None, int], tuple[RaggedBatch, Any]]:
    """A batch of so many rows, and its logits: what the reference takes most of the time for."""

    @functools.cache
    def given(rows: RowType, bag: int | None, size: int) -> tuple[RaggedBatch, Any]:
        batch = random_batch(big[rows].spec, size, seed=size, bag=bag)
        return batch, Reference(big[rows]).logits(batch)

    return given


@pytest.mark.parametrize("rows", ["FP32", "FP16", "INT8"])
@pytest.mark.parametrize(("precision", "kernels", "split"), WAYS)
@pytest.mark.parametrize("bag", [None, 3])
def test_scores_equal_the_references_at_and_around_each_bucket(
    big: dict[RowType, Artifact],
    known: Callable[[RowType, int | None, int], tuple[RaggedBatch, Any]],
    engine: Build,
    precision: str,
    kernels: str,
    split: int,
    rows: RowType,
    bag: int | None,
) -> None:
    """Every row type, way and batch size, one-hot and multi-hot; the last are cut into pieces."""
    one = engine(big[rows], precision, kernels, max_rows=2304, split=split)
    one.warm_up(256)
    for size in (*SIZES, *LARGE):
        check(one, big[rows], *known(rows, bag, size))


@pytest.mark.parametrize("dim", [128, 256])
@pytest.mark.parametrize("rows", ["FP32", "INT8"])
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
def test_long_rows_score_like_the_references(engine: Build, dim: int, rows: RowType, precision: str) -> None:
    """Vectors that do not fit the registers of a warp all at once."""
    full = random_model(criteo_spec(rows=200, dim=dim, bottom=(256,), top=(256, 128)), seed=4)
    artifact = full if rows == "FP32" else quantize(full, rows)
    one = engine(artifact, precision, max_rows=257, lanes=1)
    assert one.plan.name == "layers"
    for size, bag in ((1, None), (127, None), (128, 3), (129, None), (255, 2), (256, None), (257, None), (258, 3)):
        check(one, artifact, random_batch(artifact.spec, size, seed=size, bag=bag))


@pytest.mark.parametrize("rows", ["FP32", "FP16", "INT8"])
@pytest.mark.parametrize("precision", ["fp16", "bf16", "tf32", "fp32"])
@pytest.mark.parametrize("bag", [None, 3])
def test_cross_networks_score_like_the_reference(
    crossed: dict[RowType, Artifact], engine: Build, precision: str, rows: RowType, bag: int | None
) -> None:
    """Every row type and precision, batch sizes at and around a bucket's, the last in pieces."""
    one = engine(crossed[rows], precision, max_rows=600)
    assert one.plan.name == "layers"
    for size in (1, 2, 63, 64, 65, 127, 128, 129, 600, 1500):
        check(one, crossed[rows], random_batch(crossed[rows].spec, size, seed=size, bag=bag))


def test_the_fused_kernel_is_chosen_for_fp16_alone(big: dict[RowType, Artifact], engine: Build) -> None:
    """Who asks for another precision must get it, or hear why not."""
    assert {p: engine(big["INT8"], p, max_rows=128).plan.name for p in ("fp16", "bf16", "fp32")} == {
        "fp16": "fused",
        "bf16": "layers",
        "fp32": "layers",
    }
    with pytest.raises(ValueError, match="kernels=fused cannot take precision bf16"):
        engine(big["INT8"], "bf16", "fused")


def cross_spec(
    dense: int, dim: int, bottom: tuple[int, ...], top: tuple[int, ...], cross: Cross, rows: tuple[int, ...]
) -> ModelSpec:
    return plain_spec("cross", dense, rows, dim, bottom, top, cross=cross, pooling="mean")


SHAPES = {
    "demo": criteo_spec(rows=100),
    "means": criteo_spec(rows=100, pooling="mean"),
    "cross": criteo_spec(rows=100, cross=Cross(3, 16)),
    "cross odd": cross_spec(3, 20, (7,), (9, 5), Cross(3, 5), (1, 41, 81, 121)),
    "cross narrow": cross_spec(5, 16, (30,), (40,), Cross(2, 8), (9, 10, 11)),
    "cross flat": cross_spec(4, 8, (), (), Cross(1, 70), (3,)),
    "cross of mlperf": criteo_spec(
        rows=300, dim=128, bottom=(512, 256), top=(1024, 1024, 512, 256), cross=Cross(3, 512)
    ),
    "narrow": ModelSpec(
        name="narrow",
        architecture=DlrmDot(dense=5, dim=16, bottom=(30, 16), top=(40, 1)),
        tables=tuple(Table(name=f"t{i}", rows=9 + i) for i in range(3)),
    ),
    "odd": ModelSpec(
        name="odd",
        architecture=DlrmDot(dense=3, dim=20, bottom=(7, 20), top=(9, 5, 1)),
        tables=tuple(Table(name=f"t{i}", rows=1 + 40 * i) for i in range(4)),
    ),
    "deep": ModelSpec(
        name="deep",
        architecture=DlrmDot(dense=20, dim=32, bottom=(300, 512, 256, 32), top=(512, 300, 256, 512, 1)),
        tables=tuple(Table(name=f"t{i}", rows=50) for i in range(20)),
    ),
    "many": ModelSpec(
        name="many",
        architecture=DlrmDot(dense=1, dim=128, bottom=(32, 128), top=(64, 1)),
        tables=tuple(Table(name=f"t{i}", rows=30) for i in range(50)),
    ),
    "flat": ModelSpec(
        name="flat",
        architecture=DlrmDot(dense=4, dim=8, bottom=(8,), top=(1,)),
        tables=(Table(name="t", rows=3),),
    ),
}


@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("rows", ["FP32", "INT8"])
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize(("kernels", "split"), [("auto", 0), ("auto", 1), ("layers", 0)])
def test_models_of_any_shape_score_like_the_reference(
    engine: Build, shape: str, rows: RowType, precision: str, kernels: str, split: int
) -> None:
    """Widths that are no multiple of anything, one table, many, MLPs without hidden layers."""
    artifact = random_model(SHAPES[shape], seed=3)
    artifact = artifact if rows == "FP32" else quantize(artifact, rows)
    one = engine(artifact, precision, kernels, max_rows=200, split=split)
    for size, bag in ((1, None), (130, None), (200, 2), (77, 5)):
        check(one, artifact, random_batch(artifact.spec, size, seed=size, bag=bag))


def test_tables_of_different_row_types_live_together(engine: Build) -> None:
    """The description allows a type for each table."""
    full = random_model(criteo_spec(rows=40), seed=5)
    mixed = quantize(full, "INT8")
    tensors = dict(mixed.tensors)
    tables = list(mixed.spec.tables)
    tables[3] = full.spec.tables[3]
    del tensors[f"tables.{tables[3].name}.scale_bias"]
    tensors[f"tables.{tables[3].name}.weight"] = full.tensors[f"tables.{tables[3].name}.weight"]
    artifact = Artifact(replace(mixed.spec, tables=tuple(tables)), tensors)
    check(engine(artifact, max_rows=128), artifact, random_batch(artifact.spec, 100, seed=6))


@pytest.mark.parametrize("bag", [None, 2])
@pytest.mark.parametrize("bad", [-1, 3000, 2**31 - 1, -(2**31)])
def test_an_id_outside_its_table_is_an_error_and_reads_nothing(
    way: Way, engine: Build, bag: int | None, bad: int
) -> None:
    """A clamped or foreign row would be a plausible, wrong score. The same slot is sound again afterwards."""
    artifact, kernels = way
    one = engine(artifact, "fp16", kernels, max_rows=256, lanes=1, slots=1)
    batch = random_batch(artifact.spec, 200, seed=7, bag=bag)
    ids = batch.ids.copy()
    at = 26 * 150 + 5
    ids[at] = bad
    with pytest.raises(IdOutOfRange, match="outside table C"):
        one.run(RaggedBatch(batch.dense, ids, batch.lengths), np.empty(200, np.float32))
    if bag is None:  # the vector counts as zero: nothing else was read
        expected = Reference(artifact)
        zeroed = dict(artifact.tensors)
        table = artifact.spec.tables[5].name
        zeroed[f"tables.{table}.weight"] = np.zeros_like(zeroed[f"tables.{table}.weight"])
        zeroed[f"tables.{table}.scale_bias"] = np.zeros_like(zeroed[f"tables.{table}.scale_bias"])
        logits = one.slots[0].logits.get()[:200]
        np.testing.assert_allclose(np.delete(logits, 150), np.delete(expected.logits(batch), 150), atol=2e-2)
        np.testing.assert_allclose(
            logits[150], Reference(Artifact(artifact.spec, zeroed)).logits(batch)[150], atol=2e-2
        )
    check(one, artifact, batch)


def test_a_slots_old_rows_never_reach_a_shorter_batch(way: Way, engine: Build) -> None:
    """The rest of a bucket holds what an earlier batch left there, bad ids included: it must not be read."""
    artifact, kernels = way
    one = engine(artifact, "fp16", kernels, max_rows=128, lanes=1, slots=1)
    full = random_batch(artifact.spec, 128, seed=8)
    with pytest.raises(IdOutOfRange):
        one.run(RaggedBatch(np.full_like(full.dense, np.nan), np.full_like(full.ids, -5)), np.empty(128, np.float32))
    for rows in (1, 50, 127):
        check(one, artifact, random_batch(artifact.spec, rows, seed=rows))


def test_batches_in_flight_at_the_same_time_keep_apart(way: Way, engine: Build) -> None:
    """Three lanes, seven slots, submitted before the first is waited for, again and again."""
    artifact, kernels = way
    one = engine(artifact, "fp16", kernels, max_rows=1024, lanes=3, slots=7)
    batches = [random_batch(artifact.spec, 100 + 150 * i, seed=i) for i in range(7)]
    expected = [sigmoid(Reference(artifact).logits(batch)) for batch in batches]
    for _ in range(20):
        for slot, batch in zip(one.slots, batches, strict=True):
            slot.fill(batch)
            one.submit(slot)
        for slot, scores in zip(one.slots, expected, strict=True):
            np.testing.assert_allclose(one.wait(slot), scores, rtol=0, atol=tolerance(artifact, "fp16"))


def test_a_batch_written_in_place_scores_like_one_that_is_copied(big: dict[RowType, Artifact], engine: Build) -> None:
    """Callers may build a batch straight in pinned memory."""
    artifact = big["INT8"]
    one = engine(artifact, max_rows=256)
    batch = random_batch(artifact.spec, 133, seed=9)
    dense, ids = one.slots[1].begin(133)
    dense[:] = batch.dense
    ids[:] = batch.ids.reshape(ids.shape)
    one.submit(one.slots[1])
    expected = sigmoid(Reference(artifact).logits(batch))
    np.testing.assert_allclose(one.wait(one.slots[1]), expected, rtol=0, atol=SCORES["fp16"])


def test_bags_larger_than_the_memory_kept_for_them_are_scored(big: dict[RowType, Artifact], engine: Build) -> None:
    """A history of thousands of items is one bag; memory grows and graphs are captured anew."""
    artifact = big["FP16"]
    one = engine(artifact, "fp32", max_rows=1)
    one.warm_up()
    check(one, artifact, random_batch(artifact.spec, 20, seed=10, bag=12))
    check(one, artifact, random_batch(artifact.spec, 4, seed=11, bag=1))
    assert one.recaptured > 0


def test_a_warmed_up_engine_captures_nothing_for_live_batches(big: dict[RowType, Artifact], engine: Build) -> None:
    """A capture costs milliseconds, and other threads must not use the GPU meanwhile."""
    one = engine(big["INT8"], max_rows=600)
    one.warm_up()
    for rows, bag in ((1, None), (600, None), (300, 3), (130, None)):
        check(one, big["INT8"], random_batch(big["INT8"].spec, rows, seed=rows, bag=bag))
    assert one.recaptured == 0


def test_a_row_of_nan_spoils_only_its_own_score(big: dict[RowType, Artifact], engine: Build) -> None:
    """A caller's NaN must never reach a neighbour."""
    artifact = big["INT8"]
    batch = random_batch(artifact.spec, 90, seed=12)
    dense = batch.dense.copy()
    dense[40] = np.nan
    scores = np.empty(90, np.float32)
    engine(artifact, max_rows=128).run(RaggedBatch(dense, batch.ids), scores)
    expected = sigmoid(Reference(artifact).logits(batch))
    assert np.isnan(scores[40])
    np.testing.assert_allclose(np.delete(scores, 40), np.delete(expected, 40), rtol=0, atol=SCORES["fp16"])


def test_an_artifact_is_served_through_the_backend_protocol(big: dict[RowType, Artifact], tmp_path: Path) -> None:
    """What an executor does: load, warm up, run batches of any size, unload."""
    write(tmp_path / "model", big["INT8"])
    backend = native.load(tmp_path / "model")
    backend.warm_up(512)
    assert (backend.info.name, backend.info.precision, backend.info.lanes) == ("native", "fp16", native.LANES)
    assert backend.capabilities.max_rows == 512
    for rows in (0, 1, 512, 1500):
        batch = random_batch(backend.spec, rows, seed=rows)
        scores = np.empty(rows, np.float32)
        backend.run(batch, scores)
        np.testing.assert_allclose(scores, sigmoid(Reference(big["INT8"]).logits(batch)), rtol=0, atol=2e-3)
    backend.unload()


def test_the_program_for_the_sanitizer_runs_each_kernel() -> None:
    """Memcheck and racecheck on a program that computes nothing would be clean for ever."""
    program = Path(__file__).with_name("sanitize.py")
    done = subprocess.run([sys.executable, str(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(": right, ") == 14
