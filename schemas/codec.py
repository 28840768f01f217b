"""Between bytes and the wire's Structs. Bad bytes raise `Refused(INVALID_ARGUMENT)`, never anything else."""

import enum
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from narsil_stream.schemas.errors import Refused, invalid, named
from narsil_stream.schemas.json_tensor import decode_inputs, decode_outputs, pack
from narsil_stream.schemas.wire import (
    InferAnswer,
    InferRequest,
    JsonAnswer,
    JsonError,
    JsonOutput,
    JsonOutputWish,
    JsonParameters,
    JsonRequest,
    JsonTensor,
    Tensor,
)

DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("<u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("<i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

NOTHING_SAID = JsonParameters()

_encode_msgpack = msgspec.msgpack.Encoder().encode
_encode_json = msgspec.json.Encoder().encode
_decode_msgpack_request = msgspec.msgpack.Decoder(InferRequest).decode
_decode_msgpack_answer = msgspec.msgpack.Decoder(InferAnswer).decode
_decode_json_error = msgspec.json.Decoder(JsonError).decode

UNDECODABLE = (msgspec.MsgspecError, ValueError, RecursionError)
"""What msgspec raises for bad bytes: for text that is not UTF-8 and for deep nesting, Python's own errors."""


class Spelling(enum.Enum):
    JSON = "json"
    MSGPACK = "msgpack"


def tensor(name: str, array: NDArray[Any]) -> Tensor:
    """An array as a wire tensor, without a copy where it is C order and little endian already."""
    array = np.asarray(array, order="C")
    little = array.dtype.newbyteorder("<")
    if little not in NAMES:
        raise invalid(f"tensor '{name}' has dtype {array.dtype}; expected one of {', '.join(DTYPES)}")
    data = array.astype(little, copy=False).reshape(-1).view(np.uint8).data
    return Tensor(name, NAMES[little], array.shape, data)


def array(tensor: Tensor) -> NDArray[Any]:
    """A read-only view of a tensor's bytes in its shape. Raises INVALID_ARGUMENT when bytes and shape disagree."""
    dtype = DTYPES.get(tensor.dtype)
    if dtype is None:
        raise invalid(f"input '{tensor.name}' has datatype {tensor.dtype!r}; expected one of {', '.join(DTYPES)}")
    count = 1
    for dim in tensor.shape:
        count *= dim
    if len(tensor.data) != count * dtype.itemsize:
        raise invalid(
            f"input '{tensor.name}' has {len(tensor.data)} bytes; expected {count * dtype.itemsize} for"
            f" {tensor.dtype} {list(tensor.shape)}"
        )
    try:
        return np.frombuffer(tensor.data, dtype).reshape(tensor.shape)
    except ValueError:  # no elements, but dimensions that NumPy cannot multiply
        raise invalid(f"input '{tensor.name}' has shape {list(tensor.shape)}, which is too large") from None


def spelling_of(payload: bytes) -> Spelling:
    """msgpack requests are arrays, so their first byte is 0x90-0x9f, 0xdc or 0xdd; JSON is ASCII there."""
    return Spelling.MSGPACK if payload and payload[0] >= 0x80 else Spelling.JSON


def decode_request(payload: bytes) -> InferRequest:
    """A request in either spelling."""
    if spelling_of(payload) is Spelling.MSGPACK:
        try:
            return _decode_msgpack_request(payload)
        except UNDECODABLE as error:
            raise invalid(f"not a version 1 msgpack request: {error}") from None
    return decode_json_request(payload)


def decode_json_request(payload: bytes) -> InferRequest:
    try:
        request = decode_inputs(payload)
    except UNDECODABLE as error:
        raise invalid(f"not an Open Inference Protocol request in JSON: {error}") from None
    check_wishes(request.outputs or ())
    return from_json(request, tuple(map(pack, request.inputs)))


def check_wishes(wishes: tuple[JsonOutputWish, ...]) -> None:
    """Raises INVALID_ARGUMENT for an output that no model here has."""
    for wish in wishes:
        if wish.name != "scores":
            raise invalid(f"unknown output '{wish.name}'; expected 'scores'")
        if wish.parameters.get("classification"):
            raise invalid("output 'scores' is asked for as a classification; it has no classes, ask for it as it is")
        if "shared_memory_region" in wish.parameters:
            raise invalid("output 'scores' is asked for in shared memory, which is not offered")


def from_json(request: Any, inputs: tuple[Tensor, ...]) -> InferRequest:
    """`request`: as `json_tensor` decodes it."""
    said = request.parameters or NOTHING_SAID
    return InferRequest(
        id=request.id,
        inputs=inputs,
        budget_us=said.timeout,
        sent_us=said.sent_us,
        priority=said.priority,
        traceparent=said.traceparent,
        tenant=said.tenant,
    )


def encode_request(request: InferRequest, spelling: Spelling) -> bytes:
    if spelling is Spelling.MSGPACK:
        return _encode_msgpack(request)
    said = JsonParameters(request.budget_us, request.sent_us, request.priority, request.traceparent, request.tenant)
    return _encode_json(JsonRequest(tuple(map(_to_json, request.inputs)), request.id, said))


def encode_answer(answer: InferAnswer, spelling: Spelling) -> bytes:
    if spelling is Spelling.MSGPACK:
        return _encode_msgpack(answer)
    if answer.fault:
        return _encode_json(JsonError(answer.detail, answer.fault, answer.retry_after_us, answer.id))
    outputs = tuple(
        JsonOutput(out.name, out.dtype, out.shape, msgspec.Raw(_encode_json(array(out).reshape(-1).tolist())))
        for out in answer.outputs
    )
    return _encode_json(JsonAnswer(answer.model, answer.version, outputs, answer.id))


def decode_answer(payload: bytes) -> InferAnswer:
    """An answer in either spelling, as a client gets it. Raises `msgspec.MsgspecError` for anything else."""
    try:
        if spelling_of(payload) is Spelling.MSGPACK:
            return _decode_msgpack_answer(payload)
        return _decode_json_answer(payload)
    except (ValueError, RecursionError, Refused) as error:
        raise msgspec.DecodeError(f"not a version 1 answer: {error}") from None


def _decode_json_answer(payload: bytes) -> InferAnswer:
    try:
        error = _decode_json_error(payload)
    except msgspec.ValidationError:
        answer = decode_outputs(payload)
        return InferAnswer(answer.id, tuple(map(pack, answer.outputs)), answer.model_name, answer.model_version)
    return InferAnswer(
        error.id, fault=error.code or "INTERNAL", detail=error.error, retry_after_us=error.retry_after_us
    )


def refusal(answer: InferAnswer) -> Refused:
    """The exception that an answer with a fault stands for."""
    return Refused(named(answer.fault), answer.detail, answer.retry_after_us)


def _to_json(given: Tensor) -> JsonTensor:
    return JsonTensor(
        given.name, given.shape, given.dtype, msgspec.Raw(_encode_json(array(given).reshape(-1).tolist()))
    )
