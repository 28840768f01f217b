"""The forward pass in parts: our kernels around cuBLASLt's products. Any widths, any GPU, FP16, BF16, TF32 or FP32."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from narsil_stream.kernels.artifact import Artifact
from narsil_stream.kernels.native import source
from narsil_stream.kernels.native.cublaslt import WORKSPACE_BYTES, Library, Product
from narsil_stream.kernels.native.layout import round_up
from narsil_stream.kernels.native.memory import Memory
from narsil_stream.kernels.native.operands import STORED, Layer, Operands, encode, operands, z_width
from narsil_stream.kernels.native.plan import Inputs, Outputs, row_defines
from narsil_stream.kernels.native.tables import DeviceTables
from narsil_stream.schemas.model import DcnV2, ModelSpec

_SAMPLES_A_BLOCK = 4
_THREADS = 256
Launch = Callable[[int], None]
"""Enqueues a product on a stream, given its address."""


class Scratch(NamedTuple):
    """Memory of one lane, CuPy arrays [rows, width] of the precision's type, and cuBLASLt's workspace."""

    bottom: list[Any]
    """Input of each product of the bottom MLP."""
    x0: Any
    """Its output. Cross network: the vectors of all tables behind it."""
    narrow: Any
    """V x of a cross layer; none with dot interaction, as the next."""
    wide: Any
    """W V x + bias of a cross layer."""
    top: list[Any]
    """Input of each product of the top MLP, then of the head. The first: the interaction's output."""
    workspace: Any
    checked: Any
    """[buffers, 2] INT64 on the device: address and width of each that a cuBLASLt product writes or reads."""


class Products(NamedTuple):
    bottom: list[Launch]
    cross: list[tuple[Launch, Launch]]
    top: list[Launch]


class LayersPlan:
    """The kernels of `layers.cu` or `cross.cu`, a product for each hidden layer, and two for each cross layer."""

    name = "layers"
    reads_inputs_once = False

    def __init__(
        self, artifact: Artifact, tables: DeviceTables, memory: Memory, precision: str, arch: str, max_rows: int
    ) -> None:
        """`precision`: fp16, bf16, tf32 or fp32, of the MLPs and the interaction."""
        self._memory = memory
        self._spec, self._tables, self._precision, self._arch = artifact.spec, tables, precision, arch
        self._max_rows = max_rows
        self._item_bytes = np.dtype(STORED[precision]).itemsize
        self._z_width = z_width(artifact.spec)
        self._weights = _upload(operands(artifact), precision, memory)
        self._library = Library()
        self._kernels: dict[bool, dict[str, Any]] = {}
        self._scratch: dict[int, Scratch] = {}
        self._products: dict[tuple[int, int], Products] = {}

    def resize(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._scratch.clear()
        self._forget()

    def close(self) -> None:
        self._forget()

    def prepare(self, rows: int, multi_hot: bool, lane: int, stream: Any) -> None:
        if multi_hot not in self._kernels:
            self._kernels[multi_hot] = self._load(multi_hot)
        if lane not in self._scratch:
            self._scratch[lane] = self._allocate()
        if (rows, lane) not in self._products:
            self._products[rows, lane] = self._tune(rows, self._scratch[lane], stream)

    def enqueue(self, stream: Any, given: Inputs, out: Outputs, rows: int, lane: int) -> None:
        kernels, scratch = self._kernels[bool(given.offsets)], self._scratch[lane]
        products = self._products[rows, lane]
        bags = (given.header, given.ids, given.offsets, *self._tables.pointers)
        with stream:
            values = rows * round_up(self._spec.n_dense, 16)
            kernels["pad_dense"](_grid(values), (_THREADS,), (given.header, given.dense, scratch.bottom[0]))
            for product in products.bottom:
                product(stream.ptr)
            if products.cross:
                kernels["gather"](_grid(4 * rows * self._spec.n_sparse), (_THREADS,), (*bags, scratch.x0, out.errors))
                self._cross(kernels["cross"], given.header, scratch, products, rows, stream.ptr)
            else:
                self._interact(kernels["interact"], (*bags, scratch.x0, scratch.top[0], out.errors), rows)
            for product in products.top:
                product(stream.ptr)
            blocks = -(-rows // _SAMPLES_A_BLOCK)
            args = (given.header, scratch.checked, scratch.top[-1], self._weights.head, out.scores, out.logits)
            kernels["head"]((blocks,), (128,), args)

    def _forget(self) -> None:
        self._products.clear()
        self._library.forget()

    def _interact(self, kernel: Any, args: tuple[Any, ...], rows: int) -> None:
        if self._item_bytes == 2:
            kernel((-(-rows // _SAMPLES_A_BLOCK),), (128,), args, shared_mem=self._shared_bytes)
        else:
            kernel((rows,), (32,), args, shared_mem=self._shared_bytes)

    def _cross(
        self, kernel: Any, header: int, scratch: Scratch, products: Products, rows: int, stream_ptr: int
    ) -> None:
        """x_{l+1} = x_0 * (W V x_l + bias) + x_l, each x_l but the first in the place of the one before."""
        chunks = rows * self._z_width * self._item_bytes // 16
        before, after = scratch.x0, scratch.top[0]
        for narrow, wide in products.cross:
            narrow(stream_ptr)
            wide(stream_ptr)
            kernel(_grid(chunks), (_THREADS,), (header, scratch.x0, scratch.wide, before, after))
            before = after

    @property
    def _shared_bytes(self) -> int:
        """Of one block of the interaction: z of four samples, or all vectors of one in FP32."""
        if self._item_bytes == 2:
            return _SAMPLES_A_BLOCK * self._z_width * 2
        return (self._spec.n_sparse + 1) * (self._spec.architecture.dim + 1) * 4

    def _load(self, multi_hot: bool) -> dict[str, Any]:
        file, names = kernels_of(self._spec, self._precision)
        defines = defines_of(self._spec, self._tables.row_bytes, multi_hot, self._precision)
        module = source.load_module(file, defines, self._arch)
        kernels = {key: module.get_function(name) for key, name in names.items()}
        if "interact" in kernels and self._shared_bytes > 48 << 10:
            source.allow_shared_memory(kernels["interact"], self._shared_bytes)
        return kernels

    def _allocate(self) -> Scratch:
        def buffer(width: int) -> Any:
            return self._memory.zeros((self._max_rows, width), STORED[self._precision])

        weights = self._weights
        vectors = self._z_width if weights.cross else round_up(self._spec.architecture.dim, 16)
        bottom, x0 = [buffer(layer.inputs) for layer in weights.bottom], buffer(vectors)
        top = [buffer(width) for width in (self._z_width, *(layer.outputs for layer in weights.top))]
        checked = [(int(one.data.ptr), int(one.shape[1])) for one in (*bottom, x0, *top)]
        return Scratch(
            bottom=bottom,
            x0=x0,
            narrow=buffer(weights.cross[0][0].outputs) if weights.cross else None,
            wide=buffer(self._z_width) if weights.cross else None,
            top=top,
            workspace=self._memory.zeros(WORKSPACE_BYTES, np.uint8),
            checked=self._memory.upload(np.array(checked, np.int64)),
        )

    def _tune(self, rows: int, scratch: Scratch, stream: Any) -> Products:
        def plan(layer: Layer, x: Any, y: Any) -> Launch:
            product = Product(
                rows=rows,
                inputs=layer.inputs,
                outputs=layer.outputs,
                x=x.data.ptr,
                w=layer.weight.data.ptr,
                bias=0 if layer.bias is None else layer.bias.data.ptr,
                y=y.data.ptr,
                stride=int(y.shape[1]),
                relu=layer.relu,
            )
            return self._library.plan(product, self._precision, scratch.workspace.data.ptr, stream)

        def chain(layers: list[Layer], buffers: list[Any]) -> list[Launch]:
            return [plan(*one) for one in zip(layers, buffers[:-1], buffers[1:], strict=True)]

        cross = []
        x = scratch.x0
        for v, w in self._weights.cross:
            cross.append((plan(v, x, scratch.narrow), plan(w, scratch.narrow, scratch.wide)))
            x = scratch.top[0]
        return Products(
            bottom=chain(self._weights.bottom, [*scratch.bottom, scratch.x0]),
            cross=cross,
            top=chain(self._weights.top, scratch.top),
        )


def kernels_of(spec: ModelSpec, precision: str) -> tuple[str, dict[str, str]]:
    """The source file for a model, and its kernels by what they are for."""
    ends = {"pad_dense": "pad_dense", "head": "head"}
    if isinstance(spec.architecture, DcnV2):
        return "cross.cu", ends | {"gather": "gather", "cross": "cross"}
    half = np.dtype(STORED[precision]).itemsize == 2
    return "layers.cu", ends | {"interact": "interact_half" if half else "interact_float"}


def defines_of(spec: ModelSpec, row_bytes: int, multi_hot: bool, precision: str) -> dict[str, object]:
    """The settings of `layers.cu` and `cross.cu` for a model."""
    top = spec.architecture.top
    return row_defines(spec, row_bytes, multi_hot) | {
        "ZP": z_width(spec),
        "HEAD": round_up(top[-2], 8) if len(top) > 1 else z_width(spec),
        "CHECKED": len(spec.architecture.bottom) + 1 + len(top) if precision == "fp16" else 0,
        "MLP_BYTES": np.dtype(STORED[precision]).itemsize,
        "BF16": int(precision == "bf16"),
    }


def _grid(threads: int) -> tuple[int]:
    return (-(-threads // _THREADS),)


def _upload(weights: Operands, precision: str, memory: Memory) -> Operands:
    """The same on the device, in the precision's type; the head stays FP32."""

    def moved(layer: Layer) -> Layer:
        bias = None if layer.bias is None else memory.upload(encode(layer.bias, precision))
        return Layer(memory.upload(encode(layer.weight, precision)), bias, layer.relu)

    return Operands(
        bottom=[moved(layer) for layer in weights.bottom],
        cross=[(moved(v), moved(w)) for v, w in weights.cross],
        top=[moved(layer) for layer in weights.top],
        head=memory.upload(weights.head),
    )
