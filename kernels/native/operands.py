"""Weights as the layers path reads them: padded to widths that cuBLASLt and `layers.cu`, `cross.cu` take. NumPy alone.

Padding is zeros, in weights, biases and activations alike, and changes no result.
"""

import itertools
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from narsil_stream.kernels.artifact import Artifact, Tensors
from narsil_stream.kernels.native.layout import padded, round_up
from narsil_stream.schemas.model import DcnV2, ModelSpec

Floats = NDArray[np.float32]

STORED: dict[str, type[np.generic]] = {"fp16": np.float16, "bf16": np.uint16, "tf32": np.float32, "fp32": np.float32}
"""What holds weights and activations of each precision. NumPy has no BF16: its bits."""


class Layer(NamedTuple):
    """y = x weightᵀ + bias (none: nothing), ReLU if `relu`. Arrays on the host, or CuPy arrays on the device."""

    weight: Any
    """[outputs, inputs]"""
    bias: Any
    """[outputs]"""
    relu: bool

    @property
    def outputs(self) -> int:
        return int(self.weight.shape[0])

    @property
    def inputs(self) -> int:
        return int(self.weight.shape[1])


class Operands(NamedTuple):
    """A model's weights but for its tables, FP32."""

    bottom: list[Layer]
    cross: list[tuple[Layer, Layer]]
    """V and W with the bias; none with dot interaction."""
    top: list[Layer]
    """Hidden layers."""
    head: Floats
    """The last layer: its weights, padded, then its bias."""


def z_columns(spec: ModelSpec) -> NDArray[np.intp]:
    """Where the layers path keeps column c of the interaction's output: in a cross network, vectors start at multiples
    of 16."""
    columns = np.arange(spec.top_input)
    if not isinstance(spec.architecture, DcnV2):
        return columns
    vector, at = np.divmod(columns, spec.architecture.dim)
    return vector * round_up(spec.architecture.dim, 16) + at


def z_width(spec: ModelSpec) -> int:
    """Places for these columns, in elements."""
    if isinstance(spec.architecture, DcnV2):
        return (spec.n_sparse + 1) * round_up(spec.architecture.dim, 16)
    return round_up(spec.top_input, 8)


def operands(artifact: Artifact) -> Operands:
    """Widths: dense features and vectors padded to 16, hidden layers and ranks to 8, z as `z_width` says."""
    spec, tensors = artifact.spec, artifact.tensors
    shape = spec.architecture
    bottom = [round_up(spec.n_dense, 16), *(round_up(n, 8) for n in shape.bottom[:-1]), round_up(shape.dim, 16)]
    top = [z_width(spec), *(round_up(n, 8) for n in shape.top[:-1])]
    columns = z_columns(spec)
    first = {0: _spread(tensors["top.0.weight"], columns, top[0])}
    last = len(shape.top) - 1
    head = padded(first.get(last, tensors[f"top.{last}.weight"])[0], (top[-1],), np.float32)
    return Operands(
        bottom=_hidden(tensors, "bottom", bottom, {}),
        cross=_cross(tensors, shape, columns, top[0]) if isinstance(shape, DcnV2) else [],
        top=_hidden(tensors, "top", top, first),
        head=np.append(head, tensors[f"top.{last}.bias"]).astype(np.float32),
    )


def encode(values: Floats, precision: str) -> NDArray[Any]:
    """FP32 values as `STORED` holds them, rounded to nearest, ties to even."""
    if precision != "bf16":
        return values.astype(STORED[precision])
    bits = np.ascontiguousarray(values).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def _hidden(tensors: Tensors, part: str, widths: list[int], instead: dict[int, Floats]) -> list[Layer]:
    """Layers with ReLU; `widths`, padded, are those of all inputs and outputs in a chain."""
    return [
        Layer(
            padded(instead.get(i, tensors[f"{part}.{i}.weight"]), (outputs, inputs), np.float32),
            padded(tensors[f"{part}.{i}.bias"], (outputs,), np.float32),
            relu=True,
        )
        for i, (inputs, outputs) in enumerate(itertools.pairwise(widths))
    ]


def _cross(tensors: Tensors, shape: DcnV2, columns: NDArray[np.intp], width: int) -> list[tuple[Layer, Layer]]:
    rank = round_up(shape.cross_rank, 8)
    layers = []
    for i in range(shape.cross_layers):
        v = padded(_spread(tensors[f"cross.{i}.v"], columns, width), (rank, width), np.float32)
        w = padded(_spread(tensors[f"cross.{i}.w"].T, columns, width).T, (width, rank), np.float32)
        bias = _spread(tensors[f"cross.{i}.bias"][None], columns, width)[0]
        layers.append((Layer(v, None, relu=False), Layer(w, bias, relu=False)))
    return layers


def _spread(weight: Floats, columns: NDArray[np.intp], width: int) -> Floats:
    """Each column at its place among `width`."""
    out = np.zeros((len(weight), width), np.float32)
    out[:, columns] = weight
    return out
