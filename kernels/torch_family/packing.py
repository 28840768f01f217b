"""From a batch off the wire to what FBGEMM's lookup takes: values and offsets, padded to a number of rows.

x [rows, vectors, dim] is what the lookup writes: vector 0 is left for the bottom MLP's output, 1 to F are the tables,
the rest pads. A vector without a table has an empty bag, for which FBGEMM writes zeros: nothing is ever concatenated.
"""

import functools
from typing import NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from narsil_stream.kernels.backend import IdOutOfRange, RaggedBatch
from narsil_stream.schemas.model import DcnV2, ModelSpec

Ids = NDArray[np.int32]

_INT32_ROWS = 2**31
_ALIGN = 4
"""Vectors of a dot interaction: batched products of 28 vectors are a quarter faster than of 27."""


class Packed(NamedTuple):
    dense: NDArray[np.float32]
    """[rows, dense_width]. Of rows that pad, what they hold does not matter."""
    values: Ids
    """[N], at least one value, so that there is an address."""
    offsets: Ids
    """[rows * vectors + 1]: bag i holds values[offsets[i] : offsets[i + 1]]."""


class Packing:
    """How batches of one model are packed.

    `joined`: all tables stand in one, a table's ids moved to where its rows begin. Bags are then in the wire's order,
    row by row. Otherwise they are reordered table by table, as in a KeyedJaggedTensor.
    """

    def __init__(self, spec: ModelSpec, align: int = 1) -> None:
        """`align`: dense rows are padded with zeros to a multiple of this."""
        self._spec = spec
        self.align = align
        self.dense_width = -(-spec.n_dense // align) * align
        rows = np.array([table.rows for table in spec.tables], np.int64)
        self.joined = len({table.dtype for table in spec.tables}) == 1 and int(rows.sum()) < _INT32_ROWS
        used = 1 + spec.n_sparse
        self.vectors = used if isinstance(spec.architecture, DcnV2) else -(-used // _ALIGN) * _ALIGN
        self._limits = rows.astype(np.uint32)
        starts = np.cumsum(rows) - rows if self.joined else np.zeros_like(rows)
        self._starts = starts.astype(np.int32)

    def pack(self, batch: RaggedBatch, rows: int, room: Packed | None = None) -> Packed:
        """Pad a batch to `rows` rows; padding looks up row 0 (one-hot) or nothing. Raises IdOutOfRange.

        `room`: arrays to write into, each at least as large as needed; the result's are parts of them, but for one-hot
        offsets, which never change. It must begin as zeros.
        """
        if room is None:
            room = self.room(rows, batch.ids.size)
        dense = room.dense[:rows]
        dense[: batch.rows, : self._spec.n_dense] = batch.dense
        if batch.lengths is None:
            values = room.values[: rows * self._spec.n_sparse]
            self._one_hot(batch, values.reshape(rows, -1) if self.joined else values.reshape(-1, rows).T)
            return Packed(dense, values, self.one_hot_offsets(rows))
        offsets = room.offsets[: rows * self.vectors + 1]
        self._multi_hot(batch, room.values[: batch.ids.size], offsets[1:])
        return Packed(dense, room.values[: max(1, batch.ids.size)], offsets)

    def room(self, rows: int, ids: int) -> Packed:
        """Memory for batches of up to `rows` rows, one-hot, or multi-hot with up to `ids` ids."""
        return Packed(
            np.zeros((rows, self.dense_width), np.float32),
            np.zeros(max(ids, rows * self._spec.n_sparse), np.int32),
            np.zeros(rows * self.vectors + 1, np.int32),
        )

    @functools.lru_cache(maxsize=128)  # noqa: B019  (a packing lives as long as its model)
    def one_hot_offsets(self, rows: int) -> Ids:
        """The offsets of every one-hot batch of `rows` rows. Shared: not to be written."""
        lengths = np.zeros((rows, self.vectors), np.int32)
        lengths[:, 1 : 1 + self._spec.n_sparse] = 1
        offsets = np.zeros(lengths.size + 1, np.int32)
        np.cumsum(lengths if self.joined else lengths.T, out=offsets[1:])
        return offsets

    def _one_hot(self, batch: RaggedBatch, values: Ids) -> None:
        """values [rows, tables], in whatever order of memory."""
        ids = batch.ids.reshape(batch.rows, self._spec.n_sparse)
        if (outside := ids.view(np.uint32) >= self._limits).any():
            self._refuse(int(outside.any(axis=0).argmax()))
        np.add(ids, self._starts, out=values[: batch.rows])
        values[batch.rows :] = self._starts

    def _multi_hot(self, batch: RaggedBatch, values: Ids, offsets: Ids) -> None:
        """values [N]; offsets: all but the first, which is 0."""
        assert batch.lengths is not None
        tables = self._spec.n_sparse
        table_of_id = np.repeat(np.tile(np.arange(tables, dtype=np.int16), batch.rows), batch.lengths.reshape(-1))
        if (outside := batch.ids.view(np.uint32) >= self._limits[table_of_id]).any():
            self._refuse(int(table_of_id[int(outside.argmax())]))
        lengths = np.zeros((len(offsets) // self.vectors, self.vectors), np.int32)
        lengths[: batch.rows, 1 : 1 + tables] = batch.lengths
        if self.joined:
            np.add(batch.ids, self._starts[table_of_id], out=values)
            np.cumsum(lengths, out=offsets)
        else:
            values[:] = batch.ids[np.argsort(table_of_id, kind="stable")]
            np.cumsum(lengths.T, out=offsets)

    def _refuse(self, table: int) -> NoReturn:
        raise IdOutOfRange(f"an id is outside table {self._spec.tables[table].name}")
