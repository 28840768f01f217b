"""Version 1 of what travels on public subjects: one content, two spellings.

JSON is the Open Inference Protocol's infer request; msgpack is the same content as arrays with raw tensor bytes. They
are told apart by the first byte. Structs only grow: new fields last, with a default. `schemas/codec.py` converts.
"""

from typing import Annotated, Any

from msgspec import Meta, Raw, Struct, field

Micros = Annotated[int, Meta(ge=0, le=2**53)]
Priority = Annotated[int, Meta(ge=0, le=255)]
Id = Annotated[str, Meta(max_length=256)]
Dim = Annotated[int, Meta(ge=0, le=2**53)]
Shape = Annotated[tuple[Dim, ...], Meta(max_length=8)]


class Tensor(Struct, array_like=True, frozen=True, gc=False):
    """`data`: raw little-endian elements in C order; `shape` in elements."""

    name: str
    dtype: str
    shape: Shape
    data: memoryview


class InferRequest(Struct, array_like=True, frozen=True, gc=False):
    """One request to score rows. The subject names the model."""

    id: Id
    inputs: Annotated[tuple[Tensor, ...], Meta(max_length=64)]
    budget_us: Micros = 0
    """Time that the sender gives, from when it is received. 0: the server's default."""
    sent_us: Micros = 0
    """Unix time when sent; only to drop what a reconnecting client's buffer delivers late. 0: not said."""
    priority: Priority = 0
    """1 is the most urgent; 0: the server's default class."""
    traceparent: Annotated[str, Meta(max_length=128)] = ""
    """W3C trace context, empty when the request is not sampled."""


class InferAnswer(Struct, array_like=True, frozen=True, gc=False):
    """Scores, or an error of the error table."""

    id: str
    outputs: tuple[Tensor, ...] = ()
    model: str = ""
    version: str = ""
    fault: str = ""
    """Name of a row of the error table; empty when scored."""
    detail: str = ""
    retry_after_us: int = 0


class JsonTensor(Struct, frozen=True):
    name: str
    shape: Shape
    datatype: str
    data: Raw = Raw(b"[]")
    """Numbers, flat or nested as `shape` says."""


class JsonParameters(Struct, frozen=True, omit_defaults=True):
    timeout: Micros = 0
    """`InferRequest.budget_us`"""
    sent_us: Micros = 0
    priority: Priority = 0
    traceparent: Annotated[str, Meta(max_length=128)] = ""


class JsonOutputWish(Struct, frozen=True):
    name: str
    parameters: dict[str, Any] = field(default_factory=dict)


class JsonRequest(Struct, frozen=True, omit_defaults=True):
    inputs: Annotated[tuple[JsonTensor, ...], Meta(max_length=64)]
    id: Id = ""
    parameters: JsonParameters = JsonParameters()
    outputs: Annotated[tuple[JsonOutputWish, ...], Meta(max_length=64)] = ()


class JsonOutput(Struct, frozen=True):
    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Raw


class JsonAnswer(Struct, frozen=True, omit_defaults=True):
    model_name: str
    model_version: str
    outputs: tuple[JsonOutput, ...]
    id: str = ""


class JsonError(Struct, frozen=True, omit_defaults=True):
    error: str
    """For people: what was wrong, where, and what was expected."""
    code: str = ""
    """Name of a row of the error table."""
    retry_after_us: int = 0
    id: str = ""
