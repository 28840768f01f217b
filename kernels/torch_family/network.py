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


class CrossLayer(NamedTuple):
    narrow: Layer
    """[rows, width] -> [rows, rank]"""
    wide: Layer
    """[rows, rank] -> [rows, width], with the bias"""


class Network:
    """logits = the model's answer before the sigmoid, FP32. The last layer is FP32 in every precision."""

    def __init__(self, artifact: Artifact, packing: Packing, dtype: Any, device: str, make: MakeLayer) -> None:
        spec = artifact.spec
        self._dtype = dtype
        self._on_cuda = device == "cuda"
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
        self._used = 1 + spec.n_sparse
        i, j = torch.tril_indices(self._used, self._used, offset=-1, device=device)
        self._pairs = i * packing.vectors + j
        self._cross: list[CrossLayer] | None = None
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
        hidden = self._dot(x) if self._cross is None else self._crossed(x)
        for layer in self._top:
            hidden = layer(hidden)
        if not self._top:
            hidden = hidden[:, : self._last[0].shape[1]]
        return torch.nn.functional.linear(hidden.float(), *self._last).view(-1)

    def _dot(self, x: Any) -> Any:
        """[x[0], x[i]·x[j] for i > j in the order (1,0), (2,0), (2,1) ..., padding]. x [rows, vectors, dim]."""
        products = torch.bmm(x, x.transpose(1, 2))
        if self._on_cuda:  # one launch counts
            chosen = [products.flatten(1).index_select(1, self._pairs)]
        else:  # copies of whole pieces are four times as fast as a gather
            chosen = [products[:, i, :i] for i in range(1, self._used)]
        return self._padded([x.select(1, 0), *chosen])

    def _crossed(self, x: Any) -> Any:
        """x_{l+1} = x_0 * (W_l (V_l x_l) + b_l) + x_l."""
        assert self._cross is not None
        first = x.flatten(1)
        now = first
        for layer in self._cross:
            now = torch.addcmul(now, first, layer.wide(layer.narrow(now)))
        return self._padded([now]) if self._padding else now

    def _padded(self, parts: list[Any]) -> Any:
        if self._padding:
            parts.append(parts[0].new_zeros((len(parts[0]), self._padding)))
        return torch.cat(parts, dim=1)
