"""The decoders of bytes that others send, one target each: what may come, what may be raised, and what must come out.

`test_fuzz.py` runs each for a moment, `make fuzz` for as long as one likes.
"""

import asyncio
import functools
import gzip
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from hypothesis import strategies as st

from narsil_stream.core import tokens
from narsil_stream.gateways import grpc_codec, http_codec, http_verbs
from narsil_stream.gateways.grpc_codec import InferRequestMessage
from narsil_stream.kernels.artifact import MODEL, ArtifactError, read_spec
from narsil_stream.kernels.init import criteo_spec, plain_spec
from narsil_stream.schemas import codec
from narsil_stream.schemas.codec import UNDECODABLE, Spelling
from narsil_stream.schemas.errors import Refused
from narsil_stream.schemas.internal import (
    Answers,
    Ask,
    Asking,
    Batch,
    Bundle,
    Cancel,
    Control,
    Demand,
    Look,
    ModelCard,
    Result,
    Slot,
    ToBatcher,
    ToExecutor,
    ToRepository,
)
from narsil_stream.schemas.model import ModelSpec
from narsil_stream.schemas.oip import RepositoryAction
from narsil_stream.schemas.wire import InferAnswer, InferRequest
from tests.fuzz.damage import depths, hostile, in_json, in_msgpack, trees
from tests.schemas.strategies import failed, micros, requests, scored, texts
from tests.schemas.test_hostile_bytes import HOSTILE, REQUEST
from tests.schemas.test_samples import FOLDER

LIMIT = 64 << 10
"""Of a body after it was inflated, here."""


class Target(NamedTuple):
    hostile: st.SearchStrategy[Any]
    """What may come: much of it nearly right."""
    read: Callable[[Any], Any]
    refusals: tuple[type[Exception], ...]
    """What `read` may raise. Anything else is a finding."""
    valid: st.SearchStrategy[Any]
    again: Callable[[Any], Any]
    """Encodes and decodes: what comes out is what went in."""
    memory: int = 200_000
    """Bytes that reading may take whatever the input's size; beside them, 40 for each of its bytes."""


REQUEST_NAMES = (
    "inputs", "outputs", "id", "parameters", "name", "shape", "datatype", "data", "timeout", "priority", "sent_us",
    "traceparent", "binary_data", "binary_data_size", "binary_data_output", "shared_memory_region", "classification",
)  # fmt: skip
PLAIN = [codec.encode_request(REQUEST, spelling) for spelling in Spelling]


def checked(request: InferRequest) -> InferRequest:
    """With the arrays looked at, as a batcher does."""
    for tensor in request.inputs:
        codec.array(tensor)
    return request


# HTTP


def read_http_json(body: bytes) -> InferRequest:
    return checked(http_codec.decode(body, Spelling.JSON, None).request)


def http_json_again(request: InferRequest) -> InferRequest:
    return read_http_json(codec.encode_request(request, Spelling.JSON))


def behind_json(request: InferRequest) -> tuple[str, bytes]:
    """With all tensors as raw bytes: what the header says, and the body."""
    head = in_json(
        {
            "id": request.id,
            "parameters": {"timeout": request.budget_us, "sent_us": request.sent_us, "priority": request.priority,
                           "traceparent": request.traceparent, "tenant": request.tenant, "binary_data_output": True},
            "inputs": [
                {"name": t.name, "shape": t.shape, "datatype": t.dtype, "parameters": {"binary_data_size": len(t.data)}}
                for t in request.inputs
            ],
        }
    )  # fmt: skip
    return str(len(head)), b"".join([head, *(tensor.data for tensor in request.inputs)])


def read_http_binary(sent: tuple[str, bytes]) -> InferRequest:
    length, body = sent
    return checked(http_codec.decode(body, Spelling.JSON, length).request)


LENGTH, BODY = behind_json(REQUEST)
lengths = st.sampled_from([LENGTH, "", "-1", "0", "²", "1e3", " 1", "9" * 30]) | st.integers(0, 600).map(str) | texts
bodies = hostile(BODY) | st.tuples(trees(*REQUEST_NAMES), st.binary(max_size=64)).map(lambda p: in_json(p[0]) + p[1])


def read_http_msgpack(body: bytes) -> InferRequest:
    return checked(http_codec.decode(body, Spelling.MSGPACK, None).request)


def http_msgpack_again(request: InferRequest) -> InferRequest:
    return read_http_msgpack(codec.encode_request(request, Spelling.MSGPACK))


def read_inflated(sent: tuple[str, bytes]) -> bytes:
    encoding, body = sent
    inflated = asyncio.run(http_codec.inflated(body, encoding, LIMIT))
    assert len(inflated) <= LIMIT
    return inflated


def inflated_again(body: bytes) -> bytes:
    deflated, two = zlib.compress(body), gzip.compress(body[:7]) + gzip.compress(body[7:])
    assert read_inflated(("deflate", deflated)) == read_inflated(("gzip", two))
    return read_inflated(("gzip", gzip.compress(body)))


BOMB = bytes(40 * LIMIT)
compressed = hostile(gzip.compress(BODY), zlib.compress(BODY), gzip.compress(BOMB), zlib.compress(BOMB))


def read_action(body: bytes) -> RepositoryAction:
    http_verbs.read_index(body)
    return http_verbs.read_action(body)


# gRPC


def message_of(request: InferRequest) -> bytes:
    message = InferRequestMessage(model_name="ctr", id=request.id)
    for name, number in (("timeout", request.budget_us), ("priority", request.priority)):
        message.parameters[name].int64_param = number
    for tensor in request.inputs:
        message.inputs.add(name=tensor.name, datatype=tensor.dtype, shape=tensor.shape)
        message.raw_input_contents.append(bytes(tensor.data))
    return grpc_codec.serialized(message)


def typed_message() -> bytes:
    message = InferRequestMessage(model_name="ctr", outputs=[{"name": "scores"}])
    for datatype, field in grpc_codec.CONTENTS.items():
        tensor = message.inputs.add(name=datatype, datatype=datatype, shape=[2])
        getattr(tensor.contents, field).extend([1, 0])
    return grpc_codec.serialized(message)


def read_grpc(data: bytes) -> InferRequest:
    return checked(grpc_codec.to_request(grpc_codec.parsed(InferRequestMessage, data), None, 0))


def grpc_again(request: InferRequest) -> InferRequest:
    return read_grpc(message_of(request))


# NATS


def read_wire(payload: bytes) -> InferRequest:
    return checked(codec.decode_request(payload))


def wire_again(request: InferRequest) -> InferRequest:
    in_json, packed = (read_wire(codec.encode_request(request, spelling)) for spelling in Spelling)
    assert in_json == packed
    return packed


slots = st.builds(Slot, st.integers(0, 64), st.integers(0, 2**31))
raw = st.binary(max_size=40).map(memoryview)
demands = st.builds(Demand, texts, st.integers(0, 2**31), micros, st.lists(slots, max_size=3).map(tuple))
internal: dict[str, tuple[Any, st.SearchStrategy[Any]]] = {
    "Bundle and Cancel": (
        Asking,
        st.builds(Bundle, texts, st.lists(st.builds(Ask, micros, texts, texts, requests), max_size=3).map(tuple))
        | st.builds(Cancel, texts, st.lists(micros, max_size=4).map(tuple)),
    ),
    "Answers": (
        Answers,
        st.builds(
            lambda batcher, answered: Answers(batcher, tuple(answered), tuple(answered.values())),
            texts, st.dictionaries(micros, scored | failed, max_size=4),
        ),
    ),
    "Batch and Demand": (
        ToExecutor,
        demands
        | st.builds(Batch, micros, texts, slots, texts, texts, texts, micros, raw, raw, raw, micros, demands),
    ),
    "Result": (ToBatcher, st.builds(Result, micros, texts, raw, micros, texts, texts, st.none() | slots)),
    "Control and Look": (
        ToRepository,
        st.builds(Control, texts, micros, st.sampled_from(["load", "unload"]), texts) | st.builds(Look, texts, micros),
    ),
}  # fmt: skip
SAMPLES = [path.read_bytes() for path in sorted(FOLDER.glob("*.bin"))]


def spoken(kind: Any, valid: st.SearchStrategy[Any]) -> Target:
    """What actors say to each other: `Bus.listen` drops what raises one of these."""
    decode = msgspec.msgpack.Decoder(kind).decode
    seen = hostile(*SAMPLES) | trees("a").map(in_msgpack)
    return Target(seen, decode, UNDECODABLE, valid, lambda message: decode(in_msgpack(message)))


# Files


def file_of(known: dict[str, Any]) -> bytes:
    return "\n".join(tokens.line(token, one.scopes, one.who) for token, one in known.items()).encode()


def tokens_again(known: dict[str, Any]) -> dict[str, Any]:
    by_digest = tokens.parse(b"# a remark\n\n" + file_of(known))
    assert len(by_digest) == len(known)
    return {token: by_digest[tokens.digest(token)] for token in known}


scopes = st.sets(st.sampled_from(tokens.SCOPES), min_size=1).map(frozenset)
owners = st.from_regex(r"([a-z0-9][a-z0-9 @.-]{0,20}[a-z0-9])?", fullmatch=True)
token_files = st.dictionaries(st.text(min_size=1), st.builds(tokens.Known, scopes, owners), max_size=5)
TOKENS = file_of({"one": tokens.Known(frozenset({"infer"}), "ci"), "two": tokens.Known(frozenset(tokens.SCOPES))})


@functools.cache
def scratch() -> tempfile.TemporaryDirectory[str]:
    """Removed when Python ends."""
    return tempfile.TemporaryDirectory(prefix="narsil-fuzz-")


def read_model(data: bytes) -> ModelSpec:
    folder = Path(scratch().name)
    (folder / MODEL).write_bytes(data)
    return read_spec(folder)


sizes = st.lists(st.integers(1, 2**31 - 1), min_size=1, max_size=5)
specs = st.builds(
    lambda dense, tables, dim: plain_spec("ctr", dense, tables, dim, (8,), (4,)),
    st.integers(1, 65_536), sizes, st.integers(1, 65_536),
)  # fmt: skip
SPEC = msgspec.json.encode(criteo_spec("ctr", rows=10, dim=4, bottom=(8,), top=(8,)))
SPEC_NAMES = (
    "name", "architecture", "tables", "files", "version", "format", "preprocessing", "metrics", "kind", "dense", "dim",
    "bottom", "top", "pooling", "rows", "dtype",
)  # fmt: skip


read_cards = msgspec.json.Decoder(list[ModelCard]).decode


def narrowed(request: InferRequest) -> InferRequest:
    """Of what gRPC's messages hold."""
    return InferRequest(request.id, request.inputs, request.budget_us, priority=request.priority)


def answer_again(answer: InferAnswer) -> InferAnswer:
    in_json, packed = (codec.decode_answer(codec.encode_answer(answer, spelling)) for spelling in Spelling)
    assert in_json == packed
    return packed


TARGETS = {
    "HTTP, JSON": Target(
        hostile(PLAIN[0], BODY[: int(LENGTH)]) | trees(*REQUEST_NAMES).map(in_json) | depths(*REQUEST_NAMES),
        read_http_json, (Refused,), requests, http_json_again,
    ),
    "HTTP, binary tensors": Target(
        st.tuples(lengths, bodies), read_http_binary, (Refused,),
        requests, lambda request: read_http_binary(behind_json(request)),
    ),
    "HTTP, msgpack": Target(
        hostile(PLAIN[1]) | trees("a").map(in_msgpack), read_http_msgpack, (Refused,), requests, http_msgpack_again
    ),
    "HTTP, compressed bodies": Target(
        st.tuples(st.sampled_from(sorted(http_codec.ENCODINGS)), compressed), read_inflated, (Refused,),
        st.binary(max_size=300), inflated_again, memory=6 * LIMIT + 200_000,
    ),
    "HTTP, model control": Target(
        hostile(b'{"parameters":{"unload_dependents":true}}', b'{"ready":true}')
        | trees("parameters", "ready", "config").map(in_json) | depths("parameters", "ready"), read_action, (Refused,),
        st.dictionaries(st.text(max_size=8), st.text() | st.booleans() | micros, max_size=4).map(RepositoryAction),
        lambda action: http_verbs.read_action(msgspec.json.encode(action)),
    ),
    "gRPC, ModelInferRequest": Target(
        hostile(message_of(REQUEST), typed_message()), read_grpc, (Refused,), requests.map(narrowed), grpc_again
    ),
    "NATS, requests": Target(
        hostile(*PLAIN) | st.sampled_from(sorted(HOSTILE.values())), read_wire, (Refused,), requests, wire_again
    ),
    "NATS, answers": Target(
        hostile(*SAMPLES), codec.decode_answer, (msgspec.MsgspecError,), scored | failed, answer_again
    ),
    **{f"NATS, {name}": spoken(kind, valid) for name, (kind, valid) in internal.items()},
    "NATS, model cards": Target(
        hostile(b'[{"digest":"","spec":%s}]' % SPEC) | depths("digest", "spec", *SPEC_NAMES).map(b"[%s]".__mod__),
        read_cards, UNDECODABLE, st.lists(st.builds(ModelCard, texts, specs), max_size=2),
        lambda cards: read_cards(msgspec.json.encode(cards)),
    ),
    "tokens file": Target(hostile(TOKENS), tokens.parse, (ValueError,), token_files, tokens_again),
    "model.json": Target(
        hostile(SPEC) | trees(*SPEC_NAMES).map(in_json) | depths(*SPEC_NAMES), read_model, (ArtifactError,),
        specs, lambda spec: read_model(msgspec.json.encode(spec)),
    ),
}  # fmt: skip
