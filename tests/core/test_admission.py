"""What passes admission meets other requests in a batch: all that a backend relies on is checked before."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from narsil_stream.core.admission import Admission, Rows, one_hot_lengths
from narsil_stream.kernels.backend import RaggedBatch
from narsil_stream.kernels.init import random_model
from narsil_stream.kernels.reference import Reference
from narsil_stream.schemas import codec
from narsil_stream.schemas.codec import Spelling, tensor
from narsil_stream.schemas.errors import Fault, Refused
from narsil_stream.schemas.model import DlrmDot, ModelSpec, Table
from narsil_stream.schemas.wire import InferRequest, Tensor

TABLES = (7, 1, 30)
LARGE = 2**31 - 1


def spec(*rows: int) -> ModelSpec:
    return ModelSpec(
        name="small",
        architecture=DlrmDot(dense=2, dim=4, bottom=(4,), top=(1,)),
        tables=tuple(Table(f"t{i}", n) for i, n in enumerate(rows)),
    )


ADMISSION = Admission(spec(*TABLES))
DENSE = np.array([[0, 1], [2, 3]], np.float32)
SPARSE = np.array([[6, 0, 29], [0, 0, 7]], np.int64)
LENGTHS = np.array([[2, 0, 1], [0, 1, 3]], np.int32)
VALUES = np.array([6, 0, 29, 0, 1, 2, 29], np.int64)


def request(**inputs: np.ndarray | Tensor) -> InferRequest:
    return InferRequest("", tuple(v if isinstance(v, Tensor) else tensor(k, v) for k, v in inputs.items()))


def admit(**inputs: np.ndarray | Tensor) -> Rows:
    return ADMISSION.rows(request(**inputs))


def with_item(array: np.ndarray, at: Any, value: Any) -> np.ndarray:
    changed = array.copy()
    changed[at] = value
    return changed


def told(**inputs: np.ndarray | Tensor) -> str:
    """What the caller is told of a request that must be refused."""
    with pytest.raises(Refused) as refused:
        admit(**inputs)
    assert refused.value.fault is Fault.INVALID_ARGUMENT
    return refused.value.detail


def ids(rows: Rows) -> list[int]:
    return np.frombuffer(rows.ids, np.int32).tolist()


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_a_one_hot_request_becomes_rows(dtype: type[Any]):
    """Ids of both types, up to the last row of each table, arrive as the INT32 that batches are made of."""
    rows = admit(dense=DENSE, sparse=SPARSE.astype(dtype))
    assert (rows.count, rows.dense, rows.lengths) == (2, DENSE.tobytes(), None)
    assert ids(rows) == SPARSE.reshape(-1).tolist()
    assert rows.nbytes == DENSE.nbytes + 4 * SPARSE.size


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_a_multi_hot_request_becomes_rows(dtype: type[Any]):
    """Empty bags included."""
    rows = admit(dense=DENSE, values=VALUES.astype(dtype), lengths=LENGTHS)
    assert (rows.count, rows.dense, rows.lengths) == (2, DENSE.tobytes(), LENGTHS.tobytes())
    assert ids(rows) == VALUES.tolist()
    assert rows.nbytes == DENSE.nbytes + 4 * VALUES.size + LENGTHS.nbytes


def test_all_bags_may_be_empty():
    """A new user has no history at all; that is scored, not refused."""
    rows = admit(dense=DENSE, values=np.array([], np.int64), lengths=np.zeros((2, 3), np.int32))
    assert (rows.count, ids(rows)) == (2, [])


def test_inputs_may_come_in_any_order():
    """The Open Inference Protocol names inputs; their order means nothing."""
    assert admit(sparse=SPARSE, dense=DENSE) == admit(dense=DENSE, sparse=SPARSE)


def test_one_hot_rows_join_a_multi_hot_batch_with_bags_of_one():
    """Otherwise one multi-hot request would spoil the batch that it shares."""
    one_hot = admit(dense=DENSE, sparse=SPARSE)
    assert np.frombuffer(one_hot_lengths(one_hot, 3), np.int32).tolist() == [1] * 6
    multi_hot = admit(dense=DENSE, values=VALUES, lengths=LENGTHS)
    assert one_hot_lengths(multi_hot, 3) == LENGTHS.tobytes()


@pytest.mark.parametrize(
    ("inputs", "given_names"),
    [
        ({}, "none"),
        ({"dense": DENSE}, "'dense'"),
        ({"sparse": SPARSE}, "'sparse'"),
        ({"dense": DENSE, "lengths": LENGTHS}, "'dense', 'lengths'"),
        ({"dense": DENSE, "sparse": SPARSE, "lengths": LENGTHS}, "'dense', 'sparse', 'lengths'"),
        ({"dense": DENSE, "Sparse": SPARSE}, "'dense', 'Sparse'"),
    ],
)
def test_missing_and_unknown_inputs_are_listed(inputs: dict[str, np.ndarray], given_names: str):
    """The commonest mistake of a first request: what was found stands beside what was expected."""
    assert (
        told(**inputs) == f"inputs are {given_names}; expected 'dense' and 'sparse', or 'dense', 'values' and 'lengths'"
    )


def test_an_input_given_twice_is_refused():
    """Which of the two would count is anybody's guess."""
    dense = tensor("dense", DENSE)
    with pytest.raises(Refused, match="given twice"):
        ADMISSION.rows(InferRequest("", (dense, tensor("sparse", SPARSE), dense)))


ONE_HOT = {"dense": DENSE, "sparse": SPARSE}
MULTI_HOT = {"dense": DENSE, "values": VALUES, "lengths": LENGTHS}


@pytest.mark.parametrize(
    ("inputs", "name", "dtype", "expected"),
    [
        (ONE_HOT, "dense", np.float64, "has datatype 'FP64'; expected FP32"),
        (ONE_HOT, "dense", np.int32, "has datatype 'INT32'; expected FP32"),
        (ONE_HOT, "sparse", np.float32, "has datatype 'FP32'; expected INT32 or INT64"),
        (ONE_HOT, "sparse", np.uint64, "has datatype 'UINT64'; expected INT32 or INT64"),
        (MULTI_HOT, "values", np.int16, "has datatype 'INT16'; expected INT32 or INT64"),
        (MULTI_HOT, "lengths", np.int64, "has datatype 'INT64'; expected INT32"),
    ],
)
def test_a_wrong_datatype_is_named(inputs: dict[str, np.ndarray], name: str, dtype: type[Any], expected: str):
    """Bytes of one type read as another are valid numbers, and wrong ones."""
    assert told(**inputs | {name: inputs[name].astype(dtype)}) == f"input '{name}' {expected}"


@pytest.mark.parametrize(
    ("inputs", "name", "array", "expected"),
    [
        (ONE_HOT, "dense", DENSE[0], "has shape [2]; expected [rows, 2]"),
        (ONE_HOT, "dense", DENSE.reshape(4, 1), "has shape [4, 1]; expected [rows, 2]"),
        (ONE_HOT, "dense", DENSE.reshape(1, 2, 2), "has shape [1, 2, 2]; expected [rows, 2]"),
        (ONE_HOT, "dense", DENSE[:0], "has 0 rows; expected at least 1"),
        (ONE_HOT, "sparse", SPARSE.T, "has shape [3, 2]; expected [2, 3] (rows of 'dense', tables)"),
        (ONE_HOT, "sparse", SPARSE[:1], "has shape [1, 3]; expected [2, 3] (rows of 'dense', tables)"),
        (ONE_HOT, "sparse", SPARSE.reshape(-1), "has shape [6]; expected [2, 3] (rows of 'dense', tables)"),
        (MULTI_HOT, "lengths", LENGTHS.reshape(-1), "has shape [6]; expected [2, 3] (rows of 'dense', tables)"),
        (MULTI_HOT, "values", VALUES.reshape(1, -1), "has shape [1, 7]; expected [ids]"),
    ],
)
def test_a_wrong_shape_is_told_with_the_right_one(
    inputs: dict[str, np.ndarray], name: str, array: np.ndarray, expected: str
):
    """Rows and tables are easily swapped; squares would not even be noticed further on."""
    assert told(**inputs | {name: array}) == f"input '{name}' {expected}"


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_dense_value_that_is_not_finite_is_named_by_position(value: float):
    """One NaN makes a score of NaN, and in a shared scale it would spoil its neighbours."""
    detail = told(dense=with_item(DENSE, (1, 0), value), sparse=SPARSE)
    assert detail == f"input 'dense' [1, 0] is {value}; expected a finite number"


@pytest.mark.parametrize("value", [3.4028235e38, -3.4028235e38, 1e-45, -0.0])
def test_the_ends_of_fp32_are_finite(value: float):
    """A sum or a square of them would not be, which is no reason to refuse them."""
    dense = with_item(with_item(DENSE, (0, 0), value), (0, 1), value)
    assert admit(dense=dense, sparse=SPARSE).dense == dense.tobytes()


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize(
    ("at", "found", "last"),
    [((0, 0), 7, 6), ((1, 1), 1, 0), ((1, 2), 30, 29), ((0, 2), -1, 29), ((0, 1), LARGE, 0), ((1, 0), -LARGE - 1, 6)],
)
def test_a_one_hot_id_outside_its_own_table_is_named(dtype: type[Any], at: tuple[int, int], found: int, last: int):
    """Tables differ in size: an id that another table has reads past the end of this one, on a GPU without a word."""
    detail = told(dense=DENSE, sparse=with_item(SPARSE.astype(dtype), at, found))
    row, table = at
    assert detail == f"input 'sparse' [{row}, {table}] is {found}; expected an id from 0 to {last} (table 't{table}')"


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize(
    ("at", "found", "table", "last"),
    [(0, 7, 0, 6), (1, -1, 0, 6), (2, 30, 2, 29), (3, 1, 1, 0), (4, 30, 2, 29), (6, LARGE, 2, 29)],
)
def test_a_multi_hot_id_outside_its_own_table_is_named(dtype: type[Any], at: int, found: int, table: int, last: int):
    """Which table an id belongs to follows from the lengths before it, empty bags included."""
    detail = told(dense=DENSE, values=with_item(VALUES.astype(dtype), at, found), lengths=LENGTHS)
    assert detail == f"input 'values' [{at}] is {found}; expected an id from 0 to {last} (table 't{table}')"


@pytest.mark.parametrize("found", [2**31, 2**32, 2**32 + 3, -(2**32), 2**63 - 1, -(2**63)])
def test_ids_that_only_look_right_in_32_bits_are_refused(found: int):
    """2**32 + 3 becomes 3 when it is cut to INT32: a valid id, of somebody else."""
    assert f"[0, 2] is {found};" in told(dense=DENSE, sparse=with_item(SPARSE, (0, 2), found))
    assert f"[2] is {found};" in told(dense=DENSE, values=with_item(VALUES, 2, found), lengths=LENGTHS)


def test_the_largest_table_takes_its_last_id():
    """Its number of rows is the last INT32, one below where a signed comparison breaks."""
    admission = Admission(spec(LARGE))
    for dtype in (np.int32, np.int64):
        sparse = np.array([[LARGE - 1], [0]], dtype)
        assert ids(admission.rows(request(dense=DENSE, sparse=sparse))) == [LARGE - 1, 0]
        with pytest.raises(Refused, match=rf"\[1, 0\] is {LARGE}; expected an id from 0 to {LARGE - 1}"):
            admission.rows(request(dense=DENSE, sparse=np.array([[0], [LARGE]], dtype)))


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        (with_item(LENGTHS, (1, 0), -1), "[1, 0] is -1; expected 0 or more"),
        ([[2, 0, 1], [-1, 2, 3]], "[1, 0] is -1; expected 0 or more"),
        ([[-(2**31), -(2**31), 7], [0, 0, 0]], "[0, 0] is -2147483648; expected 0 or more"),
        (with_item(LENGTHS, (0, 1), 1), "adds up to 8; 'values' has 7 ids"),
        (np.zeros((2, 3)), "adds up to 0; 'values' has 7 ids"),
        (np.full((2, 3), LARGE), f"adds up to {6 * LARGE}; 'values' has 7 ids"),
        ([[LARGE, LARGE, 9], [0, 0, 0]], f"adds up to {2 * LARGE + 9}; 'values' has 7 ids"),
    ],
    ids=["negative", "negative, sum right", "wraps to the right sum", "one too many", "none", "huge", "wraps to 7"],
)
def test_lengths_that_do_not_fit_the_values_are_refused(lengths: Any, expected: str):
    """Bags would begin in the middle of others; huge ones are refused before anything is laid out."""
    detail = told(dense=DENSE, values=VALUES, lengths=np.array(lengths).astype(np.int32))
    assert detail == f"input 'lengths' {expected}"


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("dense", (2, 2), "has 15 bytes; expected 16 for FP32 [2, 2]"),
        ("dense", (2**40, 2), f"has 15 bytes; expected {2**43} for FP32 [{2**40}, 2]"),
        ("sparse", (2, 3), "has 15 bytes; expected 24 for INT32 [2, 3]"),
    ],
)
def test_bytes_that_do_not_match_the_shape_are_refused(name: str, shape: tuple[int, ...], expected: str):
    """A shape is only a claim: nothing is allocated or read for it."""
    cut = Tensor(name, "FP32" if name == "dense" else "INT32", shape, memoryview(bytes(15)))
    assert told(**ONE_HOT | {name: cut}) == f"input '{name}' {expected}"


@st.composite
def tables_and_requests(draw: st.DrawFn) -> tuple[ModelSpec, InferRequest]:
    """Models with tables of different sizes, and requests of which most are right and some just wrong."""
    sizes = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4))
    rows = draw(st.integers(0, 5))
    dense = draw(arrays(np.float32, (rows, 2), elements=st.floats(-100, 100, width=32)))
    dtype = draw(st.sampled_from([np.int32, np.int64]))
    near = st.integers(-1, max(sizes)) if draw(st.booleans()) else st.integers(0, min(sizes) - 1)
    if draw(st.booleans()):
        sparse = draw(arrays(dtype, (rows, len(sizes)), elements=near))
        return spec(*sizes), request(dense=dense, sparse=sparse)
    lengths = draw(arrays(np.int32, (rows, len(sizes)), elements=st.integers(0, 3)))
    values = draw(arrays(dtype, int(lengths.sum()) + draw(st.sampled_from([0, 0, 0, 1])), elements=near))
    return spec(*sizes), request(dense=dense, values=values, lengths=lengths)


def passed(model: ModelSpec, asked: InferRequest) -> Rows | None:
    try:
        return Admission(model).rows(asked)
    except Refused as refused:
        assert refused.fault is Fault.INVALID_ARGUMENT
        return None


def test_bags_are_refused_where_what_computes_takes_none() -> None:
    """In a batch they would fail those who sent one id for each table."""
    admission = Admission(spec(*TABLES), multi_hot=False)
    one_hot = InferRequest("", (tensor("dense", DENSE), tensor("sparse", SPARSE)))
    assert admission.rows(one_hot).count == 2
    bags = InferRequest("", (tensor("dense", DENSE), tensor("values", VALUES), tensor("lengths", LENGTHS)))
    with pytest.raises(Refused) as refused:
        admission.rows(bags)
    assert refused.value.fault is Fault.UNIMPLEMENTED
    assert "send 'sparse'" in refused.value.detail


def ragged(rows: Rows, model: ModelSpec) -> RaggedBatch:
    lengths = None if rows.lengths is None else np.frombuffer(rows.lengths, np.int32).reshape(-1, model.n_sparse)
    return RaggedBatch(np.frombuffer(rows.dense, np.float32).reshape(rows.count, -1),
                       np.frombuffer(rows.ids, np.int32), lengths)  # fmt: skip


def is_right(model: ModelSpec, asked: InferRequest) -> bool:
    """The contract once more, an id at a time."""
    inputs = {t.name: codec.array(t) for t in asked.inputs}
    sizes = [table.rows for table in model.tables]
    if len(inputs["dense"]) == 0:
        return False
    if "sparse" in inputs:
        return all(0 <= i < n for row in inputs["sparse"].tolist() for i, n in zip(row, sizes, strict=True))
    owners = [
        n for row in inputs["lengths"].tolist() for length, n in zip(row, sizes, strict=True) for _ in range(length)
    ]
    values = inputs["values"].tolist()
    return len(values) == len(owners) and all(0 <= i < n for i, n in zip(values, owners, strict=True))


@given(case=tables_and_requests())
def test_exactly_the_right_requests_pass(case: tuple[ModelSpec, InferRequest]):
    """The shortcuts of the checks agree with the contract read word for word."""
    model, asked = case
    assert (passed(model, asked) is not None) is is_right(model, asked)


@settings(max_examples=50)
@given(case=tables_and_requests())
def test_whatever_passes_is_scored(case: tuple[ModelSpec, InferRequest]):
    """A request that passes and then breaks the forward pass takes its whole batch with it."""
    model, asked = case
    rows = passed(model, asked)
    assume(rows is not None)
    assert rows is not None
    scores = np.full(rows.count, np.nan, np.float32)
    Reference(random_model(model, seed=0)).run(ragged(rows, model), scores)
    assert np.isfinite(scores).all()


@pytest.mark.parametrize("spelling", list(Spelling), ids=lambda spelling: spelling.value)
@pytest.mark.parametrize("make", [lambda: request(**ONE_HOT), lambda: request(**MULTI_HOT)], ids=["one", "multi"])
def test_both_spellings_become_the_same_rows(spelling: Spelling, make: Callable[[], InferRequest]):
    """Tensors in a message lie at any address; the rows must not depend on it."""
    asked = make()
    for id_of_other_length in ("", "a", "ab", "abc"):
        sent = InferRequest(id_of_other_length, asked.inputs)
        received = codec.decode_request(codec.encode_request(sent, spelling))
        assert ADMISSION.rows(received) == ADMISSION.rows(asked)


def test_names_in_errors_are_quoted_safely():
    """They come from the caller and go into headers and logs."""
    detail = told(**{"dense": DENSE, "a\r\nb": SPARSE})
    assert re.search(r"'a\\r\\nb'", detail)
