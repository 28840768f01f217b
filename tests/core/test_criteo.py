import io
import math
import os
import tracemalloc
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from narsil_stream.core.criteo import DENSE, MAX_LINE_BYTES, SPARSE, BadRow, Parser, Rows, read

TABLE_ROWS = [10_000 + i for i in range(26)]
EMPTY = [b""] * 39


def row(fields: dict[str, bytes], label: bytes | None = b"0") -> bytes:
    """A row that is missing all but the given fields."""
    cells = [fields.get(name, b"") for name in (*DENSE, *SPARSE)]
    return b"\t".join(cells if label is None else [label, *cells])


def parse(text: bytes, labelled: bool | None = None) -> Rows:
    parser = Parser(TABLE_ROWS, labelled)
    return joined([parser.feed(text), parser.finish()])


def joined(parts: list[Rows]) -> Rows:
    labels = [part.labels for part in parts if part.labels is not None]
    return Rows(
        dense=np.concatenate([part.dense for part in parts]),
        sparse=np.concatenate([part.sparse for part in parts]),
        labels=np.concatenate(labels) if labels else None,
        lines=np.concatenate([part.lines for part in parts]),
        bad=[bad for part in parts for bad in part.bad],
    )


def slow_dense(cell: bytes) -> float:
    return math.log(max(int(cell or b"0"), 0) + 1)


def slow_sparse(cell: bytes, rows: int) -> int:
    return int(cell or b"0", 16) % rows


def slow(lines: list[bytes], labelled: bool) -> tuple[list[list[float]], list[list[int]], list[float]]:
    """The usual preprocessing, a field at a time."""
    dense, sparse, labels = [], [], []
    for line in lines:
        cells = line.split(b"\t")
        if labelled:
            labels.append(float(cells.pop(0)))
        dense.append([slow_dense(cell) for cell in cells[:13]])
        sparse.append([slow_sparse(cell, rows) for cell, rows in zip(cells[13:], TABLE_ROWS, strict=True)])
    return dense, sparse, labels


def assert_same(rows: Rows, lines: list[bytes], labelled: bool) -> None:
    dense, sparse, labels = slow(lines, labelled)
    np.testing.assert_allclose(rows.dense, np.array(dense, np.float32).reshape(-1, 13), rtol=1e-6)
    np.testing.assert_array_equal(rows.sparse, np.array(sparse, np.int32).reshape(-1, 26))
    assert (rows.dense.dtype, rows.sparse.dtype) == (np.float32, np.int32)
    assert ([] if rows.labels is None else rows.labels.tolist()) == labels


integers = st.one_of(st.just(b""), st.integers(-(10**18) + 1, 10**18 - 1).map(lambda i: str(i).encode()))
hashes = st.one_of(st.just(b""), st.from_regex(r"[0-9a-fA-F]{1,8}", fullmatch=True).map(str.encode))
cells = st.tuples(*[integers] * 13, *[hashes] * 26).map(list)
line_ends = st.sampled_from([b"\n", b"\r\n", b"\n\n", b"\n\r\n"])


@settings(deadline=None, max_examples=60)
@given(data=st.data(), table=st.lists(cells, max_size=5), labelled=st.booleans(), line_end=line_ends)
def test_rows_however_cut_and_ended_come_out_as_the_slow_way_has_them(
    data: st.DataObject, table: list[list[bytes]], labelled: bool, line_end: bytes
) -> None:
    """A pipe cuts anywhere; editors add carriage returns and blank lines. No row may change by that."""
    lines = [b"\t".join([b"1", *row] if labelled else row) for row in table]
    text = line_end.join(lines) + data.draw(st.sampled_from([b"", line_end]))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    parser = Parser(TABLE_ROWS)
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    rows = joined([*(parser.feed(piece) for piece in pieces), parser.finish()])
    assert rows.bad == []
    assert_same(rows, lines, labelled)


@settings(deadline=None, max_examples=200)
@given(junk=st.one_of(st.binary(max_size=400), st.text(alphabet="\t\n\r01f-", max_size=400).map(str.encode)))
def test_any_bytes_give_rows_or_reports_one_for_each_line(junk: bytes) -> None:
    """A stream from outside must never end the scorer with an exception, nor lose a line in silence."""
    rows = parse(junk)
    blank = sum(line in (b"", b"\r") for line in junk.split(b"\n"))
    assert len(rows.lines) + len(rows.bad) == junk.count(b"\n") + 1 - blank
    assert sorted({*rows.lines.tolist(), *(bad.line for bad in rows.bad)}) == [
        i for i, line in enumerate(junk.split(b"\n"), start=1) if line not in (b"", b"\r")
    ]


@settings(deadline=None, max_examples=100)
@given(before=cells, at=st.integers(0, 38), junk=st.binary(max_size=25).filter(lambda b: not set(b) & set(b"\t\n\r")))
def test_a_field_is_taken_or_reported_as_the_format_says(before: list[bytes], at: int, junk: bytes) -> None:
    """The quick way must accept exactly what the format allows: no more, no less."""
    fields = [*before[:at], junk, *before[at + 1 :]]
    rows = parse(b"\t".join(fields))
    digits = junk.removeprefix(b"-") if at < 13 else junk
    allowed, most = (b"0123456789", 18) if at < 13 else (b"0123456789abcdefABCDEF", 8)
    fits = junk == b"" or (0 < len(digits) <= most and not set(digits) - set(allowed))
    assert [bad.field for bad in rows.bad] == ([] if fits else [(*DENSE, *SPARSE)[at]])
    if fits:
        assert_same(rows, [b"\t".join(fields)], labelled=False)


CELLS: dict[str, tuple[str, bytes, str]] = {
    "float": ("I3", b"1.0", "found '1.0', expected an integer of at most 18 digits, or nothing"),
    "plus": ("I1", b"+1", "found '+1'"),
    "space": ("I2", b" 7", "found ' 7'"),
    "lone minus": ("I13", b"-", "found '-'"),
    "two minus": ("I13", b"--1", "found '--1'"),
    "long integer": ("I5", b"1" * 19, "found '1111111111111111111'"),
    "long hex": ("C26", b"123456789", "found '123456789', expected 1 to 8 hex digits, or nothing"),
    "not hex": ("C1", b"0123456g", "found '0123456g'"),
    "negative hex": ("C9", b"-1", "found '-1'"),
    "0x": ("C2", b"0x12", "found '0x12'"),
    "NUL": ("C3", b"\0", r"found '\x00'"),
    "not ASCII": ("C4", "é".encode(), r"found '\xc3\xa9'"),
    "huge": ("C5", b"f" * 999, "found '" + "f" * 32 + "'... (999 bytes)"),
    "carriage return inside": ("I4", b"1\r", r"found '1\r'"),
}


@pytest.mark.parametrize("case", CELLS)
def test_a_bad_field_is_reported_with_line_name_and_content(case: str) -> None:
    """A person must find the one bad row among millions."""
    field, cell, message = CELLS[case]
    good = row({"I1": b"3"})
    rows = parse(b"\n".join([good, b"", row({field: cell}), good]))
    (bad,) = rows.bad
    assert (bad.line, bad.field) == (3, field)
    assert str(bad).startswith(f"line 3, {field}: {message}")
    assert rows.lines.tolist() == [1, 4]


def test_the_first_bad_field_of_a_row_is_the_one_that_is_named() -> None:
    """Rows that are shifted by one are wrong from some field on: the first tells most."""
    (bad,) = parse(row({"C20": b"x", "I9": b"y", "C1": b"z"})).bad
    assert bad.field == "I9"


@pytest.mark.parametrize("label", [b"", b"2", b"01", b"-1", b"a", b"1.0"])
def test_a_label_is_zero_or_one(label: bytes) -> None:
    """A label of another kind means that the file is not what it seems."""
    rows = parse(row({}, b"1") + b"\n" + row({}, label))
    (bad,) = rows.bad
    assert (bad.line, bad.field, bad.expected) == (2, "label", "0 or 1")
    assert rows.labels is not None
    assert rows.labels.tolist() == [1]


@pytest.mark.parametrize(("text", "found"), [(b"a,b,c", "1 fields"), (b"\t".join([b""] * 41), "41 fields")])
def test_a_file_of_another_format_says_what_is_expected(text: bytes, found: str) -> None:
    """The wrong file is the most likely mistake of all."""
    assert parse(text).bad == [BadRow(1, "row", found, "40 (with a label) or 39, separated by TAB")]


def test_a_truncated_row_of_a_labelled_file_is_not_read_as_one_without_label() -> None:
    """All its fields would shift by one, and often still parse."""
    rows = parse(row({}) + b"\n" + b"\t".join(EMPTY) + b"\n" + row({}))
    assert rows.bad == [BadRow(2, "row", "39 fields", "40 (with a label), separated by TAB")]
    assert rows.lines.tolist() == [1, 3]


def test_whether_rows_have_labels_can_be_said_beforehand() -> None:
    """A scorer that expects no labels must not take its cue from a first row that is broken."""
    rows = parse(row({}) + b"\n" + b"\t".join(EMPTY), labelled=False)
    assert (rows.lines.tolist(), rows.labels) == ([2], None)
    assert rows.bad[0].found == "40 fields"
    assert parse(b"\t".join(EMPTY), labelled=True).bad[0].found == "39 fields"


def test_a_row_of_missing_values_is_a_row_of_zeros() -> None:
    """Missing is 0 for both kinds; a line of only TABs is no blank line."""
    rows = parse(b"\t".join(EMPTY))
    assert not rows.dense.any()
    assert not rows.sparse.any()
    assert len(rows.lines) == 1


def test_nothing_gives_no_rows() -> None:
    """An empty file is legal; its arrays still have their widths."""
    for text in (b"", b"\n", b"\r\n\r\n"):
        rows = parse(text)
        assert (rows.dense.shape, rows.sparse.shape, rows.lines.shape, rows.bad) == ((0, 13), (0, 26), (0,), [])


def test_categories_wrap_at_the_rows_of_their_own_table() -> None:
    """The largest hash is above 2^31: signed arithmetic would give negative ids."""
    sparse = parse(row({"C1": b"ffffffff", "C2": b"FFFFFFFF", "C26": b"2710"})).sparse[0]
    assert (sparse[0], sparse[1], sparse[25]) == (0xFFFFFFFF % 10_000, 0xFFFFFFFF % 10_001, 0x2710)
    assert Parser([2**31 - 1] * 26).feed(row({"C1": b"ffffffff"}) + b"\n").sparse[0, 0] == 0xFFFFFFFF % (2**31 - 1)


@pytest.mark.parametrize("table_rows", [[10] * 25, [10] * 27, [0] * 26, [2**31] * 26])
def test_tables_that_are_not_criteos_are_refused_at_once(table_rows: list[int]) -> None:
    """A model of another shape cannot score these rows."""
    with pytest.raises(ValueError, match="26 tables"):
        Parser(table_rows)


def test_a_line_without_end_costs_little_memory_and_one_report() -> None:
    """A binary file piped in by mistake has no line ends; the stream goes on after it."""
    parser = Parser(TABLE_ROWS)
    good = row({})
    parser.feed(good + b"\n" + b"x" * 100)
    tracemalloc.start()
    for _ in range(1000):
        parser.feed(b"x" * 100_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    rows = joined([parser.feed(b"x\n" + good), parser.finish()])
    assert peak < 2_000_000
    assert [(bad.line, bad.found) for bad in rows.bad] == [(2, f"more than {MAX_LINE_BYTES} bytes")]
    assert rows.lines.tolist() == [3]


class Endless(io.RawIOBase):
    """Hands out the same rows `pieces` times, as a pipe does."""

    def __init__(self, text: bytes, pieces: int) -> None:
        self.text, self.left = text, pieces

    def read(self, size: int = -1) -> bytes:
        self.left -= 1
        return self.text if self.left >= 0 else b""


def test_a_long_stream_takes_no_more_memory_than_a_short_one() -> None:
    """Files of this kind have terabytes."""

    def peak(pieces: int) -> int:
        tracemalloc.start()
        stream: BinaryIO = Endless((row({"I1": b"5"}) + b"\n") * 300, pieces)  # type: ignore[assignment]
        assert sum(len(rows.lines) for rows in read(stream, TABLE_ROWS)) == 300 * pieces
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return top

    assert peak(60) < 1.2 * peak(6)


def test_rows_in_a_pipe_are_read_as_soon_as_they_are_there() -> None:
    """A scorer at the end of a live pipe must not wait for a quarter of a megabyte."""
    out, into = os.pipe()
    with os.fdopen(out, "rb") as stream, os.fdopen(into, "wb", buffering=0) as producer:
        rows = read(stream, TABLE_ROWS)
        producer.write(row({}) + b"\n")
        assert next(rows).lines.tolist() == [1]


@pytest.mark.parametrize(
    ("file", "count", "clicks"),
    [("criteo_rows.tsv", 300, 78), ("criteo_terabyte_rows.tsv", 1000, 21), ("criteo_unlabelled_rows.tsv", 1999, None)],
)
@pytest.mark.parametrize("piece_bytes", [1 << 18, 1000])
def test_real_rows_come_out_as_the_slow_way_has_them(
    real_rows: Path, file: str, count: int, clicks: int | None, piece_bytes: int
) -> None:
    """Synthetic rows have only the oddities that somebody thought of."""
    path = real_rows / file
    with path.open("rb") as stream:
        rows = joined(list(read(stream, TABLE_ROWS, piece_bytes=piece_bytes)))
    assert rows.bad == []
    assert len(rows.lines) == count
    assert (None if rows.labels is None else int(rows.labels.sum())) == clicks
    assert_same(rows, path.read_bytes().splitlines(), labelled=clicks is not None)
