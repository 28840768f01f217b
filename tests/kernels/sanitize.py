"""Each of our kernels on a tiny batch, without cuBLASLt, for NVIDIA's compute-sanitizer:

    compute-sanitizer --tool memcheck --error-exitcode 9 python tests/kernels/sanitize.py [CASE ...]

and the same with racecheck and synccheck. All cases unless some are named. Matrix products between the kernels are left
out: what they would write stays zero. Every array is an allocation of its own, so that memcheck sees its end. What the
kernels wrote is compared with NumPy. `test_native_gpu.py` runs this without the sanitizer.
"""

import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from narsil_stream.kernels.artifact import Artifact
from narsil_stream.kernels.backend import RaggedBatch
from narsil_stream.kernels.init import Cross, plain_spec, random_batch, random_model
from narsil_stream.kernels.native.fused import FusedPlan
from narsil_stream.kernels.native.layers import Launch, LayersPlan, Products
from narsil_stream.kernels.native.layout import Blob, pack
from narsil_stream.kernels.native.memory import Memory
from narsil_stream.kernels.native.plan import Inputs, Outputs, Plan
from narsil_stream.kernels.native.source import load_module
from narsil_stream.kernels.native.tables import upload
from narsil_stream.kernels.reference import Reference, Rows, interact, lookup, sigmoid

ROWS, BUCKET = 70, 128
"""A block of 64 rows and a part of another; the rest of the bucket is not to be touched."""


class Given(NamedTuple):
    """A model and a batch on the device, and where results go."""

    artifact: Artifact
    batch: RaggedBatch
    memory: Memory
    tables: Any
    packed: Any
    inputs: Inputs
    results: Any
    """[2, BUCKET] FP32: scores, logits."""
    errors: Any
    stream: Any

    def run(self, plan: Plan) -> None:
        plan.prepare(BUCKET, self.batch.lengths is not None, 0, self.stream)
        self.stream.synchronize()
        scores, logits = (row.data.ptr for row in self.results)
        plan.enqueue(self.stream, self.inputs, Outputs(scores, logits, self.errors.data.ptr), BUCKET, 0)
        self.stream.synchronize()
        assert int(self.errors[0]) == 0
        assert not self.results.get()[:, ROWS:].any()
        plan.close()


def given(dtype: Any, bag: int | None, cross: Cross | None = None, dense: float | None = None) -> Given:
    """`dense`: all features of row 3."""
    import cupy

    spec = plain_spec("small", 5, (9, 10, 11), 16, (32,), (40,), dtype, cross=cross, pooling="mean" if bag else "sum")
    artifact = random_model(spec, seed=1)
    batch = random_batch(spec, ROWS, seed=2, bag=bag)
    if dense is not None:
        batch.dense[3] = dense
    blob = Blob.one_hot(BUCKET, 5, 3) if bag is None else Blob.multi_hot(BUCKET, 5, 3, batch.ids.size)
    packed = np.zeros(blob.nbytes, np.uint8)
    pack(packed, blob, batch)
    memory = Memory(cupy.cuda.alloc)  # each array by itself, without a pool: `main`
    on_device = memory.upload(packed)
    at = on_device.data.ptr
    inputs = Inputs(at, at + blob.dense, at + blob.ids, 0 if bag is None else at + blob.offsets)
    results, errors = memory.zeros((2, BUCKET), np.float32), memory.zeros(1, np.int32)
    stream = cupy.cuda.Stream(non_blocking=True)
    return Given(artifact, batch, memory, upload(artifact, memory), on_device, inputs, results, errors, stream)


def vectors(one: Given) -> Any:
    """[ROWS, 1 + tables, dim]: zeros where the bottom MLP's output would be, then the pooled rows of the tables."""
    spec, batch = one.artifact.spec, one.batch
    lengths = np.ones((ROWS, spec.n_sparse), np.int32) if batch.lengths is None else batch.lengths
    bags = np.split(batch.ids, np.cumsum(lengths.reshape(-1))[:-1])
    out = np.zeros((ROWS, 1 + spec.n_sparse, spec.architecture.dim))
    for i, bag in enumerate(bags):
        name = spec.tables[i % spec.n_sparse].name
        tensors = one.artifact.tensors
        rows = Rows(tensors[f"tables.{name}.weight"], tensors.get(f"tables.{name}.scale_bias"))
        if bag.size:
            out[i // spec.n_sparse, 1 + i % spec.n_sparse] = lookup(rows, bag).mean(axis=0)
    return out


def fused(split: int, dtype: str, bag: int | None) -> None:
    one = given(dtype, bag)
    one.run(FusedPlan(one.artifact, one.tables, one.memory, split))
    expected = sigmoid(Reference(one.artifact).logits(one.batch))
    np.testing.assert_allclose(one.results.get()[0, :ROWS], expected, rtol=0, atol=2e-3)


def layers(precision: str, dtype: str, bag: int | None, cross: Cross | None = None) -> None:
    one = given(dtype, bag, cross)
    arch = f"sm_{cupy_arch()}"
    plan = LayersPlan(one.artifact, one.tables, one.memory, precision, arch, BUCKET)

    nothing: Launch = lambda stream: None  # noqa: E731  (in the place of a product)
    plan._products[BUCKET, 0] = Products([], [(nothing, nothing)] * (cross.layers if cross else 0), [])
    one.run(plan)
    found = plan._scratch[0].top[0].get()
    if precision == "bf16":
        found = (found.astype(np.uint32) << 16).view(np.float32)
    x = vectors(one)
    expected = interact(x) if cross is None else x.reshape(ROWS, -1)  # x_0 * 0 + x_0
    tolerance = {"fp32": 1e-5, "fp16": 1e-2, "bf16": 5e-2}[precision]
    np.testing.assert_allclose(found[:ROWS, : expected.shape[1]], expected, rtol=tolerance, atol=tolerance)
    assert not found[ROWS:].any()
    bias = one.artifact.tensors["top.1.bias"][0]
    np.testing.assert_allclose(one.results.get()[1, :ROWS], bias, atol=1e-6)


def huge(kernels: str) -> None:
    """A row beyond FP16's range: a finite score of the fused kernel; head looks at what products read and wrote."""
    one = given("INT8", None, dense=1e30 if kernels == "fused" else np.inf)
    if kernels == "fused":
        one.run(FusedPlan(one.artifact, one.tables, one.memory, 4))
    else:
        arch = f"sm_{cupy_arch()}"
        plan = LayersPlan(one.artifact, one.tables, one.memory, "fp16", arch, BUCKET)
        plan._products[BUCKET, 0] = Products([], [], [])
        one.run(plan)
    broken = np.isnan(one.results.get()[:, :ROWS])
    expected = np.zeros((2, ROWS), bool)
    expected[:, 3] = kernels == "layers"
    np.testing.assert_array_equal(broken, expected)


def cupy_arch() -> str:
    import cupy

    return str(cupy.cuda.Device().compute_capability)


def pull() -> None:
    import cupy

    source, to = cupy.arange(4 * 300, dtype=np.int32), cupy.zeros(4 * 300, np.int32)
    kernel = load_module("pull.cu", {}, f"sm_{cupy_arch()}").get_function("pull")
    kernel((2,), (256,), (source, to, np.int32(300)))
    np.testing.assert_array_equal(to.get(), source.get())


CASES: dict[str, Callable[[], None]] = {
    "pull": pull,
    "layers-fp16": lambda: layers("fp16", "INT8", None),
    "layers-bf16-bags": lambda: layers("bf16", "FP16", 3),
    "layers-fp32-bags": lambda: layers("fp32", "INT8", 3),
    "cross-fp16": lambda: layers("fp16", "INT8", None, Cross(2, 8)),
    "cross-bf16-bags": lambda: layers("bf16", "FP32", 3, Cross(2, 8)),
    "cross-fp32-bags": lambda: layers("fp32", "FP16", 3, Cross(2, 8)),
    "fused-1": lambda: fused(1, "INT8", None),
    "fused-1-bags": lambda: fused(1, "FP16", 3),
    "fused-2": lambda: fused(2, "INT8", None),
    "fused-4": lambda: fused(4, "INT8", None),
    "fused-4-bags": lambda: fused(4, "FP32", 3),
    "fused-huge": lambda: huge("fused"),
    "layers-huge": lambda: huge("layers"),
}


def main(names: list[str]) -> None:
    import cupy

    if unknown := set(names) - set(CASES):
        sys.exit(f"no case is called {', '.join(sorted(unknown))}; there are: {', '.join(CASES)}")
    cupy.cuda.set_allocator(None)
    for name in names or CASES:
        start = time.perf_counter()
        CASES[name]()
        print(f"{name}: right, {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
