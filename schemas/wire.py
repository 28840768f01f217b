"""Version 1 of what travels on public subjects: one content, two spellings.

JSON is the Open Inference Protocol's infer request; msgpack is the same content as arrays with raw tensor bytes. They
are told apart by the first byte. Structs only grow: new fields last, with a default. `schemas/codec.py` converts.
"""

from typing import Annotated, Any

from msgspec import Meta, Raw, Struct, field

Micros = Annotated[int, Meta(ge=0, le=2**53)]
Priority = Annotated[int, Meta(ge=0, le=255)]
MAX_ID, MAX_TENANT = 256, 128
Tenant = Annotated[str, Meta(max_length=MAX_TENANT)]
Id = Annotated[str, Meta(max_length=MAX_ID)]
Dim = Annotated[int, Meta(ge=0, le=2**53)]
Shape = Annotated[tuple[Dim, ...], Meta(max_length=8)]


class Tensor(Struct, array_like=True, frozen=True, gc=False):
    """A named array."""

    name: str
    dtype: str
    """The Open Inference Protocol's datatype: FP32, INT32, INT64 ..."""
    shape: Shape
    """In elements."""
    data: memoryview
    """Raw little-endian elements in C order."""


class InferRequest(Struct, array_like=True, frozen=True, gc=False):
    """One request to score rows. The subject names the model."""

    id: Id
    """The sender's own; the answer repeats it."""
    inputs: Annotated[tuple[Tensor, ...], Meta(max_length=64)]
    """`dense` FP32 [B, n_dense], and either `sparse` INT32|INT64 [B, n_sparse], or `values` INT32|INT64 [N] with
    `lengths` INT32 [B, n_sparse]."""
    budget_us: Micros = 0
    """Time that the sender gives, from when it is received, in microseconds. 0: the server's default."""
    sent_us: Micros = 0
    """Unix time when sent, in microseconds; only to drop what a reconnecting client's buffer delivers late.
    0: not said."""
    priority: Priority = 0
    """1 is the most urgent; 0: the server's default class."""
    traceparent: Annotated[str, Meta(max_length=128)] = ""
    """W3C trace context, empty when the request is not sampled."""
    tenant: Tenant = ""
    """On whose behalf: tenants share what there is. A gateway that asks for tokens puts the token's name here."""


class InferAnswer(Struct, array_like=True, frozen=True, gc=False):
    """Scores, or an error of the error table."""

    id: str
    outputs: tuple[Tensor, ...] = ()
    """`scores` FP32 [B]; empty with a fault."""
    model: str = ""
    version: str = ""
    fault: str = ""
    """Name of a row of the error table; empty when scored."""
    detail: str = ""
    """For people: what was wrong, where, and what was expected."""
    retry_after_us: int = 0
    """When to try again, in microseconds from now; 0: not said."""


class JsonTensor(Struct, frozen=True):
    """A named array."""

    name: str
    shape: Shape
    """In elements."""
    datatype: str
    """FP32, INT32, INT64 ..."""
    data: Raw = Raw(b"[]")
    """Numbers, flat or nested as `shape` says."""


class JsonParameters(Struct, frozen=True, omit_defaults=True):
    timeout: Micros = 0
    """`InferRequest.budget_us`: time that the sender gives, in microseconds. 0: the server's default."""
    sent_us: Micros = 0
    """Unix time when sent, in microseconds. 0: not said."""
    priority: Priority = 0
    """1 is the most urgent; 0: the server's default class."""
    traceparent: Annotated[str, Meta(max_length=128)] = ""
    tenant: Tenant = ""
    """On whose behalf: tenants share what there is. Where a token is needed, its name counts instead."""


class JsonOutputWish(Struct, frozen=True):
    """An output that the answer shall hold. There is one: `scores`."""

    name: str
    parameters: dict[str, Any] = field(default_factory=dict)


class JsonRequest(Struct, frozen=True, omit_defaults=True):
    """The Open Inference Protocol's infer request."""

    inputs: Annotated[tuple[JsonTensor, ...], Meta(max_length=64)]
    """As `InferRequest.inputs`."""
    id: Id = ""
    parameters: JsonParameters = JsonParameters()
    outputs: Annotated[tuple[JsonOutputWish, ...], Meta(max_length=64)] = ()


class JsonOutput(Struct, frozen=True):
    """`scores` FP32 [B]."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Raw
    """Numbers, flat."""


class JsonAnswer(Struct, frozen=True, omit_defaults=True):
    """The Open Inference Protocol's infer response."""

    model_name: str
    model_version: str
    outputs: tuple[JsonOutput, ...]
    id: str = ""


class JsonError(Struct, frozen=True, omit_defaults=True):
    """The Open Inference Protocol's error response; `error` is always there, which tells it from scores."""

    error: str
    """For people: what was wrong, where, and what was expected."""
    code: str = ""
    """Name of a row of the error table."""
    retry_after_us: int = 0
    """When to try again, in microseconds from now; 0: not said."""
    id: str = ""
