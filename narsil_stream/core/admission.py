"""Checks a request against its model and turns it into the form that batches are joined from.

Everything that a backend may rely on is checked here, once, before it computes. Each error says which tensor, at which
position, what was found and what was expected. Values of one-hot requests may be checked when many of them are joined,
at a tenth of the cost: `shaped`, and then `sound` for all together, or `check` for each.
"""

from typing import Any

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from narsil_stream.schemas.codec import NAMES, array
from narsil_stream.schemas.errors import Fault, Refused, invalid
from narsil_stream.schemas.model import ModelSpec
from narsil_stream.schemas.wire import InferRequest, Tensor

ONE_HOT = frozenset({"dense", "sparse"})
MULTI_HOT = frozenset({"dense", "values", "lengths"})
DENSE_TYPES = ("FP32",)
ID_TYPES = ("INT32", "INT64")
LENGTH_TYPES = ("INT32",)


class Rows(Struct, frozen=True, gc=False):
    """A request's rows, batch-major: those of several requests are joined by joining their bytes."""

    count: int
    dense: memoryview
    """FP32 [count, n_dense]"""
    ids: memoryview
    """INT32 [N]"""
    lengths: memoryview | None
    """INT32 [count, n_sparse]; None: one-hot, N = count * n_sparse"""
    checked: bool = True
    """Whether values were looked at, beside shapes."""

    @property
    def nbytes(self) -> int:
        return self.dense.nbytes + self.ids.nbytes + (self.lengths.nbytes if self.lengths is not None else 0)

    def copied(self) -> "Rows":
        """The same in memory of its own, which lets go of the message it came in."""
        lengths = None if self.lengths is None else memoryview(bytes(self.lengths))
        return Rows(self.count, memoryview(bytes(self.dense)), memoryview(bytes(self.ids)), lengths, self.checked)


class Admission:
    """The checks for one model. They run on the batcher's event loop, once for each request."""

    def __init__(self, spec: ModelSpec, multi_hot: bool = True) -> None:
        """`multi_hot`: whether what computes the model takes bags of ids."""
        self.spec = spec
        self._takes_bags = multi_hot
        self._n_dense, self._n_sparse = spec.n_dense, spec.n_sparse
        tables = [table.rows for table in spec.tables]
        self._smallest = min(tables)
        # Ids are compared as unsigned numbers, of which the negative ones are the largest: one comparison, both ends.
        self._limits: dict[str, NDArray[Any]] = {
            "INT32": np.array(tables, np.uint32),
            "INT64": np.array(tables, np.uint64),
        }

    def rows(self, request: InferRequest) -> Rows:
        """Fully checked. Raises `Refused`: INVALID_ARGUMENT, or UNIMPLEMENTED for bags where they are not taken."""
        rows = self.shaped(request)
        if not rows.checked:
            self.check(rows)
        return rows

    def shaped(self, request: InferRequest) -> Rows:
        """Rows of the right shapes; their values are checked unless `checked` is False. Raises as `rows`."""
        return self._plain(request) or self._any(request)

    def _plain(self, request: InferRequest) -> Rows | None:
        """What nearly all requests are: one-hot in INT32, in this order. None for others, and for what is wrong."""
        if len(request.inputs) != 2:
            return None
        dense, sparse = request.inputs
        if dense.name != "dense" or dense.dtype != "FP32" or sparse.name != "sparse" or sparse.dtype != "INT32":
            return None
        count = len(sparse.data) // (4 * self._n_sparse)
        if (
            not count
            or dense.shape != (count, self._n_dense)
            or sparse.shape != (count, self._n_sparse)
            or len(dense.data) != 4 * count * self._n_dense
            or len(sparse.data) != 4 * count * self._n_sparse
        ):
            return None
        return Rows(count, dense.data, sparse.data, None, False)

    def _any(self, request: InferRequest) -> Rows:
        inputs = _by_name(request)
        dense = inputs["dense"]
        count = self._count(dense)
        if "sparse" in inputs:
            return Rows(count, dense.data, self._one_hot(inputs["sparse"], count), None, checked=False)
        if not self._takes_bags:
            name = self.spec.name
            detail = f"what computes model '{name}' takes one id for each table: send 'sparse' in place of 'values'"
            raise Refused(Fault.UNIMPLEMENTED, detail)
        self._check_dense(dense.data, count)
        lengths = inputs["lengths"]
        ids = self._multi_hot(inputs["values"], lengths, count)
        return Rows(count, dense.data, ids, lengths.data)

    def check(self, rows: Rows) -> None:
        """The values of one-hot rows. Raises as `rows`."""
        self._check_dense(rows.dense, rows.count)
        self._check_ids(np.frombuffer(rows.ids, np.int32).reshape(rows.count, -1))

    def sound(self, dense: bytearray, ids: bytearray) -> bool:
        """Whether `check` would pass for each of the one-hot requests that were joined to these."""
        fits = np.frombuffer(ids, np.uint32).reshape(-1, self._n_sparse) < self._limits["INT32"]
        return _all(np.isfinite(np.frombuffer(dense, np.float32))) and _all(fits)

    def _count(self, dense: Tensor) -> int:
        """The number of rows."""
        _expect_type(dense, DENSE_TYPES)
        shape, width = dense.shape, self._n_dense
        if len(shape) != 2 or shape[1] != width:
            raise invalid(f"input 'dense' has shape {list(shape)}; expected [rows, {width}]")
        count = shape[0]
        if count == 0:
            raise invalid("input 'dense' has 0 rows; expected at least 1")
        _expect_bytes(dense, 4 * count * width)
        return count

    def _check_dense(self, dense: memoryview, count: int) -> None:
        values = np.frombuffer(dense, np.float32).reshape(count, -1)
        finite = np.isfinite(values)
        if not _all(finite):
            row, column = _first(~finite)
            raise invalid(f"input 'dense' [{row}, {column}] is {values[row, column]}; expected a finite number")

    def _one_hot(self, tensor: Tensor, count: int) -> memoryview:
        """The ids as INT32."""
        _expect_type(tensor, ID_TYPES)
        self._expect_shape(tensor, count)
        if tensor.dtype == "INT32":
            _expect_bytes(tensor, 4 * count * self._n_sparse)
            return tensor.data
        ids = array(tensor)
        self._check_ids(ids)  # now: INT32 would hide what is wrong with them
        return _as_int32(tensor, ids)

    def _check_ids(self, ids: NDArray[Any]) -> None:
        """One-hot: [rows, n_sparse]."""
        limits = self._limits[NAMES[ids.dtype]]
        fits = ids.view(limits.dtype) < limits
        if not _all(fits):
            row, table = _first(~fits)
            raise self._out_of_range(f"'sparse' [{row}, {table}]", ids[row, table], table)

    def _multi_hot(self, values: Tensor, lengths: Tensor, count: int) -> memoryview:
        """The ids as INT32."""
        _expect_type(values, ID_TYPES)
        _expect_type(lengths, LENGTH_TYPES)
        self._expect_shape(lengths, count)
        if len(values.shape) != 1:
            raise invalid(f"input 'values' has shape {list(values.shape)}; expected [ids]")
        ids, bags = array(values), array(lengths)
        _check_lengths(bags, len(ids))
        limits = self._limits[values.dtype]
        unsigned = ids.view(limits.dtype)
        if len(ids) and np.maximum.reduce(unsigned) >= self._smallest:
            fits = unsigned < limits[None].repeat(count, axis=0).reshape(-1).repeat(bags.reshape(-1))
            if not _all(fits):
                (at,) = _first(~fits)
                bag = int(np.searchsorted(np.cumsum(bags, dtype=np.int64), at, side="right"))
                raise self._out_of_range(f"'values' [{at}]", ids[at], bag % self.spec.n_sparse)
        return _as_int32(values, ids)

    def _expect_shape(self, tensor: Tensor, count: int) -> None:
        expected = (count, self.spec.n_sparse)
        if tensor.shape != expected:
            raise invalid(
                f"input '{tensor.name}' has shape {list(tensor.shape)}; expected {list(expected)}"
                " (rows of 'dense', tables)"
            )

    def _out_of_range(self, where: str, found: Any, table: int) -> Refused:
        of = self.spec.tables[table]
        return invalid(f"input {where} is {found}; expected an id from 0 to {of.rows - 1} (table '{of.name}')")


def one_hot_lengths(rows: Rows, n_sparse: int) -> memoryview:
    """The lengths of a one-hot request, for a batch in which others are multi-hot."""
    return rows.lengths if rows.lengths is not None else _bytes(np.ones(rows.count * n_sparse, np.int32))


def _by_name(request: InferRequest) -> dict[str, Tensor]:
    inputs = {tensor.name: tensor for tensor in request.inputs}
    if len(inputs) != len(request.inputs):
        raise invalid("an input is given twice; each name may occur once")
    if inputs.keys() not in (ONE_HOT, MULTI_HOT):
        given = ", ".join(f"'{name}'" for name in inputs) or "none"
        raise invalid(f"inputs are {given}; expected 'dense' and 'sparse', or 'dense', 'values' and 'lengths'")
    return inputs


def _expect_type(tensor: Tensor, types: tuple[str, ...]) -> None:
    if tensor.dtype not in types:
        raise invalid(f"input '{tensor.name}' has datatype '{tensor.dtype}'; expected {' or '.join(types)}")


def _expect_bytes(tensor: Tensor, size: int) -> None:
    if len(tensor.data) != size:
        array(tensor)  # which says so


def _check_lengths(bags: NDArray[np.int32], ids: int) -> None:
    # Unsigned, a negative length counts more than 2**31 ids, so that one sum checks both.
    if np.add.reduce(bags.view(np.uint32), axis=None, dtype=np.uint64) == ids:
        return
    negative = bags < 0
    if negative.any():
        row, table = _first(negative)
        raise invalid(f"input 'lengths' [{row}, {table}] is {bags[row, table]}; expected 0 or more")
    raise invalid(f"input 'lengths' adds up to {bags.sum(dtype=np.int64)}; 'values' has {ids} ids")


def _all(good: NDArray[np.bool_]) -> bool:
    return bool(np.count_nonzero(good) == good.size)  # a third of the time of `good.all()`


def _first(bad: NDArray[np.bool_]) -> tuple[int, ...]:
    """Where the first one is."""
    return tuple(map(int, np.unravel_index(np.argmax(bad), bad.shape)))


def _as_int32(tensor: Tensor, ids: NDArray[Any]) -> memoryview:
    return tensor.data if tensor.dtype == "INT32" else _bytes(ids.astype(np.int32))


def _bytes(values: NDArray[Any]) -> memoryview:
    return values.reshape(-1).view(np.uint8).data
