"""Messages to the gRPC gateway that are wrong: each is answered by the table's error, and harms nobody else."""

import gzip
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from narsil_stream.core.config import Config, GrpcConfig
from narsil_stream.gateways.grpc_codec import InferRequestMessage, parsed, to_request
from narsil_stream.schemas import codec
from narsil_stream.schemas.errors import Fault, Refused
from narsil_stream.schemas.protobuf import SERVICE
from narsil_stream.schemas.wire import InferRequest, Tensor
from tests.asking import Rows, some_rows
from tests.gateways.calling import GrpcCaller, close, infer_message
from tests.support import NatsServer, System

LIMIT = 64 << 10
"""Of one message in these tests, bytes."""
SECOND_US = 1_000_000


@pytest.fixture(scope="module")
def system(criteo_model: Path) -> Iterator[System]:
    config = replace(Config(), grpc=GrpcConfig(max_message_bytes=LIMIT))
    with NatsServer() as server, System(server.url, criteo_model, config=config, grpc_gateways=1) as running:
        yield running


@pytest.fixture(scope="module")
def call(system: System) -> Iterator[GrpcCaller]:
    with GrpcCaller(system.grpc_port) as caller:
        yield caller


@pytest.fixture(scope="module")
def rows(criteo_model: Path) -> Rows:
    return some_rows(criteo_model, 2)


def tensor(at: int, **fields: Any) -> Callable[[Any], None]:
    """Changes fields of an input. `raw` is its raw content."""

    def change(message: Any) -> None:
        one = message.inputs[at]
        for name, value in fields.items():
            if name == "raw":
                message.raw_input_contents[at] = value
            elif name == "shape":
                one.shape[:] = value
            else:
                setattr(one, name, value)

    return change


def contents(at: int, **fields: list[Any]) -> Callable[[Any], None]:
    """Gives an input typed contents."""

    def change(message: Any) -> None:
        for name, values in fields.items():
            getattr(message.inputs[at].contents, name).extend(values)

    return change


def parameter(name: str, **value: Any) -> Callable[[Any], None]:
    def change(message: Any) -> None:
        chosen = message.parameters[name]
        for field, number in value.items():
            setattr(chosen, field, number)

    return change


def clear_raw(message: Any) -> None:
    del message.raw_input_contents[:]


def both(*changes: Callable[[Any], None]) -> Callable[[Any], None]:
    def change(message: Any) -> None:
        for one in changes:
            one(message)

    return change


def output(name: str, **parameters: Any) -> Callable[[Any], None]:
    def change(message: Any) -> None:
        wish = message.outputs.add(name=name)
        for key, value in parameters.items():
            wish.parameters[key].int64_param = value

    return change


def shared_memory(message: Any) -> None:
    message.inputs[0].parameters["shared_memory_region"].string_param = "region"


def many_inputs(message: Any) -> None:
    for _ in range(63):
        message.inputs.add(name="x", datatype="FP32", shape=[0])
        message.raw_input_contents.append(b"")


FLOATS = struct.pack("<26f", *[0.5] * 26)
WRONG_RAW: list[tuple[Callable[[Any], None], str]] = [
    (tensor(0, raw=FLOATS[:-1]), "'dense' has 103 bytes; expected 104 for FP32 [2, 13]"),
    (tensor(0, raw=FLOATS + b"\0"), "'dense' has 105 bytes; expected 104"),
    (tensor(0, raw=b""), "'dense' has 0 bytes; expected 104"),
    (tensor(0, shape=[2, 12]), "'dense' has 104 bytes; expected 96"),
    (tensor(0, shape=[2, 12], raw=FLOATS[:96]), "'dense' has shape [2, 12]; expected [rows, 13]"),
    (tensor(0, shape=[26]), "'dense' has shape [26]; expected [rows, 13]"),
    (tensor(0, shape=[0, 13], raw=b""), "'dense' has 0 rows"),
    (tensor(0, shape=[2**40, 2**40]), "'dense' has 104 bytes; expected 4835703278458516698824704"),
    (tensor(0, shape=[2**62]), "'dense' has shape [4611686018427387904]; expected dimensions from 0 to"),
    (tensor(0, shape=[0, 2**53, 2**53], raw=b""), "'dense' has shape [0, 9007199254740992, 9007199254740992], which"),
    (tensor(0, shape=[-1, 13]), "'dense' has shape [-1, 13]; expected dimensions from 0 to"),
    (tensor(0, shape=[1] * 9), "'dense' has 9 dimensions; expected at most 8"),
    (tensor(0, shape=[]), "'dense' has 104 bytes; expected 4 for FP32 []"),
    (tensor(0, datatype="FP31"), "'dense' has datatype 'FP31'; expected one of BOOL"),
    (tensor(0, datatype=""), "'dense' has datatype ''; expected one of BOOL"),
    (tensor(0, datatype="BYTES"), "'dense' has datatype 'BYTES'; expected one of BOOL"),
    (tensor(0, datatype="INT32"), "'dense' has datatype 'INT32'; expected FP32"),
    (tensor(0, raw=struct.pack("<26f", *[float("nan")] * 26)), "'dense' [0, 0] is nan"),
    (tensor(0, datatype="FP64", raw=struct.pack("<26d", *[1e300] * 26)), "'dense' [0, 0] is 1e+300"),
    (tensor(1, shape=[1, 52]), "'sparse' has shape [1, 52]; expected [2, 26]"),
    (tensor(1, raw=struct.pack("<52q", *[0] * 27, 1000, *[0] * 24)), "'sparse' [1, 1] is 1000; expected an id from 0"),
    (tensor(1, raw=struct.pack("<52q", *[-1] * 52)), "'sparse' [0, 0] is -1"),
    (tensor(1, name="dense"), "given twice"),
    (tensor(1, name="ids"), "inputs are 'dense', 'ids'; expected"),
    (lambda message: message.raw_input_contents.pop(), "raw_input_contents has 1 tensors; expected 2"),
    (lambda message: message.raw_input_contents.append(b""), "raw_input_contents has 3 tensors; expected 2"),
    (lambda message: message.inputs.pop(), "raw_input_contents has 2 tensors; expected 1"),
    (contents(1, int64_contents=[1]), "'sparse' has contents although raw_input_contents are given"),
    (clear_raw, "'dense' has 0 bytes; expected 104"),
    (lambda message: message.ClearField("inputs"), "raw_input_contents has 2 tensors; expected 0"),
    (both(clear_raw, lambda message: message.ClearField("inputs")), "expected 'dense'"),
    (many_inputs, "65 inputs; expected at most 64"),
    (shared_memory, "'dense' is in shared memory"),
    (output("logits"), "unknown output 'logits'; expected 'scores'"),
    (output("scores", classification=3), "classification"),
    (output("scores", shared_memory_region=1), "shared memory"),
    (both(*[output("scores")] * 65), "65 outputs are asked for; expected at most 64"),
    (parameter("timeout", int64_param=-1), "parameter 'timeout' is -1; expected"),
    (parameter("timeout", uint64_param=2**63), "parameter 'timeout' is 9223372036854775808; expected"),
    (parameter("timeout", string_param="1 s"), "parameter 'timeout' is given as string_param; expected int64_param"),
    (parameter("timeout"), "parameter 'timeout' is given as nothing"),
    (parameter("priority", uint64_param=256), "parameter 'priority' is 256; expected"),
    (parameter("priority", bool_param=True), "parameter 'priority' is given as bool_param"),
    (lambda message: setattr(message, "id", "x" * 257), "the request's id has 257 characters; expected at most 256"),
]
WRONG_TYPED: list[tuple[Callable[[Any], None], str]] = [
    (contents(0, fp32_contents=[0.5]), "'dense' has 108 bytes; expected 104"),
    (contents(0, fp64_contents=[0.5]), "'dense' has fp64_contents; expected fp32_contents for FP32"),
    (contents(1, int_contents=[1]), "'sparse' has int_contents; expected int64_contents for INT64"),
    (contents(1, bytes_contents=[b"x"]), "'sparse' has bytes_contents; expected int64_contents"),
    (tensor(0, datatype="FP16"), "'dense' has contents of datatype 'FP16'; FP16 has no typed contents, send it raw"),
    (tensor(0, datatype="BYTES"), "'dense' has contents of datatype 'BYTES'; expected BOOL"),
    (tensor(0, datatype="fp32"), "'dense' has contents of datatype 'fp32'; expected BOOL"),
    (lambda message: message.inputs[0].ClearField("contents"), "'dense' has 0 bytes; expected 104"),
    (lambda message: message.raw_input_contents.append(b""), "raw_input_contents has 1 tensors; expected 2"),
    (both(tensor(1, datatype="INT8"), lambda m: m.inputs[1].ClearField("contents"), contents(1, int_contents=[1, 128])),
     "'sparse' contents[1] is 128; expected INT8"),
    (both(tensor(1, datatype="UINT16"), lambda m: m.inputs[1].ClearField("contents"),
          contents(1, uint_contents=[65_536])), "'sparse' contents[0] is 65536; expected UINT16"),
]  # fmt: skip
WRONG = [(False, *case) for case in WRONG_RAW] + [(True, *case) for case in WRONG_TYPED]


@pytest.mark.parametrize(
    ("typed", "change", "told"), WRONG, ids=[f"{'typed' if typed else 'raw'}: {told}" for typed, _, told in WRONG]
)
def test_a_wrong_message_is_answered_with_what_was_found_and_what_was_expected(
    call: GrpcCaller, rows: Rows, typed: bool, change: Callable[[Any], None], told: str
) -> None:
    """ "Bad request" alone costs somebody an afternoon. The next good request on the connection is answered."""
    message = infer_message(rows, typed=typed)
    change(message)
    answer = call("ModelInfer", message)
    assert answer.code is grpc.StatusCode.INVALID_ARGUMENT
    assert told in answer.detail
    assert len(answer.detail) < 600
    assert close(call("ModelInfer", infer_message(rows, typed=typed)).scores, rows)


GARBAGE = {
    "ones": b"\xff" * 50,
    "a text": b"GET / HTTP/1.1\r\n\r\n",
    "a length beyond the end": b"\x0a\xff\xff\xff\x07ctr",
    "a varint without an end": b"\x08" + b"\x80" * 30,
    "a group without an end": b"\x0b\x0b\x0b",
    "a name that is not UTF-8": b"\x0a\x02\xc3\x28",
    "deep nesting": b"\x0b" * 5_000,
}


@pytest.mark.parametrize("verb", ["ModelInfer", "ModelMetadata", "ModelReady", "RepositoryModelLoad"])
@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE)
def test_bytes_that_are_no_message_are_the_callers_fault(call: GrpcCaller, rows: Rows, verb: str, data: bytes) -> None:
    """gRPC's own answer would be INTERNAL or UNKNOWN, which says that we are broken."""
    answer = call(verb, data)
    assert answer.code is grpc.StatusCode.INVALID_ARGUMENT
    assert "not a protobuf message of the type" in answer.detail
    assert close(call("ModelInfer", infer_message(rows)).scores, rows)


def test_an_empty_message_is_a_request_for_no_model(call: GrpcCaller) -> None:
    """In protobuf no bytes are a message, whose fields are all empty."""
    assert call("ModelInfer", b"").code is grpc.StatusCode.NOT_FOUND


def test_a_verb_of_another_protocol_is_unimplemented(call: GrpcCaller) -> None:
    """Whoever has another version of the protocol shall know it."""
    assert call("ModelExplain", b"").code is grpc.StatusCode.UNIMPLEMENTED
    path = call.channel.unary_unary("/tensorflow.serving.PredictionService/Predict").future(b"")
    assert path.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("size", [LIMIT + 1, 50 * LIMIT])
def test_a_message_above_the_limit_is_refused(call: GrpcCaller, rows: Rows, size: int) -> None:
    """One that is read to its end would fill the memory."""
    answer = call("ModelInfer", b" " * size)
    assert answer.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert str(LIMIT) in answer.detail
    assert close(call("ModelInfer", infer_message(rows)).scores, rows)


def test_a_message_just_within_the_limit_is_read(call: GrpcCaller) -> None:
    """The limit is the one that is documented: bytes beyond it never get as far as this error."""
    assert call("ModelInfer", b"\xff" * LIMIT).code is grpc.StatusCode.INVALID_ARGUMENT


def test_a_small_message_that_inflates_above_the_limit_is_refused(call: GrpcCaller, rows: Rows) -> None:
    """A thousand times as much memory as bytes on the wire."""
    bomb = b"\0" * (2_000 * LIMIT)
    assert len(gzip.compress(bomb)) < 4 * LIMIT
    answer = call("ModelInfer", bomb, compression=grpc.Compression.Gzip)
    assert answer.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    packed = call("ModelInfer", infer_message(rows), compression=grpc.Compression.Gzip)
    assert close(packed.scores, rows)


# The decoder by itself


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_are_a_request_or_refused(data: bytes) -> None:
    """Nothing else may come out of a decoder that anybody can reach."""
    try:
        request = to_request(parsed(InferRequestMessage, data), None, SECOND_US)
    except Refused as refused:
        assert refused.fault is Fault.INVALID_ARGUMENT
    else:
        assert isinstance(request, InferRequest)


def texts() -> st.SearchStrategy[str]:
    return st.sampled_from(["", "dense", "FP32", "INT64", "BOOL", "FP16", "INT8", "é\0"]) | st.text(max_size=5)


@st.composite
def messages(draw: st.DrawFn) -> Any:
    """Messages that are well formed but for what they say."""
    message = InferRequestMessage(model_name=draw(texts()), id=draw(texts()))
    for _ in range(draw(st.integers(0, 3))):
        one = message.inputs.add(name=draw(texts()), datatype=draw(texts()))
        one.shape.extend(draw(st.lists(st.integers(-1, 4) | st.integers(-(2**63), 2**63 - 1), max_size=3)))
        kind = draw(st.sampled_from(["", "fp32_contents", "int64_contents", "int_contents", "bool_contents"]))
        if kind:
            getattr(one.contents, kind).extend(draw(st.lists(st.integers(0, 1), max_size=4)))
    message.raw_input_contents.extend(draw(st.lists(st.binary(max_size=16), max_size=3)))
    return message


@settings(max_examples=300, deadline=None)
@given(messages())
def test_a_request_that_is_decoded_has_bytes_that_fit_its_shapes(message: Any) -> None:
    """All that come later multiply and slice by these shapes without looking again."""
    try:
        request = to_request(message, None, SECOND_US)
    except Refused as refused:
        assert refused.fault is Fault.INVALID_ARGUMENT
        return
    for one in request.inputs:
        codec.array(one)
    assert codec.decode_request(codec.encode_request(request, codec.Spelling.MSGPACK)) == request


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(codec.DTYPES.keys() - {"FP16"})), st.lists(st.integers(0, 127), max_size=20), st.data())
def test_typed_contents_are_the_bytes_that_numpy_would_send(datatype: str, numbers: list[int], data: Any) -> None:
    """For every datatype, at its edges too."""
    dtype = codec.DTYPES[datatype]
    if dtype.kind in "iu":
        info = np.iinfo(dtype)
        numbers = numbers + data.draw(st.lists(st.integers(int(info.min), int(info.max)), max_size=5))
    values = np.array(numbers, dtype)
    message = InferRequestMessage(model_name="ctr")
    one = message.inputs.add(name="x", datatype=datatype, shape=[len(values)])
    field = {"b": "bool_contents", "f": f"fp{8 * dtype.itemsize}_contents"}.get(dtype.kind)
    wide = "64" if dtype.itemsize == 8 else ""
    field = field or f"{'u' if dtype.kind == 'u' else ''}int{wide}_contents"
    getattr(one.contents, field).extend(values.tolist())
    (found,) = to_request(InferRequestMessage.FromString(message.SerializeToString()), None, SECOND_US).inputs
    assert found == Tensor("x", datatype, (len(values),), memoryview(values.tobytes()))


@pytest.mark.parametrize(
    ("timeout", "left_s", "budget_us"),
    [(0, None, 0), (500, None, 500), (0, 30.0, 0), (0, 0.25, 250_000), (500, 0.25, 500), (2_000_000, 1.5, 1_500_000),
     (500, 0.0, 1)],
)  # fmt: skip
def test_the_budget_is_the_shorter_of_the_parameter_and_the_calls_deadline(
    timeout: int, left_s: float | None, budget_us: int
) -> None:
    """0 stands for the server's default, which a shorter deadline cuts; work for a caller who has gone is wasted."""
    message = InferRequestMessage(model_name="ctr")
    if timeout:
        message.parameters["timeout"].int64_param = timeout
    message.parameters["priority"].uint64_param = 3
    request = to_request(message, left_s, SECOND_US)
    assert (request.budget_us, request.priority) == (budget_us, 3)


def test_the_service_is_named_as_clients_name_it() -> None:
    """A path of another name reaches nobody."""
    assert SERVICE.full_name == "inference.GRPCInferenceService"
