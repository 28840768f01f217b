"""The OpenAPI 3.1 document of the HTTP gateway: `python -m narsil_stream.schemas.openapi` prints it.

It is made from the Structs and from the table of paths in `http_operations.py`. `openapi.json` beside this file is the
output; a test compares the two.
"""

import base64
import json
import re
import struct
from http import HTTPStatus
from typing import Any, Literal

import msgspec

from narsil_stream.schemas import codec
from narsil_stream.schemas.codec import Spelling
from narsil_stream.schemas.describe import Schema, components, in_2020_12, ref
from narsil_stream.schemas.errors import Fault, error_table
from narsil_stream.schemas.http_operations import OPERATIONS, TAGS, Operation
from narsil_stream.schemas.json_tensor import HttpParameters, TensorParameters
from narsil_stream.schemas.model import NAME
from narsil_stream.schemas.wire import (
    InferAnswer,
    InferRequest,
    JsonAnswer,
    JsonError,
    JsonRequest,
    JsonTensor,
    Tensor,
)

JSON, BINARY, MSGPACK = "application/json", "application/octet-stream", "application/msgpack"
DIALECT = "https://spec.openapis.org/oas/3.1/dialect/base"
DESCRIPTION = """Scores of recommender models (DLRM) over HTTP: the Open Inference Protocol v2 with Triton's extensions.

The examples fit the demo model that `narsil serve` makes on a fresh machine. `GET` paths answer `HEAD` too. HTTP/1.1
and HTTP/2 are spoken, on the same port. Bodies may be compressed with gzip or deflate, and answers are where the client
accepts it.

Errors are `{"error": "...", "code": "..."}`; `code` names a row of `x-error-table` and is missing where HTTP alone
is concerned (405, 408, 415, and 404 of a path). What the HTTP parser itself refuses has no JSON. Unknown members of
objects are passed over, and answers may get new ones at any time.

Tokens are asked for where the server was given a file of them."""


class HttpTensor(JsonTensor, frozen=True):
    """A named array."""

    datatype: Literal[
        "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64", "FP16", "FP32", "FP64"
    ]
    parameters: TensorParameters | None = None


class HttpRequest(JsonRequest, frozen=True):
    """The Open Inference Protocol's infer request, with Triton's parameters."""

    inputs: tuple[HttpTensor, ...]
    """`dense` [rows, n_dense], and `sparse` [rows, n_sparse], or `values` [N] with `lengths` [rows, n_sparse]."""
    parameters: HttpParameters = HttpParameters()


# Examples: one row for the demo model


def _tensor(name: str, datatype: str, code: str, numbers: list[float]) -> Tensor:
    return Tensor(name, datatype, (1, len(numbers)), memoryview(struct.pack(f"<{len(numbers)}{code}", *numbers)))


DENSE = [round(0.1 * i, 1) for i in range(13)]
SPARSE = [7 * i + 1 for i in range(26)]
REQUEST = InferRequest("42", (_tensor("dense", "FP32", "f", DENSE), _tensor("sparse", "INT32", "i", list(SPARSE))))
SCORE = 0.4345552623271942
SCORES = InferAnswer("42", (Tensor("scores", "FP32", (1,), memoryview(struct.pack("<f", SCORE))),), "dlrm", "1")
JSON_REQUEST = {
    "id": "42",
    "inputs": [
        {"name": "dense", "datatype": "FP32", "shape": [1, 13], "data": DENSE},
        {"name": "sparse", "datatype": "INT64", "shape": [1, 26], "data": SPARSE},
    ],
}
BINARY_HEAD = msgspec.json.encode(
    {
        "id": "42",
        "inputs": [
            {"name": t.name, "datatype": t.dtype, "shape": t.shape, "parameters": {"binary_data_size": len(t.data)}}
            for t in REQUEST.inputs
        ],
        "outputs": [{"name": "scores", "parameters": {"binary_data": True}}],
    }
)
BINARY_REQUEST = b"".join([BINARY_HEAD, *(tensor.data for tensor in REQUEST.inputs)])

DETAILS = {
    Fault.INVALID_ARGUMENT: "input 'sparse' [0, 3] is 123456; expected an id from 0 to 9999 (table 'C4')",
    Fault.UNAUTHENTICATED: "expected the header `authorization: Bearer <token>`",
    Fault.PERMISSION_DENIED: "RepositoryModelLoad needs a token with scope admin",
    Fault.NOT_FOUND: "model 'dlmr' is not served here",
    Fault.TOO_LARGE: "a body of 70000000 bytes; expected at most 67108864",
    Fault.OVERLOADED: "the queue is full",
    Fault.CANCELLED: "the caller has left",
    Fault.INTERNAL: "internal error",
    Fault.UNIMPLEMENTED: "/v2/logging is an extension of Triton's that is not offered here",
    Fault.UNAVAILABLE: "no batcher is alive",
    Fault.DEADLINE_EXCEEDED: "the request's time budget has passed",
}
MEANINGS = {
    Fault.INVALID_ARGUMENT: "What was sent cannot be used. The error says what, where, and what was expected.",
    Fault.UNAUTHENTICATED: "The server wants a token, and this is none that it knows.",
    Fault.PERMISSION_DENIED: "The token lacks the scope, or the server was not set up to allow this.",
    Fault.NOT_FOUND: "Nobody serves a model of that name or version.",
    Fault.TOO_LARGE: "More bytes or rows than the server takes.",
    Fault.OVERLOADED: "The request would not be answered in time. Retry-After says when to try again.",
    Fault.CANCELLED: "The caller has left. Nobody sees this answer but logs and metrics.",
    Fault.INTERNAL: "A fault of the server's own, which its log explains.",
    Fault.UNIMPLEMENTED: "An extension that is not offered.",
    Fault.UNAVAILABLE: "Nobody can do it now. Retry-After says when to try again.",
    Fault.DEADLINE_EXCEEDED: "The time budget has passed.",
}
ONLY_HTTP: dict[HTTPStatus, tuple[str, str]] = {
    HTTPStatus.METHOD_NOT_ALLOWED: ("Another method at this path. Allow lists those that there are.", "allow"),
    HTTPStatus.REQUEST_TIMEOUT: ("The body did not come in time. The connection is closed.", ""),
    HTTPStatus.UNSUPPORTED_MEDIA_TYPE: ("A content-encoding that is not known here.", "accept-encoding"),
    HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE: (
        "More headers than 64 KiB. The HTTP parser says it, without JSON.",
        "",
    ),
}


def _text(description: str, **schema: Any) -> Schema:
    return {"description": description, "schema": {"type": "string"} | schema}


HEADERS = {
    "retry-after": _text("Seconds after which to try again, rounded up.", pattern="^[0-9]+$"),
    "allow": _text("Methods that are possible at this path."),
    "accept-encoding": _text("Encodings that are known here."),
    "content-encoding": _text("How the answer is compressed, if it is.", enum=["gzip", "deflate"]),
    "www-authenticate": _text("The kind of token that is asked for (RFC 6750)."),
    "inference-header-content-length": _text("Bytes of JSON before the binary tensors.", pattern="^[0-9]+$"),
}
NAMED = {"type": "string", "pattern": f"^{NAME.pattern}$"}
PARAMETERS: dict[str, Schema] = {
    "model": {"in": "path", "required": True, "schema": NAMED, "example": "dlrm"},
    "version": {"in": "path", "required": True, "schema": NAMED, "example": "1"},
    "region": {"in": "path", "required": True, "schema": {"type": "string", "minLength": 1}, "example": "region0"},
    "Content-Encoding": {
        "in": "header", "description": "How the body is compressed. Empty, as identity: it is not.",
        "schema": {"type": "string", "enum": ["gzip", "deflate", "identity", ""]},
    },
    "Accept-Encoding": {
        "in": "header",
        "description": "gzip or deflate: how the answer may be compressed.",
        "schema": {"type": "string"},
    },
    "Inference-Header-Content-Length": {
        "in": "header",
        "description": "Bytes of JSON before the binary tensors. Without it the whole body is JSON.",
        "schema": {"type": "string", "pattern": "^[0-9]{1,18}$"},
    },
}  # fmt: skip


def _header_refs(*names: str) -> Schema:
    return {"headers": {name: {"$ref": f"#/components/headers/{name}"} for name in names if name}}


# Bodies


def _content(schema: Schema, example: Any = None) -> Schema:
    return {JSON: {"schema": schema} | ({} if example is None else {"example": example})}


def _encoded(media_type: str, schema: Schema, example: bytes, length: int = 0) -> Schema:
    """A body that JSON cannot show: the example is base64, with the length of the JSON in it, if it has some."""
    extra: Schema = {"x-encoded": base64.b64encode(example).decode()}
    return {media_type: {"schema": schema} | extra | ({"x-json-length": length} if length else {})}


def _bytes(description: str) -> Schema:
    return {"type": "string", "contentMediaType": BINARY, "description": description}


def _infer_body() -> Schema:
    packed = codec.encode_request(REQUEST, Spelling.MSGPACK)
    return (
        _content(ref(HttpRequest), JSON_REQUEST)
        | _encoded(BINARY, _bytes("JSON, then raw tensors."), BINARY_REQUEST, len(BINARY_HEAD))
        | _encoded(MSGPACK, ref(InferRequest), packed)
    )


def _infer_answer() -> Schema:
    example = json.loads(codec.encode_answer(SCORES, Spelling.JSON))
    answer = {
        "description": "Scores, one for each row, in the spelling that was asked for.",
        "content": _content(ref(JsonAnswer), example)
        | {BINARY: {"schema": _bytes("JSON, then raw scores.")}}
        | _encoded(MSGPACK, ref(InferAnswer), codec.encode_answer(SCORES, Spelling.MSGPACK)),
    }
    return answer | _header_refs("content-encoding", "inference-header-content-length")


def _answer(operation: Operation) -> Schema:
    """Of 200."""
    if operation.verb == "ModelInfer":
        return _infer_answer()
    if operation.answer is not None:
        one = ref(operation.answer)
        schema = {"type": "array", "items": one} if operation.listed else one
        return {"description": operation.answer.__doc__ or "", "content": _content(schema)}
    special: dict[str, tuple[str, Schema]] = {
        "/metrics": ("Prometheus's text format.", {"text/plain": {"schema": {"type": "string"}}}),
        "/openapi.json": ("An OpenAPI document.", _content({"type": "object"})),
        "/docs": ("A page.", {"text/html": {"schema": {"type": "string"}}}),
    }
    nothing = ("Done.", _content({"type": "object", "maxProperties": 0}, {}))
    description, content = special.get(operation.paths[0], nothing)
    return {"description": description, "content": content}


# Errors


def _error(fault: Fault, spellings: tuple[Spelling, ...] = (Spelling.JSON,)) -> Schema:
    wait_us = 250_000 if fault.retry else 0
    answer = InferAnswer("", fault=fault.name, detail=DETAILS[fault], retry_after_us=wait_us)
    body = JsonError(DETAILS[fault], fault.name, wait_us)
    content = _content(ref(JsonError), msgspec.to_builtins(body))
    if Spelling.MSGPACK in spellings:
        content |= _encoded(MSGPACK, ref(InferAnswer), codec.encode_answer(answer, Spelling.MSGPACK))
    challenge = "www-authenticate" if fault in (Fault.UNAUTHENTICATED, Fault.PERMISSION_DENIED) else ""
    headers = _header_refs("retry-after" if fault.retry else challenge)
    return {"description": f"{fault.name}: {MEANINGS[fault]}", "content": content} | headers


def _only_http(status: HTTPStatus) -> Schema:
    description, header = ONLY_HTTP[status]
    if status is HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE:
        return {"description": description}
    return {"description": description, "content": _content(ref(JsonError))} | _header_refs(header)


OF_INFER = "ModelInfer."
"""Begins the names of answers that come in msgpack, too."""
BEFORE_THE_BODY = (Fault.UNAUTHENTICATED, Fault.PERMISSION_DENIED)
"""These are in JSON always: whoever may not ask is not read."""


def _responses() -> dict[str, Schema]:
    plain = {fault.name: _error(fault) for fault in Fault}
    (infer,) = (operation for operation in OPERATIONS if operation.verb == "ModelInfer")
    packed = {
        OF_INFER + fault.name: _error(fault, tuple(Spelling))
        for fault in infer.refusals
        if fault not in BEFORE_THE_BODY
    }
    return plain | packed | {status.name: _only_http(status) for status in ONLY_HTTP}


def _refused(operation: Operation) -> dict[str, Schema]:
    """By status."""
    found: dict[int, str] = {status.value: status.name for status in operation.statuses}
    for fault in operation.refusals:
        packed = operation.verb == "ModelInfer" and fault not in BEFORE_THE_BODY
        found[fault.http] = OF_INFER + fault.name if packed else fault.name
    return {str(status): {"$ref": f"#/components/responses/{found[status]}"} for status in sorted(found)}


# Operations


def _described(operation: Operation, path: str) -> Schema:
    names = re.findall(r"{(\w+)}", path)
    said: Schema = {
        "operationId": _id(operation, path),
        "tags": [operation.tag],
        "summary": operation.summary,
        **({"description": operation.said} if operation.said else {}),
        "security": [{"bearer": [scope]} for scope in operation.scopes] + ([{}] if operation.scopes else []),
    }
    if operation.takes_body:
        names.append("Content-Encoding")
        required = operation.body is None
        content = _infer_body() if operation.body is None else _content(ref(operation.body), {})
        said["requestBody"] = {"required": required, "content": content}
    if operation.verb == "ModelInfer":
        names += ["Accept-Encoding", "Inference-Header-Content-Length"]
    said["parameters"] = [{"$ref": f"#/components/parameters/{name}"} for name in names]
    answers = {} if operation.tag == "Not offered" else {"200": _answer(operation)}
    if operation.unready and operation.answer is not None:
        answers["503"] = {"description": "Not ready.", "content": _content(ref(operation.answer))}
    return said | {"responses": answers | _refused(operation)}


def _id(operation: Operation, path: str) -> str:
    """Unique: the verb, with what tells its paths apart."""
    if operation.verb == "Documents":
        return "OpenApi" if path == "/openapi.json" else "Docs"
    several = [one for one in OPERATIONS if one.verb == operation.verb]
    method = operation.method.title() if len(several) > 1 else ""
    last = re.findall(r"{(\w+)}", path)[-1:] if path != operation.paths[0] else []
    return operation.verb + method + "".join(f"Of{name.title()}" for name in last)


def document() -> dict[str, Any]:
    paths: dict[str, Schema] = {}
    for operation in OPERATIONS:
        for path in operation.paths:
            paths.setdefault(path, {})[operation.method.lower()] = _described(operation, path)
    kinds = [kind for operation in OPERATIONS for kind in (operation.answer, operation.body) if kind is not None]
    schemas = components(*kinds, HttpRequest, InferRequest, InferAnswer, JsonAnswer, JsonError)
    return {
        "openapi": "3.1.0",
        "info": {"title": "narsil-stream", "version": "2", "description": DESCRIPTION},
        "jsonSchemaDialect": DIALECT,
        "servers": [{"url": "/", "description": "The gateway that this document comes from."}],
        "tags": [{"name": name, "description": said} for name, said in TAGS.items()],
        "paths": paths,
        "components": {
            "schemas": in_2020_12(schemas),
            "responses": _responses(),
            "parameters": {name: {"name": name, **said} for name, said in PARAMETERS.items()},
            "headers": HEADERS,
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "A token of `narsil token`, with scope infer or admin. An operation names the "
                    "scopes of which the token must have one.",
                }
            },
        },
        "x-error-table": error_table(),
    }


if __name__ == "__main__":
    print(json.dumps(document(), indent=2, ensure_ascii=False))
