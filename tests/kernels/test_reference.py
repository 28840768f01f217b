from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from narsil_stream.kernels import reference
from narsil_stream.kernels.artifact import Artifact, write
from narsil_stream.kernels.backend import Backend, RaggedBatch
from narsil_stream.kernels.init import Cross, criteo_spec, random_batch, random_model
from narsil_stream.kernels.reference import Reference
from narsil_stream.schemas.model import DcnV2

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
    shape = spec.architecture
    bottom = layers("bottom", dense, len(shape.bottom), True)
    vectors = [bottom]
    for table, bag in zip(spec.tables, bags, strict=True):
        rows = [row(table.name, i) for i in bag]
        parts = len(rows) if shape.pooling == "mean" else 1
        vectors.append([sum(values) / parts for values in zip(*rows, strict=True)] if rows else [0.0] * len(bottom))
    if isinstance(shape, DcnV2):
        hidden = slow_cross(tensors, [value for vector in vectors for value in vector], shape)
    else:
        pairs = [(vectors[i], vectors[j]) for i in range(len(vectors)) for j in range(i)]
        hidden = bottom + [sum(a * b for a, b in zip(*pair, strict=True)) for pair in pairs]
    (logit,) = layers("top", hidden, len(shape.top), False)
    return float(1 / (1 + np.exp(-logit)))


def slow_cross(tensors: dict[str, np.ndarray[Any, Any]], first: list[float], shape: DcnV2) -> list[float]:
    x = first
    for i in range(shape.cross_layers):
        narrow = [sum(a * b for a, b in zip(row, x, strict=True)) for row in tensors[f"cross.{i}.v"]]
        wide = [sum(a * b for a, b in zip(row, narrow, strict=True)) for row in tensors[f"cross.{i}.w"]]
        terms = zip(first, wide, tensors[f"cross.{i}.bias"], x, strict=True)
        x = [start * (product + bias) + before for start, product, bias, before in terms]
    return x


def biased(model: Artifact) -> Artifact:
    """With biases, which random models leave zero: a bias in a wrong place would go unseen."""
    rng = np.random.default_rng(77)
    for name, tensor in model.tensors.items():
        if name.endswith(".bias"):
            tensor += rng.normal(0, 0.2, tensor.shape).astype(np.float32)
    return model


@pytest.mark.parametrize("bag", [None, 4])
def test_scores_follow_the_formula_row_by_row(model: Artifact, bag: int | None) -> None:
    """The oracle of all other backends must itself be right, for each row type, one-hot and multi-hot."""
    biased(model)
    batch = random_batch(model.spec, 25, seed=2, bag=bag)
    expected = [
        slow_score(model, dense, bags)
        for dense, bags in zip(batch.dense.tolist(), bags_of(batch, model.spec.n_sparse), strict=True)
    ]
    np.testing.assert_allclose(score(Reference(model), batch), expected, atol=ROUNDING, rtol=0)


def torchrec_scores(model: Artifact, batch: RaggedBatch) -> Any:
    """What TorchRec's own model says with the same weights, in FP64 but for the rows."""
    import torch
    from torchrec.models.dlrm import DLRM, DLRM_DCN
    from torchrec.modules.embedding_configs import EmbeddingBagConfig, PoolingType
    from torchrec.modules.embedding_modules import EmbeddingBagCollection
    from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

    spec, shape = model.spec, model.spec.architecture
    names = [table.name for table in spec.tables]
    configs = [
        EmbeddingBagConfig(
            name=table.name,
            embedding_dim=shape.dim,
            num_embeddings=table.rows,
            feature_names=[table.name],
            pooling=PoolingType[shape.pooling.upper()],
        )
        for table in spec.tables
    ]
    common = (EmbeddingBagCollection(tables=configs), spec.n_dense, list(shape.bottom), list(shape.top))
    if isinstance(shape, DcnV2):
        network = DLRM_DCN(*common, dcn_num_layers=shape.cross_layers, dcn_low_rank_dim=shape.cross_rank)
    else:
        network = DLRM(*common)
    network.load_state_dict(torchrec_state(model))
    network.double()

    lengths = np.ones((batch.rows, spec.n_sparse), np.int32) if batch.lengths is None else batch.lengths
    bags = bags_of(batch, spec.n_sparse)
    ids = [i for t in range(spec.n_sparse) for row in bags for i in row[t]]
    features = KeyedJaggedTensor(names, torch.tensor(ids), lengths=torch.from_numpy(lengths.T.copy().reshape(-1)))
    with torch.no_grad():
        return torch.sigmoid(network(torch.from_numpy(batch.dense).double(), features))[:, 0].numpy()


def torchrec_state(model: Artifact) -> dict[str, Any]:
    """Weights under TorchRec's names. Its DLRM has the products in the order (0,1), (0,2) ... (1,2) ..."""
    import torch

    spec, shape, tensors = model.spec, model.spec.architecture, model.tensors
    found = {}
    for i in range(len(shape.bottom)):
        for kind in ("weight", "bias"):
            found[f"dense_arch.model._mlp.{i}._linear.{kind}"] = tensors[f"bottom.{i}.{kind}"]
    for table in spec.tables:
        found[f"sparse_arch.embedding_bag_collection.embedding_bags.{table.name}.weight"] = tensors[
            f"tables.{table.name}.weight"
        ]
    last = len(shape.top) - 1
    for i in range(last + 1):
        place = "over_arch.model.1" if i == last else f"over_arch.model.0._mlp.{i}._linear"
        for kind in ("weight", "bias"):
            found[f"{place}.{kind}"] = tensors[f"top.{i}.{kind}"]
    if isinstance(shape, DcnV2):
        for i in range(shape.cross_layers):
            for theirs, ours in (("V_kernels", "v"), ("W_kernels", "w"), ("bias", "bias")):
                found[f"inter_arch.crossnet.{theirs}.{i}"] = tensors[f"cross.{i}.{ours}"]
    else:
        low, high = np.triu_indices(spec.n_sparse + 1, k=1)
        columns = [*range(shape.dim), *(shape.dim + high * (high - 1) // 2 + low)]
        found["over_arch.model.0._mlp.0._linear.weight"] = tensors["top.0.weight"][:, columns]
    return {name: torch.from_numpy(np.ascontiguousarray(tensor)) for name, tensor in found.items()}


@pytest.mark.parametrize("bag", [None, 3])
@pytest.mark.parametrize("pooling", ["sum", "mean"])
@pytest.mark.parametrize("network", [None, Cross(3, 8), Cross(1, 500)], ids=["dot", "cross", "cross of high rank"])
def test_scores_equal_those_of_torchrecs_own_models(
    network: Cross | None, pooling: Literal["sum", "mean"], bag: int | None
) -> None:
    """Weights trained in TorchRec must mean the same here: orientation, pooling, order of the products, biases."""
    pytest.importorskip("torchrec", reason="torchrec is not installed")
    model = biased(random_model(criteo_spec(rows=50, cross=network, pooling=pooling), seed=4))
    batch = random_batch(model.spec, 70, seed=5, bag=bag)
    scores = score(Reference(model), batch)
    np.testing.assert_allclose(scores, torchrec_scores(model, batch), atol=ROUNDING, rtol=0)
    assert scores.std() > 0.1


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


def test_the_cross_network_multiplies_with_the_first_vector_in_every_layer() -> None:
    """x_0 in the place of x_l, or x_l in the place of x_0, gives plausible scores from the second layer on."""
    one = reference.CrossLayer(v=np.array([[1.0, 2.0]]), w=np.array([[3.0], [5.0]]), bias=np.array([1.0, -1.0]))
    x = np.array([[[2.0], [3.0]]])  # one row of two vectors of width 1
    first = [2 * (3 * 8 + 1) + 2, 3 * (5 * 8 - 1) + 3]
    second = [2 * (3 * (52 + 240) + 1) + 52, 3 * (5 * (52 + 240) - 1) + 120]
    assert first == [52, 120]
    np.testing.assert_array_equal(reference.cross(x, [one]), [first])
    np.testing.assert_array_equal(reference.cross(x, [one, one]), [second])


def test_pooling_joins_bags_with_empty_ones_between_and_at_both_ends() -> None:
    """NumPy's reduceat gives a neighbour's row for an empty bag: the classic mistake."""
    rows = np.arange(10, dtype=np.float32).reshape(5, 2)
    lengths = np.array([0, 2, 0, 0, 3, 0], np.int32)
    expected = [[0, 0], [2, 4], [0, 0], [0, 0], [18, 21], [0, 0]]
    np.testing.assert_array_equal(reference.pool(rows, lengths), expected)
    means = [[0, 0], [1, 2], [0, 0], [0, 0], [6, 7], [0, 0]]
    np.testing.assert_array_equal(reference.pool(rows, lengths, "mean"), means)


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
