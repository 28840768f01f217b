"""How inputs and weights lie in memory for the native kernels. NumPy alone: nothing here needs a GPU.

Half precision weights arrive FP32 as the artifact has them, and leave rounded to FP16, padded with zeros, in the order
in which a kernel's lanes or copies read them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from narsil_stream.kernels.backend import RaggedBatch

Floats = NDArray[np.float32]
Halves = NDArray[np.float16]

HEADER_BYTES = 64
"""In front of a batch: its number of rows (int32), the rest unused, so that what follows stays aligned."""
STAGE_BYTES = 16_384
"""Of the ring through which weights arrive there."""


def round_up(value: int, step: int) -> int:
    return -(-value // step) * step


class Blob(NamedTuple):
    """Where the parts of a packed batch stand, in bytes: header, dense, bag offsets (multi-hot only), ids.

    One copy moves all of it to the device. Offsets of a bucket do not depend on how many rows are in use.
    """

    dense: int
    offsets: int
    ids: int
    nbytes: int

    @classmethod
    def one_hot(cls, rows: int, n_dense: int, n_sparse: int) -> "Blob":
        ids = round_up(HEADER_BYTES + 4 * rows * n_dense, 16)
        return cls(HEADER_BYTES, ids, ids, ids + 4 * rows * n_sparse)

    @classmethod
    def multi_hot(cls, rows: int, n_dense: int, n_sparse: int, n_ids: int) -> "Blob":
        offsets = round_up(HEADER_BYTES + 4 * rows * n_dense, 16)
        ids = offsets + round_up(4 * (rows * n_sparse + 1), 16)
        return cls(HEADER_BYTES, offsets, ids, ids + 4 * n_ids)


def pack(memory: NDArray[np.uint8], blob: Blob, batch: RaggedBatch) -> None:
    """Write a batch into `memory` [blob.nbytes or more] as the kernels read it."""
    memory[:4].view(np.int32)[0] = batch.rows
    memory[blob.dense :][: batch.dense.nbytes].view(np.float32).reshape(batch.dense.shape)[:] = batch.dense
    memory[blob.ids :][: batch.ids.nbytes].view(np.int32)[:] = batch.ids
    if batch.lengths is not None:
        bags = memory[blob.offsets :][: 4 * (batch.lengths.size + 1)].view(np.int32)
        bags[0] = 0
        np.cumsum(batch.lengths.reshape(-1), out=bags[1:])


def padded(weight: NDArray[Any], shape: Sequence[int], dtype: type[np.floating[Any]]) -> NDArray[Any]:
    """`weight` in the corner of zeros of `shape`. Padding changes no result."""
    out = np.zeros(tuple(shape), dtype)
    out[tuple(slice(n) for n in weight.shape)] = weight
    return out


def first_operand(weight: Halves) -> Halves:
    """Operands B of mma.m16n8k16: [inputs/16, outputs/8, 32 lanes, 4] from `weight` [outputs, inputs].

    Lane 4 g + t holds of output 8 n + g the inputs 16 k + (2t, 2t+1, 2t+8, 2t+9). Both widths padded: outputs to 8,
    inputs to 16.
    """
    outputs, inputs = weight.shape
    tiles = weight.reshape(outputs // 8, 8, inputs // 16, 2, 4, 2)  # n, g, k, high, t, pair
    return np.ascontiguousarray(tiles.transpose(2, 0, 1, 4, 3, 5)).reshape(inputs // 16, outputs // 8, 32, 4)


def swizzled_tiles(weight: Halves) -> Halves:
    """Tiles for wgmma with 128-byte swizzle: [inputs/64, outputs, 64] from `weight` [outputs, inputs].

    A row of a tile is 128 bytes; its 16-byte chunk c stands at place c ^ (row % 8). Outputs a multiple of 8.
    """
    outputs, inputs = weight.shape
    chunks = weight.reshape(outputs, inputs // 64, 8, 8).transpose(1, 0, 2, 3)
    place = np.arange(8)[None, :] ^ (np.arange(outputs) % 8)[:, None]
    out = np.empty_like(chunks)
    out[:, np.arange(outputs)[:, None], place] = chunks
    return np.ascontiguousarray(out).reshape(inputs // 64, outputs, 64)


def weight_streams(bottom: Sequence[Halves], whole: Halves, top: Sequence[Halves], split: int) -> Halves:
    """What each of `split` blocks streams, in order of use: [split, values].

    `bottom`, `top`: layers of which a block computes its part of the outputs; `whole`: the last of the bottom, which
    all compute. All [outputs, inputs], padded. Where blocks exchange a layer's inputs, each begins with those it made.
    """
    streams = []
    for rank in range(split):
        layers = [(part(weight, rank, split), i > 0) for i, weight in enumerate(bottom)]
        layers.append((whole, len(bottom) > 0))
        layers += [(part(weight, rank, split), i > 0) for i, weight in enumerate(top)]
        streams.append(np.concatenate([_stream(weight, rank if turned else 0, split) for weight, turned in layers]))
    return np.stack(streams)


def product_columns(dim: int, tables: int) -> NDArray[np.intp]:
    """Where `fused.cu` keeps the columns of z: out[c] is the place of the interaction's column c.

    Row i of the products starts at dim + 2 (i i / 4), so that two neighbours share a word.
    """
    i, j = np.tril_indices(tables + 1, k=-1)
    return np.concatenate([np.arange(dim), dim + 2 * (i * i // 4) + j])


def product_width(dim: int, tables: int) -> int:
    """Places for the columns of z in `fused.cu`."""
    return dim + 2 * ((tables + 1) ** 2 // 4)


def _stream(weight: Halves, rank: int, split: int) -> Halves:
    tiles = [swizzled_tiles(weight[i : i + 256]) for i in range(0, len(weight), 256)]
    return np.concatenate([np.roll(t, -rank * (len(t) // split), axis=0).reshape(-1) for t in tiles])


def part(weight: Halves, rank: int, split: int) -> Halves:
    columns = len(weight) // split
    return np.ascontiguousarray(weight[rank * columns : (rank + 1) * columns])
