"""The forward pass in parts: our kernels around cuBLASLt's products. Any widths, any GPU, FP16, TF32 or FP32."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from narsil_stream.kernels.artifact import Artifact
from narsil_stream.kernels.native import source
from narsil_stream.kernels.native.cublaslt import WORKSPACE_BYTES, Library, Product
from narsil_stream.kernels.native.layout import padded, round_up
from narsil_stream.kernels.native.plan import Inputs, Outputs, row_defines
from narsil_stream.kernels.native.tables import DeviceTables

_SAMPLES_A_BLOCK = 4


class Layer(NamedTuple):
    """Weights on the device, CuPy arrays: weight [outputs, inputs], bias [outputs], padded."""

    weight: Any
    bias: Any

    @property
    def outputs(self) -> int:
        return int(self.weight.shape[0])

    @property
    def inputs(self) -> int:
        return int(self.weight.shape[1])


class Scratch(NamedTuple):
    """Memory of one lane: the input of each product, the output of the last, and cuBLASLt's workspace."""

    bottom: list[Any]
    top: list[Any]
    workspace: Any


class LayersPlan:
    """Four kernels of `layers.cu` and one product for each hidden layer."""

    name = "layers"
    reads_inputs_once = False

    def __init__(self, artifact: Artifact, tables: DeviceTables, precision: str, arch: str, max_rows: int) -> None:
        """`precision`: fp16, tf32 or fp32, of the MLPs and the interaction."""
        self._spec, self._tables, self._precision, self._arch = artifact.spec, tables, precision, arch
        self._max_rows = max_rows
        self._dtype: type[np.floating[Any]] = np.float16 if precision == "fp16" else np.float32
        shape = artifact.spec.architecture
        self._z_width = round_up(artifact.spec.top_input, 8)
        bottom = [
            round_up(artifact.spec.n_dense, 16),
            *(round_up(n, 8) for n in shape.bottom[:-1]),
            round_up(shape.dim, 16),
        ]
        top = [self._z_width, *(round_up(n, 8) for n in shape.top[:-1])]
        self._bottom = _upload(artifact, "bottom", bottom, self._dtype)
        self._top = _upload(artifact, "top", top, self._dtype)
        self._head = _head(artifact, top[-1])
        self._library = Library()
        self._kernels: dict[bool, dict[str, Any]] = {}
        self._scratch: dict[int, Scratch] = {}
        self._products: dict[tuple[int, int], list[Callable[[int], None]]] = {}

    def resize(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._scratch.clear()
        self._products.clear()

    def prepare(self, rows: int, multi_hot: bool, lane: int, stream: Any) -> None:
        if multi_hot not in self._kernels:
            self._kernels[multi_hot] = self._load(multi_hot)
        if lane not in self._scratch:
            self._scratch[lane] = self._allocate()
        if (rows, lane) not in self._products:
            scratch = self._scratch[lane]
            chain = [*zip(self._bottom, scratch.bottom, scratch.bottom[1:], strict=False)]
            chain += [*zip(self._top, scratch.top, scratch.top[1:], strict=False)]
            self._products[rows, lane] = [
                self._library.plan(
                    Product(
                        rows=rows,
                        inputs=layer.inputs,
                        outputs=layer.outputs,
                        x=x.data.ptr,
                        w=layer.weight.data.ptr,
                        bias=layer.bias.data.ptr,
                        y=y.data.ptr,
                    ),
                    self._precision,
                    scratch.workspace.data.ptr,
                    stream,
                )
                for layer, x, y in chain
            ]

    def enqueue(self, stream: Any, given: Inputs, out: Outputs, rows: int, lane: int) -> None:
        kernels, scratch = self._kernels[bool(given.offsets)], self._scratch[lane]
        products = self._products[rows, lane]
        threads = rows * round_up(self._spec.n_dense, 16)
        blocks = -(-rows // _SAMPLES_A_BLOCK)
        with stream:
            kernels["pad_dense"]((-(-threads // 256),), (256,), (given.header, given.dense, scratch.bottom[0]))
            for product in products[: len(self._bottom)]:
                product(stream.ptr)
            self._interact(kernels, given, scratch, out, rows)
            for product in products[len(self._bottom) :]:
                product(stream.ptr)
            kernels["head"]((blocks,), (128,), (given.header, scratch.top[-1], self._head, out.scores, out.logits))

    def _interact(self, kernels: dict[str, Any], given: Inputs, scratch: Scratch, out: Outputs, rows: int) -> None:
        args = (
            given.header,
            given.ids,
            given.offsets,
            *self._tables.pointers,
            scratch.bottom[-1],
            scratch.top[0],
            out.errors,
        )
        kernel = kernels["interact"]
        if self._dtype is np.float16:
            blocks = -(-rows // _SAMPLES_A_BLOCK)
            kernel((blocks,), (128,), args, shared_mem=self._shared_bytes)
        else:
            kernel((rows,), (32,), args, shared_mem=self._shared_bytes)

    @property
    def _shared_bytes(self) -> int:
        """Of one block of the interaction: z of four samples, or all vectors of one in FP32."""
        if self._dtype is np.float16:
            return _SAMPLES_A_BLOCK * self._z_width * 2
        return (self._spec.n_sparse + 1) * (self._spec.architecture.dim + 1) * 4

    def _load(self, multi_hot: bool) -> dict[str, Any]:
        defines = row_defines(self._spec, self._tables.row_bytes, multi_hot) | {
            "ZP": self._z_width,
            "HEAD": int(self._head.size) - 1,
            "MLP_BYTES": np.dtype(self._dtype).itemsize,
        }
        module = source.load_module("layers.cu", defines, self._arch)
        interact = module.get_function("interact_half" if self._dtype is np.float16 else "interact_float")
        if self._shared_bytes > 48 << 10:
            interact.max_dynamic_shared_size_bytes = self._shared_bytes
        return {
            "pad_dense": module.get_function("pad_dense"),
            "interact": interact,
            "head": module.get_function("head"),
        }

    def _allocate(self) -> Scratch:
        import cupy

        def buffers(layers: list[Layer]) -> list[Any]:
            widths = [layers[0].inputs, *(layer.outputs for layer in layers)] if layers else [self._z_width]
            return [cupy.zeros((self._max_rows, width), self._dtype) for width in widths]

        scratch = Scratch(buffers(self._bottom), buffers(self._top), cupy.empty(WORKSPACE_BYTES, np.uint8))
        cupy.cuda.runtime.deviceSynchronize()  # zeros ran on the default stream
        return scratch


def _upload(artifact: Artifact, part: str, widths: list[int], dtype: type[np.floating[Any]]) -> list[Layer]:
    """Hidden layers: `widths` are padded, those of all inputs and outputs in a chain."""
    import cupy

    return [
        Layer(
            cupy.asarray(padded(artifact.tensors[f"{part}.{i}.weight"], (outputs, inputs), dtype)),
            cupy.asarray(padded(artifact.tensors[f"{part}.{i}.bias"], (outputs,), dtype)),
        )
        for i, (inputs, outputs) in enumerate(itertools.pairwise(widths))
    ]


def _head(artifact: Artifact, width: int) -> Any:
    """The last layer, FP32: its weights [width] padded, then its bias."""
    import cupy

    last = len(artifact.spec.architecture.top) - 1
    weight = padded(artifact.tensors[f"top.{last}.weight"][0], (width,), np.float32)
    return cupy.asarray(np.append(weight, artifact.tensors[f"top.{last}.bias"]).astype(np.float32))
