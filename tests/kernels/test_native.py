"""The native backend where there is no GPU: layouts, what it takes and refuses, and that its kernels compile."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from msgspec.structs import replace

from narsil_stream.kernels import native
from narsil_stream.kernels.artifact import Artifact
from narsil_stream.kernels.init import Cross, criteo_spec, random_batch, random_model
from narsil_stream.kernels.native import fused, layout, operands
from narsil_stream.kernels.reference import Reference, interact
from narsil_stream.schemas.model import DcnV2, DlrmDot, ModelSpec

SPEC = criteo_spec(rows=50, dim=64, bottom=(512, 256), top=(512, 512, 256))


CROSS = criteo_spec(rows=50, dim=128, bottom=(512, 256), top=(1024, 512, 256), cross=Cross(3, 512), pooling="mean")
ODD = replace(SPEC, architecture=DlrmDot(3, 20, (7, 20), (9, 5, 1)), tables=SPEC.tables[:4], preprocessing=None)
ODD_CROSS = replace(ODD, architecture=DcnV2(3, 20, (7, 20), (9, 5, 1), cross_layers=3, cross_rank=5))
FLAT_CROSS = replace(ODD, architecture=DcnV2(3, 20, (20,), (1,), cross_layers=1, cross_rank=70))


def test_importing_the_package_imports_no_cupy() -> None:
    """`narsil --help` on a laptop must neither fail nor wait for a GPU library."""
    code = (
        "import sys, narsil_stream.kernels.native, narsil_stream.kernels.native.engine; sys.exit('cupy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_loading_without_cupy_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first thing that a user without a GPU sees."""
    monkeypatch.setitem(sys.modules, "cupy", None)
    with pytest.raises(native.Unavailable, match=r"needs CuPy .* pip install 'narsil-stream\[cuda\]'"):
        native.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dim": 48, "bottom": (64, 48)}, "rows of 48 values"),
        ({"dense": 65}, "65 dense features"),
        ({"bottom": (64,)}, "without a hidden layer"),
        ({"top": (1024, 1)}, "wider than 512"),
    ],
)
def test_the_fused_kernel_says_why_it_cannot_take_a_model(change: dict[str, object], reason: str) -> None:
    """The reason stands in the log beside the way that is used instead."""
    spec = replace(SPEC, architecture=replace(SPEC.architecture, **change), preprocessing=None)
    assert reason in str(fused.misfit(spec))
    assert fused.misfit(SPEC) is None


def test_the_fused_kernel_leaves_cross_networks_to_the_others() -> None:
    """It would compute products of vectors instead."""
    assert "cross network" in str(fused.misfit(CROSS))


@pytest.mark.parametrize("spec", [SPEC, CROSS, ODD, ODD_CROSS, FLAT_CROSS])
def test_padded_weights_compute_what_the_models_own_do(spec: ModelSpec) -> None:
    """The products of the layers path, with its layouts of x_0 and z, in NumPy: a column off by one looks plausible."""
    artifact = random_model(spec, seed=8)
    rng = np.random.default_rng(9)
    for name, tensor in artifact.tensors.items():
        if name.endswith(".bias"):
            tensor += rng.normal(0, 0.2, tensor.shape).astype(np.float32)
    batch = random_batch(spec, 40, seed=10)
    weights = operands.operands(artifact)

    def product(x: Any, layer: operands.Layer) -> Any:
        y = x @ layer.weight.T + (0 if layer.bias is None else layer.bias)
        return np.maximum(y, 0) if layer.relu else y

    dim, vector = spec.architecture.dim, layout.round_up(spec.architecture.dim, 16)
    x = layout.padded(batch.dense, (40, layout.round_up(spec.n_dense, 16)), np.float32).astype(np.float64)
    for layer in weights.bottom:
        x = product(x, layer)
    vectors = np.zeros((40, 1 + spec.n_sparse, vector))
    vectors[:, 0] = x
    for t, ids in enumerate(batch.ids.reshape(40, -1).T):
        vectors[:, 1 + t, :dim] = artifact.tensors[f"tables.C{t + 1}.weight"][ids]
    z = np.zeros((40, operands.z_width(spec)))
    if weights.cross:
        z[:] = start = vectors.reshape(40, -1)
        for v, w in weights.cross:
            z = start * product(product(z, v), w) + z
    else:
        z[:, : spec.top_input] = interact(vectors)[:, [*range(dim), *range(vector, vector + spec.top_input - dim)]]
    for layer in weights.top:
        z = product(z, layer)
    logits = z @ weights.head[:-1] + weights.head[-1]
    np.testing.assert_allclose(logits, Reference(artifact).logits(batch), rtol=1e-5, atol=1e-5)
    assert all(layer.inputs % 8 == layer.outputs % 8 == 0 for pair in weights.cross for layer in pair)


@settings(deadline=None)
@given(arrays(np.float32, array_shapes(max_dims=2), elements=st.floats(allow_nan=False, width=32)))
def test_bf16_weights_are_those_of_torch_bit_for_bit(values: Any) -> None:
    """NumPy has no BF16: weights are rounded here, to nearest, ties to even."""
    torch = pytest.importorskip("torch", reason="torch is not installed")
    expected = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    np.testing.assert_array_equal(operands.encode(values, "bf16"), expected)
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20], np.float32)
    assert operands.encode(ties, "bf16").tolist() == [0x3F80, 0x3F82, 0x3F81]


@pytest.mark.parametrize("bag", [None, 4])
def test_a_packed_batch_holds_every_input_at_its_place(bag: int | None) -> None:
    """One copy moves all of it; kernels find the parts by the bucket's offsets alone."""
    batch = random_batch(SPEC, 90, seed=1, bag=bag)
    blob = layout.Blob.one_hot(128, 13, 26)
    if bag is not None:
        blob = layout.Blob.multi_hot(128, 13, 26, batch.ids.size)
    memory = np.full(blob.nbytes, 0xEE, np.uint8)
    layout.pack(memory, blob, batch)
    assert memory[:4].view(np.int32)[0] == 90
    np.testing.assert_array_equal(
        memory[blob.dense :].view(np.uint8)[: 90 * 13 * 4].view(np.float32), batch.dense.ravel()
    )
    np.testing.assert_array_equal(memory[blob.ids :][: batch.ids.nbytes].view(np.int32), batch.ids)
    assert blob.ids % 16 == blob.offsets % 16 == 0
    if batch.lengths is not None:
        ends = memory[blob.offsets :][: 4 * (90 * 26 + 1)].view(np.int32)
        np.testing.assert_array_equal(np.diff(ends), batch.lengths.ravel())


def test_operands_of_the_first_layer_are_where_the_lanes_look() -> None:
    """Lane 4 g + t: output 8 n + g, inputs 16 k + (2t, 2t + 1, 2t + 8, 2t + 9)."""
    weight = np.arange(24 * 32, dtype=np.float16).reshape(24, 32)
    operands = layout.first_operand(weight)
    for k, n, g, t in [(0, 0, 0, 0), (1, 2, 5, 3), (0, 1, 7, 2)]:
        inputs = [16 * k + i for i in (2 * t, 2 * t + 1, 2 * t + 8, 2 * t + 9)]
        np.testing.assert_array_equal(operands[k, n, 4 * g + t], weight[8 * n + g, inputs])


def test_tiles_are_swizzled_by_row() -> None:
    """Chunk c of row r at place c ^ (r % 8): what wgmma's descriptors of fused.cu say."""
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((16, 128)).astype(np.float16)
    tiles = layout.swizzled_tiles(weight)
    for block, row, chunk in [(0, 0, 0), (1, 3, 5), (1, 13, 7)]:
        place = (chunk ^ (row % 8)) * 8
        start = block * 64 + chunk * 8
        np.testing.assert_array_equal(tiles[block, row, place : place + 8], weight[row, start : start + 8])


@pytest.mark.parametrize("split", [1, 2, 4])
def test_every_block_streams_each_of_its_weights_once(split: int) -> None:
    """The last bottom layer goes to all blocks, other layers are divided among them."""
    rng = np.random.default_rng(4)
    bottom, whole, top = (
        rng.permutation(1 << 15)[: a * b].reshape(a, b).astype(np.float32)
        for a, b in ((256, 64), (16, 256), (256, 128))
    )
    streams = layout.weight_streams([bottom], whole, [top], split)  # any type will do
    assert streams.shape == (split, (bottom.size + top.size) // split + whole.size)
    shared = np.sort(np.concatenate([np.tile(whole.ravel(), split), bottom.ravel(), top.ravel()]))
    np.testing.assert_array_equal(np.sort(streams.ravel()), shared)


def test_the_interactions_columns_keep_their_meaning_in_the_fused_kernel() -> None:
    """The kernel stores products in another order, and the first top layer's weights follow."""
    artifact: Artifact = random_model(criteo_spec(rows=10, dim=16, bottom=(32,), top=(300,)), seed=5)
    rng = np.random.default_rng(6)
    x = rng.standard_normal((3, 27, 16)).astype(np.float32)
    z = interact(x)
    columns = layout.product_columns(16, 26)
    assert len(set(columns.tolist())) == z.shape[1] <= layout.product_width(16, 26)
    assert columns.max() < layout.product_width(16, 26)
    placed = np.zeros((3, 448), np.float32)
    placed[:, columns] = z
    _, (_, _, (first, *_)), _, _ = fused.weights(artifact)
    expected = z @ artifact.tensors["top.0.weight"].T
    np.testing.assert_allclose((placed[:, : first.shape[1]] @ first.T.astype(np.float32))[:, :300], expected, atol=0.1)
    assert not first[300:].any()
    assert Reference(artifact).spec is artifact.spec
