"""The forward pass in torch operators, the same for both devices but for how a layer is multiplied."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from narsil_stream.kernels.artifact import Artifact
from narsil_stream.kernels.torch_family.packing import Packing
from narsil_stream.kernels.torch_family.tables import Tables
from narsil_stream.schemas.model import DcnV2

Layer = Callable[[Any], Any]
"""[rows, in] -> [rows, out], bias and activation included."""
MakeLayer = Callable[..., Layer]
"""(weight [out, in], bias [out] or None, relu=bool) -> Layer; tensors of the network's type on its device."""


Dot = Callable[[Any], list[Any]]
"""x [rows, vectors, dim] -> x[i]·x[j] of the first vectors, i > j in the order (1,0), (2,0), (2,1) ..., in pieces
[rows, ...] to be put side by side."""
MakeDot = Callable[[int, Packing], Dot]
"""(how many vectors have products, how x is packed) -> Dot"""


class Operators(NamedTuple):
    """What a device computes in a way of its own."""

    layer: MakeLayer
    dot: MakeDot


class CrossLayer(NamedTuple):
    narrow: Layer
    """[rows, width] -> [rows, rank]"""
    wide: Layer
    """[rows, rank] -> [rows, width], with the bias"""


class Network:
    """logits = the model's answer before the sigmoid, FP32. The last layer is FP32 in every precision."""

    def __init__(self, artifact: Artifact, packing: Packing, dtype: Any, device: str, operators: Operators) -> None:
        spec, make = artifact.spec, operators.layer
        self._dtype = dtype
        self._tables = Tables(artifact, packing, dtype, device)

        def tensor(name: str) -> Any:
            return torch.from_numpy(artifact.tensors[name]).to(device)

        def mlp(part: str, count: int, inputs: int) -> list[Layer]:
            """`inputs`: of the first layer, zeros for what pads."""
            layers = []
            for i in range(count):
                weight, bias = (tensor(f"{part}.{i}.{kind}").to(dtype) for kind in ("weight", "bias"))
                padding = inputs - weight.shape[1] if i == 0 else 0
                layers.append(make(torch.nn.functional.pad(weight, (0, padding)), bias, relu=True))
            return layers

        shape = spec.architecture
        self._padding = -spec.top_input % packing.align
        self._bottom = mlp("bottom", len(shape.bottom), packing.dense_width)
        self._top = mlp("top", len(shape.top) - 1, spec.top_input + self._padding)
        last = f"top.{len(shape.top) - 1}"
        self._last = tensor(f"{last}.weight"), tensor(f"{last}.bias")
        self._dot = operators.dot(1 + spec.n_sparse, packing)
        self._cross: list[CrossLayer] = []
        if isinstance(shape, DcnV2):
            self._cross = [
                CrossLayer(
                    make(tensor(f"cross.{i}.v").to(dtype), None, relu=False),
                    make(tensor(f"cross.{i}.w").to(dtype), tensor(f"cross.{i}.bias").to(dtype), relu=False),
                )
                for i in range(shape.cross_layers)
            ]

    def logits(self, dense: Any, values: Any, offsets: Any) -> Any:
        """dense [rows, n_dense] FP32, values and offsets as `Packed` has them; out [rows] FP32."""
        x = self._tables(values, offsets)
        bottom = dense.to(self._dtype)
        for layer in self._bottom:
            bottom = layer(bottom)
        x.select(1, 0).copy_(bottom)
        hidden = self._crossed(x) if self._cross else self._padded([bottom, *self._dot(x)])
        for layer in self._top:
            hidden = layer(hidden)
        if not self._top:
            hidden = hidden[:, : self._last[0].shape[1]]
        return torch.nn.functional.linear(hidden.float(), *self._last).view(-1)

    def _crossed(self, x: Any) -> Any:
        """x_{l+1} = x_0 * (W_l (V_l x_l) + b_l) + x_l."""
        first = x.flatten(1)
        now = first
        for layer in self._cross:
            now = torch.addcmul(now, first, layer.wide(layer.narrow(now)))
        return self._padded([now]) if self._padding else now

    def _padded(self, parts: list[Any]) -> Any:
        if self._padding:
            parts.append(parts[0].new_zeros((len(parts[0]), self._padding)))
        return torch.cat(parts, dim=1)
