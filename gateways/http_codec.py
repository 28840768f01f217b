"""Between HTTP bodies and the wire's Structs: JSON, Triton's binary tensors behind JSON, msgpack; gzip and deflate.

A body with binary tensors is JSON, then the tensors' raw little-endian bytes in the order of the JSON. The header
Inference-Header-Content-Length says how long the JSON is.
"""

import asyncio
import contextlib
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import msgspec

from narsil_stream.schemas import codec
from narsil_stream.schemas.codec import UNDECODABLE, Spelling
from narsil_stream.schemas.errors import Fault, Refused, invalid
from narsil_stream.schemas.json_tensor import Given, HttpParameters, decode_http_inputs, pack
from narsil_stream.schemas.wire import InferAnswer, InferRequest, JsonOutputWish, Tensor

JSON_LENGTH = "inference-header-content-length"
MSGPACK_TYPES = ("application/msgpack", "application/x-msgpack", "application/vnd.msgpack")
JSON_BYTES = 4 << 20
"""Of one body's JSON: reading it holds up the event loop. Binary tensors have no such limit."""
INLINE_BYTES = 256 << 10
"""Bodies that inflate to no more than this are inflated at once, larger ones in a thread."""
INFLATING = ThreadPoolExecutor(2, thread_name_prefix="inflating")
"""Few, so that few large bodies exist that are not counted yet."""
WORTH_DEFLATING = 1_024
"""Bytes of an answer below which it is sent as it is, whatever the client accepts."""
ENCODINGS = {"gzip": 31, "deflate": 15}
"""By zlib's window size: 31 is gzip, 15 is zlib, which HTTP calls deflate."""


class Asked(NamedTuple):
    """A decoded body."""

    request: InferRequest
    binary_output: bool
    """Whether the scores are wanted as bytes behind the JSON."""


class Body(NamedTuple):
    """An answer on its way out."""

    content: bytes
    headers: list[tuple[str, str]]


def is_msgpack(content_type: str) -> bool:
    return content_type.partition(";")[0].strip().lower() in MSGPACK_TYPES


def decode(body: bytes, spelling: Spelling, json_length: str | None) -> Asked:
    """Raises INVALID_ARGUMENT, or TOO_LARGE. `json_length`: that header's value, None without it."""
    if spelling is Spelling.MSGPACK:
        if codec.spelling_of(body) is not Spelling.MSGPACK:
            raise invalid("the body is not a version 1 msgpack request, as its content-type says")
        return Asked(codec.decode_request(body), False)
    length = _json_length(json_length, len(body))
    if length > JSON_BYTES:
        detail = f"{length} bytes of JSON; expected at most {JSON_BYTES}, or tensors as binary data behind the JSON"
        raise Refused(Fault.TOO_LARGE, detail)
    try:
        request = decode_http_inputs(memoryview(body)[:length])
    except UNDECODABLE as error:
        raise invalid(f"not an Open Inference Protocol request in JSON: {error}") from None
    codec.check_wishes(request.outputs or ())
    inputs = _tensors(request.inputs, memoryview(body)[length:] if json_length is not None else None)
    said = request.parameters or HttpParameters()
    return Asked(codec.from_json(request, inputs), _binary_output(request.outputs or (), said.binary_data_output))


def _json_length(said: str | None, body: int) -> int:
    if said is None:
        return body
    if not (said.isascii() and said.isdigit()) or len(said) > 18:
        raise invalid(f"the header Inference-Header-Content-Length is {said!r}; expected a number of bytes")
    if int(said) > body:
        raise invalid(f"the header Inference-Header-Content-Length is {said}; the body has {body} bytes")
    return int(said)


def _tensors(given: tuple[Given, ...], blob: memoryview | None) -> tuple[Tensor, ...]:
    """`blob`: what follows the JSON; None without the header that says where it begins."""
    if blob is None:
        return tuple(map(pack, given))
    tensors, at = [], 0
    for one in given:
        size = one.parameters.binary_data_size if one.parameters is not None else None
        if size is None:
            tensors.append(pack(one))
            continue
        if one.data:
            raise invalid(f"input '{one.name}' has both data and binary_data_size; expected one of them")
        if at + size > len(blob):
            raise invalid(f"input '{one.name}' has binary_data_size {size}; {len(blob) - at} bytes are left")
        tensors.append(Tensor(one.name, type(one).__name__, one.shape, blob[at : at + size]))
        at += size
    if at != len(blob):
        raise invalid(f"{len(blob) - at} bytes follow the last binary tensor; expected none")
    return tuple(tensors)


def _binary_output(wishes: tuple[JsonOutputWish, ...], default: bool) -> bool:
    for wish in wishes:
        if (wanted := wish.parameters.get("binary_data")) is not None:
            if not isinstance(wanted, bool):
                raise invalid(f"output '{wish.name}' has binary_data {wanted!r}; expected true or false")
            return wanted
    return default


class BinaryParameters(msgspec.Struct):
    binary_data_size: int


class BinaryOutput(msgspec.Struct):
    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: BinaryParameters


class BinaryAnswer(msgspec.Struct, omit_defaults=True):
    """The infer response whose outputs' bytes follow it."""

    model_name: str
    model_version: str
    outputs: list[BinaryOutput]
    id: str = ""


_encode_json = msgspec.json.Encoder().encode


def encode(answer: InferAnswer, spelling: Spelling, binary_output: bool) -> Body:
    if spelling is Spelling.MSGPACK:
        return Body(codec.encode_answer(answer, spelling), [("content-type", MSGPACK_TYPES[0])])
    if not binary_output or answer.fault:
        return Body(codec.encode_answer(answer, spelling), [("content-type", "application/json")])
    outputs = [BinaryOutput(o.name, o.dtype, o.shape, BinaryParameters(o.data.nbytes)) for o in answer.outputs]
    head = _encode_json(BinaryAnswer(answer.model, answer.version, outputs, answer.id))
    content = b"".join([head, *(o.data for o in answer.outputs)])
    return Body(content, [("content-type", "application/octet-stream"), (JSON_LENGTH, str(len(head)))])


async def inflated(body: bytes, encoding: str, limit: int) -> bytes:
    """The body without its content-encoding, one of `ENCODINGS`. Raises TOO_LARGE above `limit`, INVALID_ARGUMENT."""
    if len(body) <= INLINE_BYTES:  # most are small, but 64 kB may become 64 MB
        with contextlib.suppress(zlib.error):
            stream = zlib.decompressobj(ENCODINGS[encoding])
            whole = stream.decompress(body, min(limit, INLINE_BYTES))
            if stream.eof and not stream.unused_data:
                return whole
    return await asyncio.get_running_loop().run_in_executor(INFLATING, _inflate, body, encoding, limit)


def _inflate(body: bytes, name: str, limit: int) -> bytes:
    members: list[bytes] = []
    size = 0
    try:
        while body or not members:  # a gzip body may have several members
            stream = zlib.decompressobj(ENCODINGS[name])
            members.append(stream.decompress(body, limit + 1 - size))
            size += len(members[-1])
            if size > limit:
                raise Refused(Fault.TOO_LARGE, f"a body of more than {limit} bytes after {name}")
            if not stream.eof:
                raise invalid(f"the body ends in the middle of its {name} data")
            body = stream.unused_data if name != "deflate" else b""
    except zlib.error as error:
        raise invalid(f"the body is not {name}, as its content-encoding says: {error}") from None
    return b"".join(members)


def deflated(body: Body, accepted: str) -> Body:
    """Compressed as the client accepts it, where that is worth it."""
    if len(body.content) < WORTH_DEFLATING or not (name := _accepted(accepted)):
        return body
    stream = zlib.compressobj(1, zlib.DEFLATED, ENCODINGS[name])
    content = stream.compress(body.content) + stream.flush()
    return Body(content, [*body.headers, ("content-encoding", name), ("vary", "accept-encoding")])


def _accepted(accepted: str) -> str:
    """gzip or deflate, whichever the client names first and does not refuse; "" for none."""
    for wish in accepted.lower().split(","):
        name, _, weight = wish.partition(";")
        if name.strip() in ENCODINGS and weight.replace(" ", "") not in ("q=0", "q=0.0", "q=0.00", "q=0.000"):
            return name.strip()
    return ""
