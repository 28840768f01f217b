"""Click rows in Criteo's format: TAB-separated text in, a model's `dense` and `sparse` inputs out.

A row is [label,] I1 ... I13, C1 ... C26; an empty field is a missing value. Integers become log(max(x, 0) + 1), missing
0; categories become int(hex, 16) % rows of their table, missing 0.
"""

from collections.abc import Iterator, Sequence
from io import BufferedReader
from typing import BinaryIO

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

DENSE = tuple(f"I{i}" for i in range(1, 14))
SPARSE = tuple(f"C{i}" for i in range(1, 27))
_FIELDS = ("label", *DENSE, *SPARSE)
_UNLABELLED, _LABELLED = len(_FIELDS) - 1, len(_FIELDS)

MAX_LINE_BYTES = 4096
"""Several times the longest honest row. What is longer is a bad row, and is not kept in memory."""

_MAX_DIGITS = 18
_TAB, _LF, _CR, _MINUS = b"\t\n\r-"
_NO_DIGIT = 255

Bytes = NDArray[np.uint8]
Places = NDArray[np.intp]
Marks = NDArray[np.bool_]


class BadRow(Struct, frozen=True):
    """A row that is not what the format says, and the first field of it that is wrong."""

    line: int
    """From 1, blank lines counted."""
    field: str
    """label, I1 to I13, C1 to C26, or "row" when the row has not the right fields at all."""
    found: str
    expected: str

    def __str__(self) -> str:
        return f"line {self.line}, {self.field}: found {self.found}, expected {self.expected}"


class Rows(Struct, frozen=True):
    """The good rows of a piece of a stream, in order, and the bad ones."""

    dense: NDArray[np.float32]
    """[B, 13]"""
    sparse: NDArray[np.int32]
    """[B, 26]"""
    labels: NDArray[np.float32] | None
    """[B] of 0 and 1; None where the rows have none."""
    lines: NDArray[np.int64]
    """[B] line numbers, from 1."""
    bad: list[BadRow]
    """In order. Ignore them to skip bad rows."""


class Parser:
    """Turns a stream, cut anywhere, into rows. Between two calls it holds at most one unfinished line.

    Takes LF and CRLF, skips blank lines, does without the last line end. Whether rows have a label is settled by the
    first row with 39 or 40 fields unless `labelled` says so: a truncated row must not be read as one without a label.
    """

    def __init__(self, table_rows: Sequence[int], labelled: bool | None = None) -> None:
        """`table_rows`: of each of the 26 tables. Raises ValueError: another number of tables, rows beyond 2^31-1."""
        if len(table_rows) != len(SPARSE) or not all(1 <= rows < 2**31 for rows in table_rows):
            raise ValueError(f"a Criteo model has 26 tables of 1 to 2147483647 rows, got {list(table_rows)}")
        self._table_rows = np.array(table_rows, np.uint32)
        self._fields = {None: None, False: _UNLABELLED, True: _LABELLED}[labelled]
        self._lines = 0
        self._rest = b""

    def feed(self, data: bytes) -> Rows:
        """The rows that this piece completes. Best in pieces of 64 KiB to 1 MiB; memory grows with the piece."""
        cut = data.rfind(b"\n") + 1
        text = self._rest + data[:cut] if cut else b""
        rest = data[cut:] if cut else self._rest + data
        self._rest = rest[: MAX_LINE_BYTES + 1]
        return self._parse(text)

    def finish(self) -> Rows:
        """The last row, if the stream ended without a line end."""
        text, self._rest = self._rest, b""
        return self._parse(text + b"\n" if text else b"")

    def _parse(self, text: bytes) -> Rows:
        """`text`: whole lines."""
        data = np.frombuffer(text, np.uint8)
        separators = np.flatnonzero((data == _TAB) | (data == _LF))
        last = np.flatnonzero(data[separators] == _LF)
        fields = np.diff(last, prepend=-1)
        line_ends = separators[last]
        line_starts = np.concatenate([[0], line_ends + 1])[:-1]
        sizes = line_ends - line_starts
        blank = (sizes == 0) | ((sizes == 1) & (data[line_starts] == _CR))
        whole = self._right_fields(fields, blank) & (sizes <= MAX_LINE_BYTES)
        lines = np.arange(self._lines + 1, self._lines + 1 + len(last))
        self._lines += len(last)

        misshapen = np.flatnonzero(~whole & ~blank)
        bad = [self._misshapen(int(lines[i]), int(fields[i]), int(sizes[i])) for i in misshapen]
        ends = separators[last[whole, None] + np.arange(1 - (self._fields or _LABELLED), 1)]
        starts = np.concatenate([line_starts[whole, None], ends[:, :-1] + 1], axis=1)
        ends[:, -1] -= data[ends[:, -1] - 1] == _CR
        return self._convert(data, starts, ends, lines[whole], bad)

    def _convert(self, data: Bytes, starts: Places, ends: Places, lines: Places, bad: list[BadRow]) -> Rows:
        """`starts`, `ends`: of each field [B, 39 or 40]. `bad`: rows that are bad already."""
        numbers, wrong_numbers = _integers(data, starts[:, :-26], ends[:, :-26])
        hashes, wrong_hashes = _hashes(data, starts[:, -26:], ends[:, -26:])
        wrong = np.concatenate([wrong_numbers, wrong_hashes], axis=1)
        if self._fields == _LABELLED:
            wrong[:, 0] |= (ends[:, 0] - starts[:, 0] != 1) | (numbers[:, 0] > 1)

        spoiled = wrong.any(axis=1)
        for i in np.flatnonzero(spoiled):
            field = int(wrong[i].argmax())
            found = data[starts[i, field] : ends[i, field]].tobytes()
            bad.append(_wrong(int(lines[i]), _FIELDS[field - wrong.shape[1]], found))
        numbers, hashes = numbers[~spoiled], hashes[~spoiled]
        return Rows(
            dense=np.log(numbers[:, -13:] + 1).astype(np.float32),
            sparse=(hashes % self._table_rows).astype(np.int32),
            labels=numbers[:, 0].astype(np.float32) if self._fields == _LABELLED else None,
            lines=lines[~spoiled],
            bad=sorted(bad, key=lambda row: row.line),
        )

    def _right_fields(self, fields: Places, blank: Marks) -> Marks:
        if self._fields is None:
            settling = fields[~blank & ((fields == _UNLABELLED) | (fields == _LABELLED))]
            self._fields = int(settling[0]) if len(settling) else None
        right: Marks = ~blank & (fields == (self._fields or 0))
        return right

    def _misshapen(self, line: int, fields: int, size: int) -> BadRow:
        if size > MAX_LINE_BYTES:
            return BadRow(line, "row", f"more than {MAX_LINE_BYTES} bytes", "a row of a few hundred bytes")
        known = {None: "40 (with a label) or 39", _LABELLED: "40 (with a label)", _UNLABELLED: "39 (without a label)"}
        return BadRow(line, "row", f"{fields} fields", f"{known[self._fields]}, separated by TAB")


def read(
    stream: BinaryIO, table_rows: Sequence[int], labelled: bool | None = None, piece_bytes: int = 1 << 18
) -> Iterator[Rows]:
    """Parse a file, a pipe or standard input piece by piece, in constant memory.

    A pipe's rows come as soon as they are there, in pieces of up to `piece_bytes`.
    """
    parser = Parser(table_rows, labelled)
    take = stream.read1 if isinstance(stream, BufferedReader) else stream.read
    while piece := take(piece_bytes):
        yield parser.feed(piece)
    yield parser.finish()


def _integers(data: Bytes, starts: Places, ends: Places) -> tuple[NDArray[np.float64], Marks]:
    """max(value, 0) of each field, 0 for an empty one, and where a field is no integer. [B, n] each."""
    minus = (data[starts] == _MINUS) & (starts < ends)
    sizes = ends - starts - minus
    width = min(int(sizes.max(initial=1)), _MAX_DIGITS)
    digits = _last_digits(_DECIMAL[data], ends, sizes, width)
    values = np.zeros(ends.shape)
    for digit in digits:
        values *= 10
        values += digit
    values[minus] = 0
    return values, (digits.max(axis=0) == _NO_DIGIT) | (sizes > _MAX_DIGITS) | (minus & (sizes == 0))


def _hashes(data: Bytes, starts: Places, ends: Places) -> tuple[NDArray[np.uint32], Marks]:
    """The value of each field of hex digits, 0 for an empty one, and where a field is something else. [B, n] each."""
    sizes = ends - starts
    digits = _last_digits(_HEX[data], ends, sizes, 8)
    values = np.zeros(ends.shape, np.uint32)
    for digit in digits:
        values <<= 4
        values |= digit
    return values, (digits.max(axis=0) == _NO_DIGIT) | (sizes > 8)


def _last_digits(digits: Bytes, ends: Places, sizes: Places, width: int) -> Bytes:
    """The last `width` digits of each field, with zeros before the first. [B, n] -> [width, B, n]"""
    from_end = np.arange(width, 0, -1)[:, None, None]
    taken = digits.take(ends - from_end, mode="wrap")
    taken *= from_end <= sizes
    return taken


def _table(digits: bytes) -> Bytes:
    table = np.full(256, _NO_DIGIT, np.uint8)
    for digit in digits:
        table[digit] = int(chr(digit), 16)
    return table


_DECIMAL = _table(b"0123456789")
_HEX = _table(b"0123456789abcdefABCDEF")


def _wrong(line: int, field: str, found: bytes) -> BadRow:
    expected = {"l": "0 or 1", "I": f"an integer of at most {_MAX_DIGITS} digits, or nothing"}
    shown = repr(found[:32])[1:] + (f"... ({len(found)} bytes)" if len(found) > 32 else "")
    return BadRow(line, field, shown, expected.get(field[0], "1 to 8 hex digits, or nothing"))
