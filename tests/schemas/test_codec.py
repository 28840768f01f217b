"""Both spellings carry the same content, and carry it whole."""

import json
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from narsil_stream.schemas import codec
from narsil_stream.schemas.codec import Spelling
from narsil_stream.schemas.errors import Fault, Refused
from narsil_stream.schemas.wire import InferAnswer, InferRequest, Tensor
from tests.schemas.strategies import failed, id_arrays, id_types, requests, scored

both = pytest.mark.parametrize("spelling", list(Spelling), ids=lambda spelling: spelling.value)


def oip(datatype: str, shape: list[int], data: object, **more: object) -> bytes:
    """A request with one input, as a person would type it."""
    tensor = {"name": "x", "shape": shape, "datatype": datatype, "data": data}
    return json.dumps({"inputs": [tensor], **more}).encode()


def only_array(payload: bytes) -> np.ndarray:
    (tensor,) = codec.decode_request(payload).inputs
    return codec.array(tensor)


@both
@given(request=requests)
def test_a_request_comes_out_as_it_went_in(spelling: Spelling, request: InferRequest):
    """A score would depend on the spelling, or on which hop decoded the request. Tensors are compared as bytes."""
    payload = codec.encode_request(request, spelling)
    assert codec.spelling_of(payload) is spelling
    assert codec.decode_request(payload) == request


@both
@given(answer=scored | failed)
def test_an_answer_comes_out_as_it_went_in(spelling: Spelling, answer: InferAnswer):
    """A client would read another score than the model gave, or retry what cannot succeed."""
    payload = codec.encode_answer(answer, spelling)
    assert codec.spelling_of(payload) is spelling
    assert codec.decode_answer(payload) == answer


@given(bits=arrays(np.uint32, st.integers(0, 8)))
def test_msgpack_keeps_every_bit(bits: np.ndarray):
    """Raw bytes are never interpreted on the way: even what is not a number arrives, to be refused by position."""
    request = InferRequest("", (codec.tensor("x", bits.view(np.float32)),))
    decoded = only_array(codec.encode_request(request, Spelling.MSGPACK))
    np.testing.assert_array_equal(decoded.view(np.uint32), bits)


@given(data=st.data(), shape=st.lists(st.integers(0, 3), min_size=1, max_size=8).map(tuple), dtype=id_types)
def test_json_data_may_be_nested_as_its_shape_says(data: st.DataObject, shape: tuple[int, ...], dtype: type[Any]):
    """The Open Inference Protocol allows both; most libraries nest."""
    values = data.draw(id_arrays(dtype, shape))
    name = codec.tensor("x", values).dtype
    nested = codec.decode_request(oip(name, list(shape), values.tolist()))
    assert nested == codec.decode_request(oip(name, list(shape), values.reshape(-1).tolist()))
    assert nested.inputs == (codec.tensor("x", values),)


def ends(dtype: np.dtype[Any]) -> list[Any]:
    if dtype.kind == "b":
        return [False, True]
    if dtype.kind == "f":
        info = np.finfo(dtype)
        return [info.min, info.max, info.tiny, info.smallest_subnormal, -0.0]
    return [np.iinfo(dtype).min, np.iinfo(dtype).max]


@both
@pytest.mark.parametrize("name", codec.DTYPES)
def test_the_ends_of_every_datatype_survive(name: str, spelling: Spelling):
    """Off by one at an end is where integers and floats are lost."""
    given_array = np.array(ends(codec.DTYPES[name]), codec.DTYPES[name])
    request = InferRequest("", (codec.tensor("x", given_array),))
    decoded = only_array(codec.encode_request(request, spelling))
    assert decoded.dtype == given_array.dtype
    assert decoded.tobytes() == given_array.tobytes()


@pytest.mark.parametrize("name", sorted(set(codec.DTYPES) - {"BOOL", "FP64", "UINT64", "INT64"}))
def test_a_number_that_its_datatype_cannot_hold_is_named_by_position(name: str):
    """Wrapped to another id or to infinity, it would be scored."""
    largest = ends(codec.DTYPES[name])[1]
    too_large = float(largest) * 1.01 if name.startswith("F") else int(largest) + 1
    with pytest.raises(Refused, match=rf"input 'x' data\[1\] is .*; expected {name}"):
        codec.decode_request(oip(name, [2], [0, too_large]))


def test_a_request_typed_by_hand_is_understood():
    """`nats req` from a shell is the first thing that anybody tries: what is not needed may be left out."""
    payload = b"""
      {"id": "42", "model_name": "ignored", "inputs": [
        {"name": "dense", "datatype": "FP32", "shape": [2, 2], "data": [[1, 0.5], [-2e1, 0]], "parameters": {"a": []}},
        {"data": [3, 4], "shape": [2, 1], "datatype": "INT64", "name": "sparse"}],
       "parameters": {"timeout": 5000, "priority": 1, "sequence_id": 7},
       "outputs": [{"name": "scores", "parameters": {"binary_data": false}}]}
    """
    request = codec.decode_request(payload)
    assert (request.id, request.budget_us, request.priority, request.sent_us) == ("42", 5000, 1, 0)
    dense, sparse = map(codec.array, request.inputs)
    np.testing.assert_array_equal(dense, np.array([[1, 0.5], [-20, 0]], np.float32))
    np.testing.assert_array_equal(sparse, np.array([[3], [4]], np.int64))


def test_the_shortest_request_means_the_defaults():
    """Fields only grow at the end: what an old or a lazy client sends is whole."""
    assert codec.decode_request(b'{"inputs":[]}') == InferRequest("", ())
    assert codec.decode_request(msgspec.msgpack.encode(["", []])) == InferRequest("", ())


def test_only_scores_can_be_asked_for():
    """An output that was asked for and silently left out looks like a broken model."""
    with pytest.raises(Refused, match="unknown output 'probability'; expected 'scores'"):
        codec.decode_request(b'{"inputs": [], "outputs": [{"name": "probability"}]}')


@pytest.mark.parametrize(
    ("shape", "data", "told"),
    [
        ([2, 2], [[1, 2], [3]], "nested with 1 or 2 items in dimension 1"),
        ([2, 2], [[1, 2, 3, 4]], "nested with 1 items in dimension 0"),
        ([4], [[1, 2], [3, 4]], "nested with 2 items in dimension 0"),
        ([2, 2], [[1, 2], 3], "nested unevenly"),
        ([2], [1, [2]], r"data\[1\] is a list; expected FP32"),
        ([2, 1], [[1], [[2]]], r"data\[1\] is a list; expected FP32"),
        ([1], [True], r"got `bool` - at `\$.inputs\[0\].data\[0\]`"),
        ([1], ["1"], r"got `str` - at `\$.inputs\[0\].data\[0\]`"),
        ([1], None, "got `null`"),
        ([1] * 9, [1], "length <= 8"),
        ([-1], [], ">= 0"),
    ],
)
def test_json_data_that_contradicts_itself_is_refused_with_the_place(shape: list[int], data: object, told: str):
    """Guessed into shape, one row's numbers would be another's."""
    with pytest.raises(Refused, match=told) as refused:
        codec.decode_request(oip("FP32", shape, data))
    assert refused.value.fault is Fault.INVALID_ARGUMENT


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_a_number_cannot_be_said_in_json(value: float):
    """JSON has no word for it; the gateway must not invent one. Our encoder writes null, which no decoder takes."""
    request = InferRequest("", (codec.tensor("x", np.array([value], np.float32)),))
    with pytest.raises(Refused, match="got `null`"):
        codec.decode_request(codec.encode_request(request, Spelling.JSON))


@pytest.mark.parametrize(
    "make",
    [
        lambda a: a.astype(">f4"),
        lambda a: np.asfortranarray(a),
        lambda a: np.repeat(a, 2, axis=1)[:, ::2],
        lambda a: a[::-1][::-1],
    ],
    ids=["big-endian", "column-major", "strided", "reversed twice"],
)
def test_an_array_of_any_layout_is_sent_in_c_order_little_endian(make: Callable[[np.ndarray], np.ndarray]):
    """Bytes in memory order would be a transposed request that nobody notices."""
    plain = np.arange(6, dtype="<f4").reshape(2, 3)
    assert codec.tensor("x", make(plain)) == codec.tensor("x", plain)


@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (2, 0), (1, 1, 1)])
def test_a_tensor_keeps_its_shape(shape: tuple[int, ...]):
    """NumPy likes to turn a single number into a list, and nothing into less."""
    tensor = codec.tensor("x", np.zeros(shape, np.float32))
    assert tensor.shape == shape
    assert codec.array(tensor).shape == shape


def test_tensors_are_read_in_place():
    """A copy for each hop is what raw bytes are there to avoid; a view that can be written would change a message."""
    payload = codec.encode_request(InferRequest("", (codec.tensor("x", np.arange(4)),)), Spelling.MSGPACK)
    view = only_array(payload)
    assert np.shares_memory(view, np.frombuffer(payload, np.uint8))
    assert not view.flags.writeable


@pytest.mark.parametrize("dtype", ["U1", "O", "c16", "M8[s]"])
def test_an_array_without_a_wire_datatype_is_refused(dtype: str):
    """Its bytes would mean nothing to the other side."""
    with pytest.raises(Refused, match="tensor 'x' has dtype"):
        codec.tensor("x", np.zeros(1, dtype))


@pytest.mark.parametrize(
    ("datatype", "shape", "told"),
    [
        ("FP32", (3,), "has 8 bytes; expected 12 for FP32"),
        ("FP32", (2**53, 2**53), "has 8 bytes; expected"),
        ("FP32", (-1, -2), "too large"),
        ("STRING", (8,), "datatype 'STRING'; expected one of BOOL"),
    ],
)
def test_bytes_that_do_not_match_the_shape_are_refused(datatype: str, shape: tuple[int, ...], told: str):
    """Read past its end, a tensor would be another caller's rows."""
    with pytest.raises(Refused, match=told):
        codec.array(Tensor("x", datatype, shape, memoryview(bytes(8))))


def test_a_tensor_of_nothing_may_still_claim_an_impossible_shape():
    """0 x 2**53 x 2**53 elements are no bytes, which match; that NumPy cannot hold such a shape must crash nobody."""
    with pytest.raises(Refused, match="too large"):
        codec.array(Tensor("x", "FP32", (0, 2**53, 2**53), memoryview(b"")))


def test_an_error_of_a_newer_server_is_still_an_error():
    """A fault that this client does not know must not read as success, nor crash it."""
    refused = codec.refusal(InferAnswer("", fault="FROM_THE_FUTURE", detail="why", retry_after_us=7))
    assert (refused.fault, refused.detail, refused.retry_after_us) == (Fault.INTERNAL, "why", 7)


def test_an_error_in_json_without_a_code_is_internal():
    """Other servers of the Open Inference Protocol answer only `error`."""
    assert codec.decode_answer(b'{"error": "no"}') == InferAnswer("", fault="INTERNAL", detail="no")
