"""Between the protocol's protobuf messages and the wire's Structs. Bad messages raise `Refused(INVALID_ARGUMENT)`."""

from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narsil_stream.schemas import codec
from narsil_stream.schemas.errors import invalid
from narsil_stream.schemas.protobuf import DecodeError, Message, message_class
from narsil_stream.schemas.wire import MAX_ID, MAX_TENANT, InferAnswer, InferRequest, JsonOutputWish, Tensor

MAX_TENSORS, MAX_DIMENSIONS, MAX_DIM = 64, 8, 2**53
MAX_TIMEOUT_US, MAX_PRIORITY = 2**53, 255
"""What `schemas/wire.py` allows. The wire's Structs check it when they are decoded; here they are made."""

CONTENTS = {
    "BOOL": "bool_contents",
    "UINT8": "uint_contents",
    "UINT16": "uint_contents",
    "UINT32": "uint_contents",
    "UINT64": "uint64_contents",
    "INT8": "int_contents",
    "INT16": "int_contents",
    "INT32": "int_contents",
    "INT64": "int64_contents",
    "FP32": "fp32_contents",
    "FP64": "fp64_contents",
}
"""The field of InferTensorContents that holds a datatype. FP16 has none: it is always raw."""

InferRequestMessage = message_class("ModelInferRequest")
InferResponseMessage = message_class("ModelInferResponse")
StreamResponseMessage = message_class("ModelStreamInferResponse")
TensorContents = message_class("InferTensorContents")
InferParameter = message_class("InferParameter")


def parsed(kind: Any, data: bytes) -> Any:
    """The message of class `kind` in these bytes."""
    try:
        return kind.FromString(data)
    except DecodeError:
        raise invalid(f"not a protobuf message of the type {kind.DESCRIPTOR.name}") from None


def serialized(message: Message) -> bytes:
    data: bytes = message.SerializeToString()
    return data


def to_request(call: Any, left_s: float | None, default_us: int) -> InferRequest:
    """A ModelInferRequest as the wire's. `left_s`: until the call's own deadline, which caps the budget, in seconds.

    `default_us`: the budget of requests that name none.
    """
    if len(call.id) > MAX_ID:
        raise invalid(f"the request's id has {len(call.id)} characters; expected at most {MAX_ID}")
    if call.outputs:
        _check_outputs(call.outputs)
    budget_us = priority = 0
    tenant = ""
    if call.parameters:
        tenant = _text(call.parameters, "tenant", MAX_TENANT)
        budget_us = _number(call.parameters, "timeout", MAX_TIMEOUT_US)
        priority = _number(call.parameters, "priority", MAX_PRIORITY)
    if left_s is not None and left_s * 1e6 < (budget_us or default_us):
        budget_us = max(1, ceil(left_s * 1e6))
    tensors = _tensors(call.inputs, call.raw_input_contents)
    return InferRequest(call.id, tensors, budget_us, priority=priority, tenant=tenant)


def _check_outputs(outputs: Any) -> None:
    if len(outputs) > MAX_TENSORS:
        raise invalid(f"{len(outputs)} outputs are asked for; expected at most {MAX_TENSORS}")
    codec.check_wishes(tuple(JsonOutputWish(wish.name, dict.fromkeys(wish.parameters, True)) for wish in outputs))


def _number(parameters: Any, name: str, most: int) -> int:
    """0 if it is not given."""
    if name not in parameters:
        return 0
    given = parameters[name]
    kind = given.WhichOneof("parameter_choice")
    number = getattr(given, kind) if kind in ("int64_param", "uint64_param") else None
    if number is None or not 0 <= number <= most:
        found = f"{number}" if number is not None else f"given as {kind or 'nothing'}"
        raise invalid(f"parameter '{name}' is {found}; expected int64_param or uint64_param from 0 to {most}")
    return int(number)


def _text(parameters: Any, name: str, most: int) -> str:
    """ "" if it is not given."""
    if name not in parameters:
        return ""
    given = parameters[name]
    if given.WhichOneof("parameter_choice") != "string_param" or len(given.string_param) > most:
        raise invalid(f"parameter '{name}' is not a string_param of at most {most} characters")
    return str(given.string_param)


# Tensors


def _tensors(inputs: Any, raw: Any) -> tuple[Tensor, ...]:
    if len(inputs) > MAX_TENSORS:
        raise invalid(f"{len(inputs)} inputs; expected at most {MAX_TENSORS}")
    for given in inputs:
        if given.parameters and "shared_memory_region" in given.parameters:
            raise invalid(f"input '{given.name}' is in shared memory; expected its data in raw_input_contents")
    if not raw:
        return tuple(_tensor(given, _typed(given)) for given in inputs)
    if len(raw) != len(inputs):
        raise invalid(f"raw_input_contents has {len(raw)} tensors; expected {len(inputs)}, one for each input")
    for given in inputs:
        if given.HasField("contents"):
            raise invalid(f"input '{given.name}' has contents although raw_input_contents are given; expected one")
    return tuple(_tensor(given, memoryview(data)) for given, data in zip(inputs, raw, strict=True))


def _tensor(given: Any, data: memoryview) -> Tensor:
    """With bytes that are as many as datatype and shape say."""
    shape = tuple(given.shape[: MAX_DIMENSIONS + 1])
    if len(shape) > MAX_DIMENSIONS:
        raise invalid(f"input '{given.name}' has {len(given.shape)} dimensions; expected at most {MAX_DIMENSIONS}")
    if shape and not 0 <= min(shape) <= max(shape) <= MAX_DIM:
        raise invalid(f"input '{given.name}' has shape {list(shape)}; expected dimensions from 0 to {MAX_DIM}")
    tensor = Tensor(given.name, given.datatype, shape, data)
    codec.array(tensor)
    return tensor


def _typed(given: Any) -> memoryview:
    """The bytes of typed contents."""
    datatype = given.datatype
    if (field := CONTENTS.get(datatype)) is None:
        where = "FP16 has no typed contents, send it raw" if datatype == "FP16" else f"expected {', '.join(CONTENTS)}"
        raise invalid(f"input '{given.name}' has contents of datatype {datatype!r}; {where}")
    contents = given.contents
    for found, _ in contents.ListFields():
        if found.name != field:
            raise invalid(f"input '{given.name}' has {found.name}; expected {field} for {datatype}")
    values = getattr(contents, field)
    if datatype in ("FP32", "FP64"):
        return _packed(field, values)
    return _integers(given, values)


def _packed(field: str, values: Any) -> memoryview:
    """Numbers of fixed size stand in protobuf as they stand in memory: a message of them alone ends in our bytes."""
    only = TensorContents()
    getattr(only, field).MergeFrom(values)
    size = len(values) * (4 if field == "fp32_contents" else 8)
    data = memoryview(only.SerializeToString())
    return data[len(data) - size :]


def _integers(given: Any, values: Any) -> memoryview:
    dtype = codec.DTYPES[given.datatype]
    wide: Any = {"i": np.int64, "u": np.uint64, "b": np.bool_}[dtype.kind]
    numbers: NDArray[Any] = np.fromiter(values, wide, len(values))
    narrow = numbers.astype(dtype)
    if dtype.itemsize < 4 and (narrow != numbers).any():
        at = int(np.argmax(narrow != numbers))
        raise invalid(f"input '{given.name}' contents[{at}] is {numbers[at]}; expected {given.datatype}")
    return narrow.view(np.uint8).data


# Answers


def to_response(answer: InferAnswer, final: bool = False) -> Message:
    """Scores as a ModelInferResponse. `final`: with the parameter by which Triton's clients know the last answer."""
    message: Message = InferResponseMessage(
        model_name=answer.model,
        model_version=answer.version,
        id=answer.id,
        parameters={"triton_final_response": FINAL} if final else None,
        outputs=[{"name": out.name, "datatype": out.dtype, "shape": out.shape} for out in answer.outputs],
        raw_output_contents=[bytes(out.data) for out in answer.outputs],
    )
    return message


FINAL = InferParameter(bool_param=True)


def to_stream_response(answer: InferAnswer) -> Message:
    """Scores or an error as a ModelStreamInferResponse; an error's code and when to try again are parameters."""
    if answer.fault:
        said = {"code": InferParameter(string_param=answer.fault)}
        if answer.retry_after_us:
            said["retry_after_us"] = InferParameter(int64_param=answer.retry_after_us)
        message: Message = StreamResponseMessage(
            error_message=answer.detail or answer.fault, infer_response={"id": answer.id, "parameters": said}
        )
    else:
        message = StreamResponseMessage(infer_response=to_response(answer, final=True))
    return message
