"""Rows to score, read piece by piece: Criteo text or arrays in, model inputs and line numbers out."""

import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from io import FileIO
from itertools import pairwise
from typing import Any, BinaryIO, Protocol

import numpy as np
from msgspec import Struct
from numpy.lib import format as npy
from numpy.typing import NDArray

from narsil_stream.cli.streams import read_some
from narsil_stream.core.criteo import BadRow, Parser
from narsil_stream.schemas.model import ModelSpec

PIECE_BYTES = 1 << 19

Array = NDArray[Any]


class InputError(Exception):
    """The input as a whole cannot be read; the message says why."""


class Inputs(Struct, frozen=True):
    """A model's inputs for some rows: one-hot `sparse` [B, n_sparse], or `values` [N] with `lengths` [B, n_sparse]."""

    dense: NDArray[np.float32]
    sparse: Array | None = None
    values: Array | None = None
    lengths: Array | None = None

    def __len__(self) -> int:
        return len(self.dense)

    def only(self, first: int, end: int) -> "Inputs":
        """Rows `first` to `end` - 1."""
        rows = slice(first, end)
        if self.values is None or self.lengths is None:
            return Inputs(self.dense[rows], None if self.sparse is None else self.sparse[rows])
        start = int(self.lengths[:first].sum(dtype=np.int64))
        ids = slice(start, start + int(self.lengths[rows].sum(dtype=np.int64)))
        return Inputs(self.dense[rows], values=self.values[ids], lengths=self.lengths[rows])


class Part(Struct, frozen=True):
    """Consecutive lines of the input, and what is in them."""

    first: int
    """Its first line, from 1."""
    lines: int
    """How many. Lines without a row are blank or bad."""
    places: NDArray[np.int64]
    """[B] the line of each row, counted from `first`."""
    inputs: Inputs
    """Of the B rows."""
    bad: list[BadRow]

    @property
    def end(self) -> int:
        """The line behind its last one."""
        return self.first + self.lines

    def between(self, first: int, end: int) -> "Part":
        """Of its lines, `first` to `end` - 1."""
        a, b = (int(at) for at in np.searchsorted(self.places, (first - self.first, end - self.first)))
        bad = [row for row in self.bad if first <= row.line < end]
        return Part(first, end - first, self.places[a:b] - (first - self.first), self.inputs.only(a, b), bad)

    def split(self, most_rows: int) -> Iterator["Part"]:
        """Parts of about equal size, none with more than `most_rows` rows, that together are this one."""
        count = len(self.places)
        parts = max(1, math.ceil(count / most_rows))
        inner = [self.first + int(self.places[count * i // parts]) for i in range(1, parts)]
        cuts = [self.first, *inner, self.end]
        for first, end in pairwise(cuts):
            yield self.between(first, end)


class Source(Protocol):
    """Where rows come from. `position` and `total` measure progress, in one unit; `total` 0: not known."""

    position: int
    total: int

    def parts(self) -> Iterator[Part]:
        """In order, without gaps. Raises InputError and OSError."""


class CriteoText:
    """TAB-separated rows of a file, a pipe or a terminal."""

    def __init__(self, file: FileIO, spec: ModelSpec, labelled: bool | None) -> None:
        """`labelled`: whether rows begin with a label; None: see the first row."""
        self._file = file
        self._parser = Parser([table.rows for table in spec.tables], labelled)
        self._line = 1
        self.position = 0
        self.total = os.fstat(file.fileno()).st_size

    def parts(self) -> Iterator[Part]:
        last = b"\n"
        while data := read_some(self._file.fileno(), PIECE_BYTES):
            self.position += len(data)
            last = data[-1:]
            if lines := data.count(b"\n"):
                yield self._part(self._parser.feed(data), lines)
            else:
                self._parser.feed(data)
        if last != b"\n":
            yield self._part(self._parser.finish(), 1)

    def _part(self, rows: Any, lines: int) -> Part:
        first = self._line
        self._line += lines
        return Part(first, lines, rows.lines - first, Inputs(rows.dense, rows.sparse), rows.bad)


class Arrays:
    """An .npz file with `dense` [rows, n_dense] and `sparse` [rows, n_sparse], or `values` [N] and `lengths`
    [rows, n_sparse], as `numpy.savez` and `numpy.savez_compressed` write them. Line i of the output is row i, from 1.
    """

    def __init__(self, file: BinaryIO, spec: ModelSpec) -> None:
        """Raises InputError."""
        self._members = _members(file)
        self._check = RowCheck(spec)
        self.position = 0
        self.total = self._checked_shapes(spec)
        row_bytes = sum(member.row_bytes for name, member in self._members.items() if name != "values")
        self._piece_rows = max(1, PIECE_BYTES // row_bytes)

    def parts(self) -> Iterator[Part]:
        while self.position < self.total:
            count = min(self._piece_rows, self.total - self.position)
            yield self._check.part(self.position + 1, *self._read(count))
            self.position += count
        if "values" in self._members and (left := self._members["values"].left):
            raise InputError(f"'lengths' adds up to {left} fewer than the ids in 'values'")

    def _read(self, count: int) -> tuple[Array, Array, Array | None]:
        """dense, ids and lengths of the next rows."""
        dense = self._members["dense"].take(count)
        if "sparse" in self._members:
            return dense, self._members["sparse"].take(count), None
        lengths = self._members["lengths"].take(count)
        if lengths.min(initial=0) < 0:
            row, table = np.argwhere(lengths < 0)[0]
            raise InputError(f"'lengths' [{self.position + row}, {table}] is negative")
        return dense, self._members["values"].take(int(lengths.sum(dtype=np.int64))), lengths

    def _checked_shapes(self, spec: ModelSpec) -> int:
        """The number of rows."""
        names = set(self._members)
        if names not in ({"dense", "sparse"}, {"dense", "values", "lengths"}):
            given = ", ".join(sorted(names)) or "no array"
            raise InputError(f"holds {given}; expected dense and sparse, or dense, values and lengths")
        rows = self._members["dense"].shape[0] if self._members["dense"].shape else 0
        shapes = {"dense": (rows, spec.n_dense), "values": None}
        for name, member in self._members.items():
            shape = shapes.get(name, (rows, spec.n_sparse))
            if len(member.shape) != 1 if shape is None else member.shape != shape:
                raise InputError(f"'{name}' has shape {list(member.shape)}; expected {list(shape) if shape else '[N]'}")
            if member.dtype.kind not in ("f" if name == "dense" else "iu"):
                kind = "floating point numbers" if name == "dense" else "integers"
                raise InputError(f"'{name}' has dtype {member.dtype}; expected {kind}")
        return int(rows)


class RowCheck:
    """Finds the rows that the serving side would refuse, so that each fails alone and under its own number."""

    def __init__(self, spec: ModelSpec) -> None:
        self._spec = spec
        self._tables = np.array([table.rows for table in spec.tables], np.int64)

    def part(self, first: int, dense: Array, ids: Array, lengths: Array | None) -> Part:
        """`first`: the number of the first row."""
        with np.errstate(over="ignore"):  # what overflows becomes inf, which is refused by position
            dense = dense.astype(np.float32, copy=False)
        row_of, table_of = self._places(len(dense), lengths)
        ids = ids.reshape(-1)
        bad = self._bad_dense(first, dense) | self._bad_ids(first, ids, row_of, table_of)
        good = np.ones(len(dense), bool)
        good[[row.line - first for row in bad.values()]] = False
        kept = ids[good[row_of]].astype(np.int32)
        if lengths is None:
            inputs = Inputs(dense[good], kept.reshape(-1, len(self._tables)))
        else:
            inputs = Inputs(dense[good], values=kept, lengths=lengths[good].astype(np.int32))
        return Part(first, len(dense), np.flatnonzero(good), inputs, [bad[line] for line in sorted(bad)])

    def _places(self, rows: int, lengths: Array | None) -> tuple[Array, Array]:
        """The row and the table of each id."""
        row, table = np.indices((rows, len(self._tables))).reshape(2, -1)
        return (row, table) if lengths is None else (row.repeat(lengths.flat), table.repeat(lengths.flat))

    def _bad_dense(self, first: int, dense: Array) -> dict[int, BadRow]:
        """By line; the first wrong value of each. So is `_bad_ids`."""
        bad: dict[int, BadRow] = {}
        for row, column in np.argwhere(~np.isfinite(dense)).tolist():
            line, found = first + row, str(dense[row, column])
            bad.setdefault(line, BadRow(line, f"dense[{column}]", found, "a finite FP32 number"))
        return bad

    def _bad_ids(self, first: int, ids: Array, row_of: Array, table_of: Array) -> dict[int, BadRow]:
        bad: dict[int, BadRow] = {}
        for at in np.flatnonzero((ids < 0) | (ids >= self._tables[table_of])):
            line, table = first + int(row_of[at]), self._spec.tables[table_of[at]]
            bad.setdefault(line, BadRow(line, f"table {table.name}", str(ids[at]), f"an id from 0 to {table.rows - 1}"))
        return bad


class _Member:
    """One array of an .npz file, read from front to back."""

    def __init__(self, name: str, stream: Any) -> None:
        self._name = name
        self._stream = stream
        version = npy.read_magic(stream)
        read_header = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}[version]
        self.shape, fortran, self.dtype = read_header(stream)
        if fortran and len(self.shape) > 1:
            raise InputError(f"'{name}' is stored in Fortran order; save numpy.ascontiguousarray of it")
        self.left = self.shape[0] if self.shape else 0
        self.row_bytes = self.dtype.itemsize * math.prod(self.shape[1:])

    def take(self, count: int) -> Array:
        """The next `count` elements of the first dimension."""
        if count > self.left:
            raise InputError(f"'{self._name}' ends {count - self.left} elements too early")
        self.left -= count
        size = count * self.row_bytes
        try:
            data = self._stream.read(size)
        except _UNREADABLE as error:
            raise InputError(f"'{self._name}' cannot be read: {error}") from None
        if len(data) != size:
            raise InputError(f"'{self._name}' is cut off")
        return np.frombuffer(data, self.dtype).reshape(count, *self.shape[1:])


_UNREADABLE = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)
_NO_ARRAYS = (*_UNREADABLE, ValueError, KeyError, SyntaxError, struct.error)


def _members(file: BinaryIO) -> Mapping[str, _Member]:
    try:
        archive = zipfile.ZipFile(file)
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        return {name: _Member(name, archive.open(f"{name}.npy")) for name in names}
    except _NO_ARRAYS as error:
        raise InputError(f"not an .npz file of plain arrays: {error}") from None
