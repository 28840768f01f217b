"""Anybody may publish anything. It costs about its own size, and one polite answer."""

import contextlib
import tracemalloc

import msgspec
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from narsil_stream.schemas import codec
from narsil_stream.schemas.codec import Spelling
from narsil_stream.schemas.errors import DETAIL_CHARS, Fault, Refused
from narsil_stream.schemas.wire import InferRequest

DEEP = 200_000
REQUEST = InferRequest(
    "id",
    (
        codec.tensor("dense", np.array([[0.5, -0.0], [1e-45, 3e38]], np.float32)),
        codec.tensor("values", np.array([1, 2**40, 3], np.int64)),
        codec.tensor("lengths", np.array([[1, 0], [2, 0]], np.int32)),
    ),
    budget_us=50_000,
    sent_us=1_700_000_000_000_000,
    priority=3,
    traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
)
VALID = [codec.encode_request(REQUEST, spelling) for spelling in Spelling]


def read(payload: bytes) -> InferRequest | None:
    """The request, or None when it was refused as the contract says. Anything else that is raised fails the test."""
    try:
        request = codec.decode_request(payload)
        for tensor in request.inputs:
            codec.array(tensor)
    except Refused as refused:
        assert refused.fault is Fault.INVALID_ARGUMENT
        assert refused.detail.isprintable()
        assert len(refused.detail) <= DETAIL_CHARS + len("...")
        return None
    return request


def json_tensor(shape: str = "[1]", data: str = "[1]", name: str = "x", datatype: str = "FP32") -> bytes:
    inputs = f'{{"name": "{name}", "shape": {shape}, "datatype": "{datatype}", "data": {data}}}'
    return f'{{"inputs": [{inputs}]}}'.encode()


def json_field(field: str) -> bytes:
    return f'{{"inputs": [], {field}}}'.encode()


def packed_tensor(shape: list[int], data: bytes = bytes(4), name: object = "x", datatype: object = "FP32") -> bytes:
    return msgspec.msgpack.encode(["", [[name, datatype, shape, data]]])


HOSTILE = {
    "nothing": b"",
    "one byte": b"\xc1",
    "utf-16": '{"inputs": []}'.encode("utf-16"),
    "a byte order mark": b"\xef\xbb\xbf" + b'{"inputs": []}',
    "a list": b"[]",
    "two requests": b'{"inputs": []}{"inputs": []}',
    "json: shape of 2**40": json_tensor(shape=f"[{2**40}]"),
    "json: shape whose product wraps to 1": json_tensor(shape=f"[{2**32}, {2**32}, 1]"),
    "json: shape of nothing, times 2**106": json_tensor(shape=f"[0, {2**53}, {2**53}]", data="[]"),
    "json: shape of 2**64": json_tensor(shape=f"[{2**64}]"),
    "json: negative shape": json_tensor(shape="[-1]"),
    "json: deep data": json_tensor(data="[" * DEEP),
    "json: deep data, closed": json_tensor(data="[" * DEEP + "]" * DEEP),
    "json: deep unknown field": json_field(f'"x": {"[" * DEEP}'),
    "json: deep objects": json_field(f'"x": {"{" * DEEP}'.replace("{", '{"a":')),
    "json: deep parameters": json_field(f'"outputs": [{{"name": "scores", "parameters": {{"a": {"[" * DEEP}'),
    "json: integer of 100,000 digits": json_tensor(data=f"[{'9' * 100_000}]", datatype="INT64"),
    "json: float of 100,000 digits": json_tensor(data=f"[{'9' * 100_000}]"),
    "json: timeout of 5,000 digits": json_field(f'"parameters": {{"timeout": {"9" * 5_000}}}'),
    "json: exponent out of reach": json_tensor(data="[1e999999999]"),
    "json: NaN": json_tensor(data="[NaN]"),
    "json: Infinity": json_tensor(data="[-Infinity]"),
    "json: id beyond int64": json_tensor(data=f"[{2**63}]", datatype="INT64"),
    "json: invalid UTF-8": b'{"inputs": [], "id": "\xff"}',
    "json: lone surrogate, escaped": json_field(r'"id": "\ud800"'),
    "json: lone surrogate, encoded": b'{"inputs": [], "id": "\xed\xa0\x80"}',
    "json: line feeds in a name": json_tensor(shape="[2]", name=r"x\r\nEvil: header\r\n"),
    "json: line feeds in a datatype": json_tensor(datatype=r"a\r\nb"),
    "json: a long name": json_tensor(shape="[2]", name="n" * 100_000),
    "json: a long datatype": json_tensor(datatype="D" * 100_000),
    "json: a long id": json_field(f'"id": "{"i" * 257}"'),
    "json: 65 inputs": b'{"inputs": [' + b",".join([json_tensor()[12:-2]] * 65) + b"]}",
    "json: many empty lists": json_tensor(shape="[100000, 0]", data="[" + ",".join(["[]"] * 99_999) + "]"),
    "msgpack: shape of 2**40": packed_tensor([2**40]),
    "msgpack: shape whose product wraps to 1": packed_tensor([2**32, 2**32]),
    "msgpack: shape of nothing, times 2**106": packed_tensor([0, 2**53, 2**53], b""),
    "msgpack: 9 dimensions": packed_tensor([1] * 9),
    "msgpack: name that is a number": packed_tensor([1], name=1),
    "msgpack: data that is text": msgspec.msgpack.encode(["", [["x", "FP32", [1], "abcd"]]]),
    "msgpack: unknown datatype": packed_tensor([1], datatype="BYTES"),
    "msgpack: line feeds in a name": packed_tensor([2], name="x\r\nEvil: header\r\n"),
    "msgpack: a long name": packed_tensor([2], name="n" * 100_000),
    "msgpack: 2**32 - 1 fields": b"\xdd\xff\xff\xff\xff\xa0\x90",
    "msgpack: 2**32 - 1 inputs": b"\x92\xa0\xdd\xff\xff\xff\xff",
    "msgpack: 2**32 - 1 dimensions": b"\x92\xa0\x91\x94\xa1x\xa4FP32\xdd\xff\xff\xff\xff",
    "msgpack: text of 2**32 - 1 bytes": b"\x92\xdb\xff\xff\xff\xff",
    "msgpack: data of 2**32 - 1 bytes": b"\x92\xa0\x91\x94\xa1x\xa4FP32\x91\x01\xc6\xff\xff\xff\xff",
    "msgpack: a map": b"\x81\xa1a\x01",
    "msgpack: deep unknown field": b"\x97\xa0\x90\x00\x00\x00\xa0" + b"\x91" * DEEP + b"\xc0",
    "msgpack: deep unknown maps": b"\x97\xa0\x90\x00\x00\x00\xa0" + b"\x81\x01" * DEEP + b"\xc0",
    "msgpack: invalid UTF-8": b"\x92\xa2\xff\xfe\x90",
    "msgpack: encoded surrogate": b"\x92\xa3\xed\xa0\x80\x90",
    "msgpack: bytes after the end": b"\x92\xa0\x90\x00",
    "msgpack: priority 256": msgspec.msgpack.encode(["", [], 0, 0, 256]),
    "msgpack: negative budget": msgspec.msgpack.encode(["", [], -1]),
}


@pytest.mark.parametrize("payload", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_request_is_refused_at_about_its_own_cost(payload: bytes):
    """Another exception ends the batcher's turn; memory that the sender only names ends the process."""
    tracemalloc.start()
    try:
        assert read(payload) is None
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 40 * len(payload) + 100_000


@given(payload=st.binary(max_size=200))
def test_random_bytes_are_refused_or_read(payload: bytes):
    """A foreign protocol on the subject is a nuisance, not an outage."""
    read(payload)


@given(start=st.sampled_from([b"\x92", b"\x96", b"\x97", b"\xdc", b"\xdd", b'{"inputs":[', b"{"]), rest=st.binary())
def test_random_bytes_after_a_good_start_are_refused_or_read(start: bytes, rest: bytes):
    """The first byte only says which decoder to trust with the rest."""
    read(start + rest)


@pytest.mark.parametrize("whole", VALID, ids=[spelling.value for spelling in Spelling])
def test_a_request_cut_anywhere_is_refused(whole: bytes):
    """Half a request must not be scored as a smaller one."""
    assert read(whole) == REQUEST
    assert [cut for cut in range(len(whole)) if read(whole[:cut]) is not None] == []


@pytest.mark.parametrize("whole", VALID, ids=[spelling.value for spelling in Spelling])
def test_a_request_with_any_bit_flipped_is_refused_or_read(whole: bytes):
    """Each byte of a valid request is reached, with every wrong value that one bit makes of it."""
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        read(bytes(damaged))


@pytest.mark.parametrize("whole", VALID, ids=[spelling.value for spelling in Spelling])
@given(data=st.data())
def test_a_request_with_bytes_replaced_is_refused_or_read(whole: bytes, data: st.DataObject):
    """Several wrong places at once, lengths that move included."""
    start, stop = sorted(data.draw(st.tuples(st.integers(0, len(whole)), st.integers(0, len(whole)))))
    read(whole[:start] + data.draw(st.binary(max_size=20)) + whole[stop:])


def test_the_last_of_duplicate_keys_counts():
    """As in most JSON decoders; what matters is that every hop takes the same one."""
    request = codec.decode_request(b'{"inputs": [], "id": "first", "id": "last", "inputs": []}')
    assert request == InferRequest("last", ())


@given(payload=st.binary(max_size=100))
@example(b'{"model_name":"","model_version":"","outputs":[{"name":"x","datatype":"Z","shape":[1],"data":[1]}]}')
@example(b'{"model_name":"","model_version":"","outputs":[{"name":"x","datatype":"INT8","shape":[1],"data":[900]}]}')
@example(b'{"x":' + b"[" * DEEP)
@example(b"\x92\xa0\xdd\xff\xff\xff\xff")
@example(b"\x92\xa2\xff\xfe\x90")
def test_a_client_gets_one_kind_of_exception_for_an_answer_that_is_none(payload: bytes):
    """A client that guards against `MsgspecError` must not die of a Unicode error."""
    with contextlib.suppress(msgspec.MsgspecError):
        codec.decode_answer(payload)
