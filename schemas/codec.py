"""Between bytes and the wire's Structs. Bad bytes raise `Refused(INVALID_ARGUMENT)`, never anything else."""

import enum
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from narsil_stream.schemas.errors import Refused, invalid, named
from narsil_stream.schemas.wire import (
    InferAnswer,
    InferRequest,
    JsonAnswer,
    JsonError,
    JsonOutput,
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

_encode_msgpack = msgspec.msgpack.Encoder().encode
_encode_json = msgspec.json.Encoder().encode
_decode_msgpack_request = msgspec.msgpack.Decoder(InferRequest).decode
_decode_msgpack_answer = msgspec.msgpack.Decoder(InferAnswer).decode
_decode_json_request = msgspec.json.Decoder(JsonRequest).decode
_decode_json_answer = msgspec.json.Decoder(JsonAnswer).decode
_decode_json_error = msgspec.json.Decoder(JsonError).decode


class Spelling(enum.Enum):
    JSON = "json"
    MSGPACK = "msgpack"


def tensor(name: str, array: NDArray[Any]) -> Tensor:
    """An array as a wire tensor, without a copy where it is C order and little endian already."""
    array = np.ascontiguousarray(array)
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
    return np.frombuffer(tensor.data, dtype).reshape(tensor.shape)


def spelling_of(payload: bytes) -> Spelling:
    """msgpack requests are arrays, so their first byte is 0x90-0x9f, 0xdc or 0xdd; JSON is ASCII there."""
    return Spelling.MSGPACK if payload and payload[0] >= 0x80 else Spelling.JSON


def decode_request(payload: bytes) -> InferRequest:
    """A request in either spelling."""
    if spelling_of(payload) is Spelling.MSGPACK:
        try:
            return _decode_msgpack_request(payload)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise invalid(f"not a version 1 msgpack request: {error}") from None
    return decode_json_request(payload)


def decode_json_request(payload: bytes) -> InferRequest:
    try:
        request = _decode_json_request(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise invalid(f"not an Open Inference Protocol request in JSON: {error}") from None
    for wish in request.outputs:
        if wish.name != "scores":
            raise invalid(f"unknown output '{wish.name}'; expected 'scores'")
    said = request.parameters
    return InferRequest(
        id=request.id,
        inputs=tuple(map(_from_json, request.inputs)),
        budget_us=said.timeout,
        sent_us=said.sent_us,
        priority=said.priority,
        traceparent=said.traceparent,
    )


def encode_request(request: InferRequest, spelling: Spelling) -> bytes:
    if spelling is Spelling.MSGPACK:
        return _encode_msgpack(request)
    said = JsonParameters(request.budget_us, request.sent_us, request.priority, request.traceparent)
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
    if spelling_of(payload) is Spelling.MSGPACK:
        return _decode_msgpack_answer(payload)
    try:
        error = _decode_json_error(payload)
        return InferAnswer(
            error.id, fault=error.code or "INTERNAL", detail=error.error, retry_after_us=error.retry_after_us
        )
    except msgspec.ValidationError:
        answer = _decode_json_answer(payload)
    outputs = tuple(_from_json(JsonTensor(out.name, out.shape, out.datatype, out.data)) for out in answer.outputs)
    return InferAnswer(answer.id, outputs, answer.model_name, answer.model_version)


def refusal(answer: InferAnswer) -> Refused:
    """The exception that an answer with a fault stands for."""
    return Refused(named(answer.fault), answer.detail, answer.retry_after_us)


def _numbers(kind: type, depth: int) -> Callable[[msgspec.Raw], Any]:
    nested: Any = kind
    for _ in range(depth):
        nested = list[nested]
    return msgspec.json.Decoder(nested).decode


_KINDS: dict[str, type] = {"b": bool, "u": int, "i": int, "f": float}
_DECODERS = {(kind, depth): _numbers(of, depth) for kind, of in _KINDS.items() for depth in range(1, 9)}


def _from_json(given: JsonTensor) -> Tensor:
    dtype = DTYPES.get(given.datatype)
    if dtype is None:
        raise invalid(f"input '{given.name}' has datatype {given.datatype!r}; expected one of {', '.join(DTYPES)}")
    try:
        values = _json_array(given, dtype)
    except (msgspec.MsgspecError, OverflowError, ValueError, RecursionError) as error:
        raise invalid(
            f"input '{given.name}': data must be {given.datatype} numbers, flat or nested as"
            f" {list(given.shape)}: {error}"
        ) from None
    if values.ndim > 1 and values.shape != given.shape:
        raise invalid(
            f"input '{given.name}' has data nested as {list(values.shape)}; its shape says {list(given.shape)}"
        )
    return Tensor(given.name, given.datatype, given.shape, values.reshape(-1).view(np.uint8).data)


def _json_array(given: JsonTensor, dtype: np.dtype[Any]) -> NDArray[Any]:
    with np.errstate(over="ignore"):  # what overflows becomes inf, which the batcher refuses by position
        try:
            return np.array(_DECODERS[dtype.kind, 1](given.data), dtype)
        except msgspec.ValidationError:
            if len(given.shape) < 2:
                raise
            return np.array(_DECODERS[dtype.kind, len(given.shape)](given.data), dtype)


def _to_json(given: Tensor) -> JsonTensor:
    return JsonTensor(
        given.name, given.shape, given.dtype, msgspec.Raw(_encode_json(array(given).reshape(-1).tolist()))
    )
