"""The forward pass as one kernel, `fused.cu`: Hopper, FP16, hidden widths up to 512."""

import itertools
from typing import Any

import numpy as np

from narsil_stream.kernels.artifact import Artifact
from narsil_stream.kernels.native import source
from narsil_stream.kernels.native.layout import (
    STAGE_BYTES,
    first_operand,
    padded,
    product_columns,
    product_width,
    round_up,
    weight_streams,
)
from narsil_stream.kernels.native.memory import Memory
from narsil_stream.kernels.native.plan import Inputs, Outputs, row_defines
from narsil_stream.kernels.native.tables import DeviceTables
from narsil_stream.schemas.model import DlrmDot, ModelSpec

ROWS = 64
"""That a block holds."""
_ACTIVATION_BYTES = ROWS * 512 * 2
_BARRIER_BYTES = 512
_THREADS = 384


FEW_ROWS = 2048
"""Up to here four blocks score the same 64 rows: lowest latency while the GPU has multiprocessors to spare. Beyond, one
block does: most rows a second. (Two are between: 4096 rows alone take less time, but three such batches more.)"""


def split_for(rows: int) -> int:
    """Blocks that score the same rows, for batches of up to `rows` rows."""
    return 4 if rows <= FEW_ROWS else 1


def stages(split: int) -> int:
    """Of the ring of weights: what memory one buffer of activations leaves, or two."""
    return 10 if split == 1 else 6


def shared_bytes(split: int) -> int:
    """Shared memory of a block: activations, ring, sums of the last layer, barriers."""
    buffers = 1 if split == 1 else 2
    return buffers * _ACTIVATION_BYTES + stages(split) * STAGE_BYTES + 2 * ROWS * 4 + _BARRIER_BYTES


def misfit(spec: ModelSpec) -> str | None:
    """Why `fused.cu` cannot compute this model, or None when it can."""
    shape = spec.architecture
    if not isinstance(shape, DlrmDot):
        return "a cross network (DCNv2)"
    hidden = (*shape.bottom[:-1], *shape.top[:-1])
    if shape.dim not in (16, 32, 64):
        return f"rows of {shape.dim} values (it takes 16, 32 or 64)"
    if spec.n_sparse > 31 or product_width(shape.dim, spec.n_sparse) > 512:
        return f"{spec.n_sparse} tables"
    if spec.n_dense > 64:
        return f"{spec.n_dense} dense features (at most 64)"
    if len(shape.bottom) < 2 or len(shape.top) < 2:
        return "an MLP without a hidden layer"
    if len(hidden) > 8 or max(hidden) > 512:
        return "hidden layers wider than 512, or more than eight"
    return None


def width(hidden: int) -> int:
    """A hidden layer as the kernel computes it: padded to 256 or 512."""
    return 256 if hidden <= 256 else 512


class FusedPlan:
    """One launch a batch."""

    name = "fused"
    reads_inputs_once = True

    def __init__(self, artifact: Artifact, tables: DeviceTables, memory: Memory, split: int = 0) -> None:
        """`split`: 1, 2 or 4 blocks that score the same rows, for all batches; 0 chooses by their size."""
        if split not in (0, 1, 2, 4):
            raise ValueError(f"split is 0, 1, 2 or 4, not {split}")
        self._spec, self._tables, self._memory, self._split = artifact.spec, tables, memory, split
        first, self._layers, bias, head = weights(artifact)
        self._first, self._bias, self._head = memory.upload(first), memory.upload(bias), memory.upload(head)
        self._streams: dict[int, Any] = {}
        self._kernels: dict[tuple[bool, int], Any] = {}

    def resize(self, max_rows: int) -> None:
        """Keeps nothing that depends on it."""

    def close(self) -> None:
        """Keeps nothing but memory."""

    def prepare(self, rows: int, multi_hot: bool, lane: int, stream: Any) -> None:
        split = self._split or split_for(rows)
        if split not in self._streams:
            self._streams[split] = self._memory.upload(weight_streams(*self._layers, split))
        if (multi_hot, split) not in self._kernels:
            self._kernels[multi_hot, split] = self._load(multi_hot, split)

    def enqueue(self, stream: Any, given: Inputs, out: Outputs, rows: int, lane: int) -> None:
        split = self._split or split_for(rows)
        streams = self._streams[split]
        args = (
            given.header,
            given.dense,
            given.ids,
            given.offsets,
            *self._tables.pointers,
            self._first,
            streams,
            np.int32(streams.nbytes // split),
            np.int32(rows),
            self._bias,
            self._head,
            *out,
        )
        blocks = -(-rows // ROWS) * split
        with stream:
            self._kernels[bool(given.offsets), split]((blocks,), (_THREADS,), args, shared_mem=shared_bytes(split))

    def _load(self, multi_hot: bool, split: int) -> Any:
        defines = defines_of(self._spec, self._tables.row_bytes, multi_hot, split)
        kernel = source.load_module("fused.cu", defines, "sm_90a").get_function("fused")
        source.allow_shared_memory(kernel, shared_bytes(split))
        return kernel


def defines_of(spec: ModelSpec, row_bytes: int, multi_hot: bool, split: int) -> dict[str, object]:
    """The settings of `fused.cu` for a model."""
    widths = spec.architecture
    return row_defines(spec, row_bytes, multi_hot) | {
        "BOTTOM": ", ".join(str(width(n)) for n in widths.bottom[:-1]),
        "TOP": ", ".join(str(width(n)) for n in widths.top[:-1]),
        "SPLIT": split,
        "STAGES": stages(split),
    }


def weights(artifact: Artifact) -> tuple[Any, tuple[Any, Any, Any], Any, Any]:
    """NumPy arrays: operands of the first layer; the other layers (bottom, its last, top), padded FP16; biases; head.

    Biases (FP32) lie one after another in layer order, padded; the head is the last layer's weights, padded, then its
    bias.
    """
    spec, tensors = artifact.spec, artifact.tensors
    shape = spec.architecture
    bottom = [round_up(spec.n_dense, 16), *(width(n) for n in shape.bottom[:-1]), shape.dim]
    top = [round_up(product_width(shape.dim, spec.n_sparse), 64), *(width(n) for n in shape.top[:-1])]

    def layers(part: str, widths: list[int]) -> list[Any]:
        pairs = enumerate(itertools.pairwise(widths))
        return [padded(tensors[f"{part}.{i}.weight"], (outputs, inputs), np.float16) for i, (inputs, outputs) in pairs]

    below, above = layers("bottom", bottom), layers("top", top)
    above[0][:] = 0
    first = tensors["top.0.weight"]
    above[0][: len(first), product_columns(shape.dim, spec.n_sparse)] = first
    biases = [padded(tensors[f"bottom.{i}.bias"], (n,), np.float32) for i, n in enumerate(bottom[1:])]
    biases += [padded(tensors[f"top.{i}.bias"], (n,), np.float32) for i, n in enumerate(top[1:])]
    last = len(shape.top) - 1
    head = padded(tensors[f"top.{last}.weight"][0], (top[-1],), np.float32)
    rest = (below[1:-1], below[-1], above)
    return first_operand(below[0]), rest, np.concatenate(biases), np.append(head, tensors[f"top.{last}.bias"])
