"""Checks a request against its model and turns it into the form that batches are joined from.

Everything that a backend may rely on is checked here, once, before the request can meet others in a batch. Each error
says which tensor, at which position, what was found and what was expected.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from narsil_stream.schemas.codec import array
from narsil_stream.schemas.errors import invalid
from narsil_stream.schemas.model import ModelSpec
from narsil_stream.schemas.wire import InferRequest, Tensor

DENSE_TYPES = ("FP32",)
ID_TYPES = ("INT32", "INT64")


class Rows(Struct, frozen=True, gc=False):
    """A request's rows, batch-major: those of several requests are joined by joining their bytes."""

    count: int
    dense: memoryview
    """FP32 [count, n_dense]"""
    ids: memoryview
    """INT32 [N]"""
    lengths: memoryview | None
    """INT32 [count, n_sparse]; None: one-hot, N = count * n_sparse"""

    @property
    def nbytes(self) -> int:
        return self.dense.nbytes + self.ids.nbytes + (self.lengths.nbytes if self.lengths is not None else 0)


class Admission:
    """The checks for one model."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self._tables = np.array([table.rows for table in spec.tables], np.int64)
        self._smallest = int(self._tables.min())

    def rows(self, request: InferRequest) -> Rows:
        """Raises `Refused(INVALID_ARGUMENT)`."""
        inputs = self._by_name(request)
        dense = self._dense(inputs["dense"])
        count = dense.shape[0]
        if "sparse" in inputs:
            ids, lengths = self._one_hot(inputs["sparse"], count), None
        else:
            ids, lengths = self._multi_hot(inputs["values"], inputs["lengths"], count)
        return Rows(count, _bytes(dense), _bytes(ids), None if lengths is None else _bytes(lengths))

    def _by_name(self, request: InferRequest) -> Mapping[str, Tensor]:
        inputs = {tensor.name: tensor for tensor in request.inputs}
        names = set(inputs)
        if len(inputs) != len(request.inputs):
            raise invalid("an input is given twice; each name may occur once")
        if names not in ({"dense", "sparse"}, {"dense", "values", "lengths"}):
            given = ", ".join(f"'{name}'" for name in inputs) or "none"
            raise invalid(f"inputs are {given}; expected 'dense' and 'sparse', or 'dense', 'values' and 'lengths'")
        return inputs

    def _dense(self, tensor: Tensor) -> NDArray[np.float32]:
        width = self.spec.n_dense
        _expect(tensor, DENSE_TYPES)
        if len(tensor.shape) != 2 or tensor.shape[1] != width:
            raise invalid(f"input 'dense' has shape {list(tensor.shape)}; expected [rows, {width}]")
        if tensor.shape[0] == 0:
            raise invalid("input 'dense' has 0 rows; expected at least 1")
        values: NDArray[np.float32] = array(tensor)
        finite = np.isfinite(values)
        if not finite.all():
            row, column = np.argwhere(~finite)[0]
            raise invalid(f"input 'dense' [{row}, {column}] is {values[row, column]}; expected a finite number")
        return values

    def _one_hot(self, tensor: Tensor, count: int) -> NDArray[np.int32]:
        _expect(tensor, ID_TYPES)
        if tensor.shape != (count, self.spec.n_sparse):
            raise invalid(
                f"input 'sparse' has shape {list(tensor.shape)}; expected [{count}, {self.spec.n_sparse}]"
                " (rows of 'dense', tables)"
            )
        ids = array(tensor)
        if ids.min() < 0 or ids.max() >= self._smallest:
            wrong = np.argwhere((ids < 0) | (ids >= self._tables))
            if len(wrong):
                row, table = wrong[0]
                raise self._out_of_range(f"'sparse' [{row}, {table}]", ids[row, table], int(table))
        return ids.astype(np.int32, copy=False)

    def _multi_hot(self, values: Tensor, lengths: Tensor, count: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        _expect(values, ID_TYPES)
        _expect(lengths, ("INT32",))
        if lengths.shape != (count, self.spec.n_sparse):
            raise invalid(
                f"input 'lengths' has shape {list(lengths.shape)}; expected [{count}, {self.spec.n_sparse}]"
                " (rows of 'dense', tables)"
            )
        if len(values.shape) != 1:
            raise invalid(f"input 'values' has shape {list(values.shape)}; expected one dimension")
        ids, bags = array(values), array(lengths)
        if bags.min() < 0:
            row, table = np.argwhere(bags < 0)[0]
            raise invalid(f"input 'lengths' [{row}, {table}] is {bags[row, table]}; expected 0 or more")
        total = int(bags.sum(dtype=np.int64))
        if total != len(ids):
            raise invalid(f"input 'lengths' adds up to {total}; 'values' has {len(ids)} ids")
        if len(ids) and (ids.min() < 0 or ids.max() >= self._smallest):
            tables = np.repeat(np.tile(np.arange(self.spec.n_sparse), count), bags.reshape(-1))
            wrong = np.flatnonzero((ids < 0) | (ids >= self._tables[tables]))
            if len(wrong):
                at = int(wrong[0])
                raise self._out_of_range(f"'values' [{at}]", ids[at], int(tables[at]))
        return ids.astype(np.int32, copy=False), bags

    def _out_of_range(self, where: str, found: Any, table: int) -> Exception:
        of = self.spec.tables[table]
        return invalid(f"input {where} is {found}; expected an id from 0 to {of.rows - 1} (table '{of.name}')")


def one_hot_lengths(rows: Rows, n_sparse: int) -> memoryview:
    """The lengths of a one-hot request, for a batch in which others are multi-hot."""
    return rows.lengths if rows.lengths is not None else _bytes(np.ones(rows.count * n_sparse, np.int32))


def _expect(tensor: Tensor, types: tuple[str, ...]) -> None:
    if tensor.dtype not in types:
        raise invalid(f"input '{tensor.name}' has datatype {tensor.dtype!r}; expected {' or '.join(types)}")


def _bytes(values: NDArray[Any]) -> memoryview:
    return values.reshape(-1).view(np.uint8).data
