"""Reading arrays for `narsil score`: what is accepted, in which pieces, and what is said of the rest."""

import io
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from narsil_stream.cli import rows as module
from narsil_stream.cli.rows import Arrays, InputError, Part
from narsil_stream.schemas.model import DlrmDot, ModelSpec, Table

SPEC = ModelSpec(
    name="m",
    architecture=DlrmDot(dense=2, dim=4, bottom=(4,), top=(1,)),
    tables=(Table(name="a", rows=10), Table(name="b", rows=5)),
)
DENSE = np.arange(12, dtype=np.float32).reshape(6, 2)
SPARSE = np.arange(12).reshape(6, 2) % 5
LENGTHS = np.array([[0, 2], [1, 0], [0, 0], [3, 1], [0, 1], [2, 2]], np.int32)
VALUES = np.arange(LENGTHS.sum()) % 5


def npz(save: Callable[..., None] = np.savez, **arrays: Any) -> io.BytesIO:
    file = io.BytesIO()
    save(file, **arrays)
    return file


def parts(file: io.BytesIO) -> list[Part]:
    return list(Arrays(file, SPEC).parts())


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(("piece_bytes", "pieces"), [(1, (6, 6)), (50, (3, 2)), (1 << 20, (1, 1))])
def test_arrays_are_read_in_pieces_of_bounded_size(
    save: Callable[..., None], piece_bytes: int, pieces: tuple[int, int], monkeypatch: pytest.MonkeyPatch
):
    """A file larger than memory can be scored, whole rows at a time. A row has 24 bytes here, without values 16."""
    monkeypatch.setattr(module, "PIECE_BYTES", piece_bytes)
    one_hot = parts(npz(save, dense=DENSE, sparse=SPARSE))
    assert np.array_equal(np.concatenate([part.inputs.sparse for part in one_hot]), SPARSE)
    assert np.array_equal(np.concatenate([part.inputs.dense for part in one_hot]), DENSE)
    multi_hot = parts(npz(save, dense=DENSE, values=VALUES, lengths=LENGTHS))
    assert np.array_equal(np.concatenate([part.inputs.values for part in multi_hot]), VALUES)
    assert np.array_equal(np.concatenate([part.inputs.lengths for part in multi_hot]), LENGTHS)
    assert (len(one_hot), len(multi_hot)) == pieces
    for read in (one_hot, multi_hot):
        assert [part.first for part in read[1:]] == [part.end for part in read[:-1]]


def test_bags_follow_their_rows_when_a_part_is_split():
    """An id in the wrong row's bag gives two wrong scores and no error."""
    (part,) = parts(npz(dense=DENSE, values=VALUES, lengths=LENGTHS))
    split = list(part.split(2))
    assert [len(piece.inputs) for piece in split] == [2, 2, 2]
    assert np.array_equal(np.concatenate([piece.inputs.values for piece in split]), VALUES)
    for piece in split:
        assert piece.inputs.lengths is not None and piece.inputs.values is not None
        assert piece.inputs.lengths.sum() == len(piece.inputs.values)


def test_a_bad_row_takes_its_bag_with_it():
    """Otherwise its ids would slide into the next row."""
    values = VALUES.copy()
    values[3] = 99  # row 3, table a
    (part,) = parts(npz(dense=DENSE, values=values, lengths=LENGTHS))
    assert [str(row) for row in part.bad] == ["line 4, table a: found 99, expected an id from 0 to 9"]
    assert part.places.tolist() == [0, 1, 2, 4, 5]
    assert part.inputs.values is not None
    assert part.inputs.values.tolist() == np.delete(VALUES, slice(3, 7)).tolist()


def test_other_number_types_become_those_of_the_wire():
    """float64 and uint8 are what people have; big-endian files exist."""
    (part,) = parts(npz(dense=DENSE.astype(">f8"), sparse=SPARSE.astype(np.uint8)))
    assert part.inputs.sparse is not None
    assert (part.inputs.dense.dtype, part.inputs.sparse.dtype) == (np.float32, np.int32)
    assert np.array_equal(part.inputs.dense, DENSE)


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"dense": DENSE}, "holds dense; expected dense and sparse, or dense, values and lengths"),
        ({"dense": DENSE, "sparse": SPARSE, "label": SPARSE}, "holds dense, label, sparse; expected"),
        ({"dense": DENSE, "sparse": SPARSE[:5]}, r"'sparse' has shape \[5, 2\]; expected \[6, 2\]"),
        ({"dense": DENSE[:, :1], "sparse": SPARSE}, r"'dense' has shape \[6, 1\]; expected \[6, 2\]"),
        ({"dense": np.float32(1), "sparse": SPARSE}, "'dense' has shape"),
        ({"dense": DENSE, "sparse": SPARSE.astype(float)}, "'sparse' has dtype float64; expected integers"),
        ({"dense": DENSE.astype(int), "sparse": SPARSE}, "'dense' has dtype int64; expected floating point"),
        ({"dense": DENSE.astype(object), "sparse": SPARSE}, "'dense' has dtype object"),
        ({"dense": np.asfortranarray(DENSE), "sparse": SPARSE}, "'dense' is stored in Fortran order"),
        ({"dense": DENSE, "values": VALUES[:-1], "lengths": LENGTHS}, "'values' ends 1 elements too early"),
        ({"dense": DENSE, "values": [*VALUES, 1], "lengths": LENGTHS}, "adds up to 1 fewer than the ids in 'values'"),
        ({"dense": DENSE, "values": VALUES, "lengths": LENGTHS - 1}, r"'lengths' \[0, 0\] is negative"),
    ],
)
def test_arrays_that_fit_no_model_input_are_told_by_name(arrays: dict[str, Any], reason: str):
    """The message must say what to change in the program that wrote the file."""
    with pytest.raises(InputError, match=reason):
        parts(npz(**arrays))


def test_files_that_hold_no_arrays_are_told_so():
    """A wrong file name must not end in a traceback."""
    stranger = io.BytesIO()
    with zipfile.ZipFile(stranger, "w") as archive:
        archive.writestr("readme.txt", "hello")
    cut = io.BytesIO(npz(dense=DENSE, sparse=SPARSE).getvalue()[:-40])
    for file in (io.BytesIO(b""), io.BytesIO(b"0\t1\t2\n"), stranger, cut):
        with pytest.raises(InputError, match=r"not an \.npz file of plain arrays"):
            parts(file)


def test_damage_inside_an_array_is_told_with_its_name():
    """A checksum that does not fit means wrong numbers."""
    dense = np.random.default_rng(0).random((50_000, 2), np.float32)
    data = bytearray(npz(dense=dense, sparse=np.zeros((50_000, 2), int)).getvalue())
    data[data.index(dense[-1].tobytes())] ^= 1
    with pytest.raises(InputError, match="'dense' cannot be read: Bad CRC"):
        parts(io.BytesIO(bytes(data)))
