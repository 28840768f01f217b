from pathlib import Path
from typing import Any

import numpy as np
import pytest

from narsil_stream.kernels import reference
from narsil_stream.kernels.artifact import Artifact, write
from narsil_stream.kernels.backend import Backend, RaggedBatch
from narsil_stream.kernels.init import criteo_spec, random_batch, random_model
from narsil_stream.kernels.reference import Reference

ROUNDING = 1e-6


def score(backend: Backend, batch: RaggedBatch) -> np.ndarray[Any, Any]:
    scores = np.full(batch.rows, np.nan, np.float32)
    backend.run(batch, scores)
    return scores


def bags_of(batch: RaggedBatch, tables: int) -> list[list[list[int]]]:
    """ids[row][table] as plain lists."""
    lengths = np.ones((batch.rows, tables), int) if batch.lengths is None else batch.lengths
    ids = iter(batch.ids.tolist())
    return [[[next(ids) for _ in range(n)] for n in row] for row in lengths.tolist()]


def slow_score(model: Artifact, dense: list[float], bags: list[list[int]]) -> float:
    """One row by the formula, in float64 and plain loops."""
    tensors = {name: t.astype(np.float64) for name, t in model.tensors.items()}

    def layers(part: str, x: list[float], count: int, last_relu: bool) -> list[float]:
        for i in range(count):
            weight, bias = tensors[f"{part}.{i}.weight"], tensors[f"{part}.{i}.bias"]
            x = [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in zip(weight, bias, strict=True)]
            x = [max(0.0, v) for v in x] if last_relu or i < count - 1 else x
        return x

    def row(name: str, i: int) -> list[float]:
        scale, bias = tensors.get(f"tables.{name}.scale_bias", {i: (1.0, 0.0)})[i]
        return [q * scale + bias for q in tensors[f"tables.{name}.weight"][i]]

    spec = model.spec
    bottom = layers("bottom", dense, len(spec.architecture.bottom), True)
    vectors = [bottom]
    for table, bag in zip(spec.tables, bags, strict=True):
        rows = [row(table.name, i) for i in bag]
        vectors.append([sum(values) for values in zip(*rows, strict=True)] if rows else [0.0] * len(bottom))
    products = [
        sum(a * b for a, b in zip(vectors[i], vectors[j], strict=True)) for i in range(len(vectors)) for j in range(i)
    ]
    (logit,) = layers("top", bottom + products, len(spec.architecture.top), False)
    return float(1 / (1 + np.exp(-logit)))


@pytest.mark.parametrize("bag", [None, 4])
def test_scores_follow_the_formula_row_by_row(model: Artifact, bag: int | None) -> None:
    """The oracle of all other backends must itself be right, for each row type, one-hot and multi-hot."""
    batch = random_batch(model.spec, 25, seed=2, bag=bag)
    expected = [
        slow_score(model, dense, bags)
        for dense, bags in zip(batch.dense.tolist(), bags_of(batch, model.spec.n_sparse), strict=True)
    ]
    np.testing.assert_allclose(score(Reference(model), batch), expected, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("bag", [None, 3])
def test_scores_equal_those_of_torch_modules(bag: int | None) -> None:
    """Weights trained with torch's layers must mean the same here: orientation, pooling, order of the products."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    model = random_model(criteo_spec(rows=50), seed=4)
    batch = random_batch(model.spec, 70, seed=5, bag=bag)
    lengths = np.ones((70, 26), np.int32) if batch.lengths is None else batch.lengths
    weights = {name: torch.from_numpy(t) for name, t in model.tensors.items()}

    def mlp(part: str, x: Any, count: int) -> Any:
        for i in range(count):
            x = torch.nn.functional.linear(x, weights[f"{part}.{i}.weight"], weights[f"{part}.{i}.bias"])
            x = torch.relu(x) if part == "bottom" or i < count - 1 else x
        return x

    bags = bags_of(batch, 26)
    x = [mlp("bottom", torch.from_numpy(batch.dense), 2)]
    for t in range(26):
        table = torch.nn.EmbeddingBag.from_pretrained(weights[f"tables.C{t + 1}.weight"], mode="sum")
        ids = torch.tensor([i for row in bags for i in row[t]], dtype=torch.int64)
        starts = torch.from_numpy(np.cumsum(lengths[:, t]) - lengths[:, t])
        x.append(table(ids, starts))
    stack = torch.stack(x, dim=1)
    i, j = torch.tril_indices(27, 27, offset=-1)
    products = torch.bmm(stack, stack.transpose(1, 2))[:, i, j]
    expected = torch.sigmoid(mlp("top", torch.cat([x[0], products], dim=1), 3))[:, 0].numpy()
    np.testing.assert_allclose(score(Reference(model), batch), expected, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("bag", [None, 3])
def test_a_rows_score_does_not_depend_on_its_company(bag: int | None) -> None:
    """Requests are coalesced: what others send in the same batch must not change an answer."""
    model = random_model(criteo_spec(rows=100), seed=6)
    backend = Reference(model)
    batch = random_batch(model.spec, 600, seed=7, bag=bag)
    together = score(backend, batch)
    ends = np.cumsum(batch.lengths.sum(axis=1)) if batch.lengths is not None else np.arange(1, 601) * 26
    for first, last in [(0, 1), (5, 6), (250, 260), (255, 257), (17, 530), (599, 600)]:
        ids = batch.ids[ends[first - 1] if first else 0 : ends[last - 1]]
        lengths = None if batch.lengths is None else batch.lengths[first:last]
        alone = score(backend, RaggedBatch(batch.dense[first:last], ids, lengths))
        np.testing.assert_allclose(alone, together[first:last], atol=ROUNDING, rtol=0)


def test_a_row_of_nan_spoils_only_its_own_score(model: Artifact) -> None:
    """A caller's NaN must never reach a neighbour."""
    batch = random_batch(model.spec, 9, seed=8)
    clean = score(Reference(model), batch)
    dense = batch.dense.copy()
    dense[4] = np.nan
    spoiled = score(Reference(model), RaggedBatch(dense, batch.ids))
    assert np.isnan(spoiled[4])
    np.testing.assert_allclose(np.delete(spoiled, 4), np.delete(clean, 4), atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("bag", [None, 2])
def test_a_batch_without_rows_has_no_scores(model: Artifact, bag: int | None) -> None:
    """An empty request is legal and must not end in an exception."""
    assert score(Reference(model), random_batch(model.spec, 0, seed=9, bag=bag)).shape == (0,)


def test_a_batch_of_empty_bags_is_scored_by_its_dense_features(model: Artifact) -> None:
    """A visitor without history has empty lists in every multi-hot feature."""
    lengths = np.zeros((3, 3), np.int32)
    batch = RaggedBatch(np.ones((3, 3), np.float32), np.zeros(0, np.int32), lengths)
    expected = slow_score(model, [1.0, 1.0, 1.0], [[], [], []])
    np.testing.assert_allclose(score(Reference(model), batch), [expected] * 3, atol=ROUNDING, rtol=0)


def test_bags_of_one_id_score_like_one_hot_rows(model: Artifact) -> None:
    """Both layouts say the same where they can."""
    batch = random_batch(model.spec, 40, seed=10)
    bags = RaggedBatch(batch.dense, batch.ids, np.ones((40, 3), np.int32))
    np.testing.assert_array_equal(score(Reference(model), batch), score(Reference(model), bags))


def test_arguments_may_be_read_only_and_are_left_alone(model: Artifact) -> None:
    """Batches are views of a message's bytes."""
    batch = random_batch(model.spec, 12, seed=11, bag=3)
    assert batch.lengths is not None
    arrays = (batch.dense, batch.ids, batch.lengths)
    before = [array.copy() for array in arrays]
    for array in arrays:
        array.flags.writeable = False
    score(Reference(model), batch)
    for array, copy in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, copy)


def test_extreme_inputs_saturate_without_a_warning(model: Artifact) -> None:
    """Overflow warnings in a server's log hide real ones; a score stays in [0, 1]."""
    for value in (1e4, -1e4):
        dense = np.full((2, 3), value, np.float32)
        scores = score(Reference(model), RaggedBatch(dense, np.zeros(6, np.int32)))
        assert np.all((scores >= 0) & (scores <= 1))
    with np.errstate(all="raise", under="ignore"):
        extremes = reference.sigmoid(np.array([-1e4, -20, 0, 20, 1e4], np.float32))
    np.testing.assert_allclose(extremes, [0, 2.0611537e-9, 0.5, 1, 1], rtol=1e-6)


def test_interaction_orders_pairs_as_the_description_says() -> None:
    """Another order of the same products would score trained weights wrongly, and look plausible."""
    x = np.array([[[1, 2], [3, 5], [7, 11], [13, 17]]], np.float32)
    expected = [[1, 2, 13, 29, 76, 47, 124, 278]]
    np.testing.assert_array_equal(reference.interact(x), expected)


def test_pooling_sums_bags_with_empty_ones_between_and_at_both_ends() -> None:
    """NumPy's reduceat gives a neighbour's row for an empty bag: the classic mistake."""
    rows = np.arange(10, dtype=np.float32).reshape(5, 2)
    lengths = np.array([0, 2, 0, 0, 3, 0], np.int32)
    expected = [[0, 0], [2, 4], [0, 0], [0, 0], [18, 21], [0, 0]]
    np.testing.assert_array_equal(reference.pool(rows, lengths), expected)


def test_a_loaded_artifact_scores_like_the_model_that_was_written(tmp_path: Path, model: Artifact) -> None:
    """What was measured before saving is what gets served."""
    write(tmp_path / "model", model)
    backend = reference.load(tmp_path / "model")
    batch = random_batch(model.spec, 30, seed=12)
    backend.warm_up(1000)
    np.testing.assert_array_equal(score(backend, batch), score(Reference(model), batch))
    assert (backend.info.name, backend.info.precision) == ("reference", "fp64")
    assert backend.spec.files
    backend.unload()
