"""Tensors in JSON: numbers, flat or nested, decoded to raw bytes in one pass.

A tensor's `datatype` selects the Struct that it is decoded to, so the numbers are checked while they are parsed, at
whatever depth they are, and packed at once.
"""

import struct
from itertools import chain
from typing import Annotated, Any, NoReturn, Union, cast

import msgspec
from msgspec import Meta, Struct

from narsil_stream.schemas.errors import invalid
from narsil_stream.schemas.wire import Id, JsonOutputWish, JsonParameters, Shape, Tensor

CODES = {
    "BOOL": "B",
    "UINT8": "B",
    "UINT16": "H",
    "UINT32": "I",
    "UINT64": "Q",
    "INT8": "b",
    "INT16": "h",
    "INT32": "i",
    "INT64": "q",
    "FP16": "e",
    "FP32": "f",
    "FP64": "d",
}
"""How `struct` packs one number. BOOL is packed as a number: code "?" takes any object."""

MAX_DIMENSIONS = 8


class TensorParameters(Struct, frozen=True):
    binary_data_size: Annotated[int, Meta(ge=0, le=2**53)] | None = None
    """Over HTTP: the tensor is that many bytes behind the JSON, in place of `data`."""
    shared_memory_region: str | None = None
    """Of Triton's shared memory extension, which is not offered."""


class Given(Struct, frozen=True):
    """A tensor as it stands in JSON."""

    name: str
    shape: Shape
    data: list[Any] = []
    parameters: TensorParameters | None = None


def _given(datatype: str) -> type[Given]:
    number: Any = {"B": bool, "F": float}.get(datatype[0], int)
    data: Any = list[number]
    for _ in range(1, MAX_DIMENSIONS):
        data = list[number | data]
    kind: Any = msgspec.defstruct(
        datatype, [("data", data, [])], bases=(Given,), frozen=True, tag_field="datatype", tag=datatype
    )
    return cast(type[Given], kind)


AnyGiven: Any = Union[tuple(map(_given, CODES))]  # noqa: UP007 made of types that are made here


def _inputs(name: str, parameters: type[JsonParameters]) -> type[Struct]:
    """`JsonRequest`, with its tensors' data decoded."""
    return msgspec.defstruct(
        name,
        [
            ("inputs", Annotated[tuple[AnyGiven, ...], Meta(max_length=64)]),
            ("id", Id, ""),
            ("parameters", parameters | None, None),
            ("outputs", Annotated[tuple[JsonOutputWish, ...], Meta(max_length=64)] | None, None),
        ],
        frozen=True,
    )


class HttpParameters(JsonParameters, frozen=True):
    binary_data_output: bool = False
    """Whether outputs come as bytes behind the JSON, unless the wish for one says otherwise."""


Outputs = msgspec.defstruct(
    "Outputs",
    [("model_name", str), ("model_version", str), ("outputs", tuple[AnyGiven, ...]), ("id", str, "")],
    frozen=True,
)
"""`JsonAnswer`, with its tensors' data decoded."""

decode_inputs: Any = msgspec.json.Decoder(_inputs("Inputs", JsonParameters)).decode
decode_http_inputs: Any = msgspec.json.Decoder(_inputs("HttpInputs", HttpParameters)).decode
decode_outputs: Any = msgspec.json.Decoder(Outputs).decode


def pack(given: Given) -> Tensor:
    """The same tensor with raw bytes. Raises INVALID_ARGUMENT for a number that its datatype cannot hold."""
    datatype = type(given).__name__
    _refuse_what_is_not_json(given)
    numbers = _flat(given)
    try:
        data = struct.pack(f"<{len(numbers)}{CODES[datatype]}", *numbers)
    except (struct.error, OverflowError):
        _refuse_first_misfit(given.name, datatype, numbers)
    return Tensor(given.name, datatype, given.shape, memoryview(data))


def _refuse_what_is_not_json(given: Given) -> None:
    said = given.parameters
    if said is None:
        return
    if said.shared_memory_region is not None:
        raise invalid(f"input '{given.name}' is in shared memory, which is not offered; send its data")
    if said.binary_data_size is not None:
        raise invalid(
            f"input '{given.name}' has binary_data_size, but no bytes follow the JSON; over HTTP, the header"
            " Inference-Header-Content-Length says where they begin"
        )


def _flat(given: Given) -> list[Any]:
    """Data without its nesting, which must be that of the shape. Flat data is left as it is."""
    data, shape = given.data, given.shape
    if not data or not isinstance(data[0], list):
        return data
    try:
        lengths = {len(data)}
        for depth, dim in enumerate(shape):
            if depth:
                lengths = set(map(len, data))
                data = list(chain.from_iterable(data))
            if not lengths <= {dim}:
                raise invalid(
                    f"input '{given.name}' has data nested with {' or '.join(map(str, sorted(lengths)[:3]))} items in"
                    f" dimension {depth}; its shape says {list(shape)}"
                )
    except TypeError:  # a number where others are lists
        raise invalid(f"input '{given.name}' has data nested unevenly; its shape says {list(shape)}") from None
    return data


def _refuse_first_misfit(name: str, datatype: str, numbers: list[Any]) -> NoReturn:
    for at, number in enumerate(numbers):
        try:
            struct.pack(f"<{CODES[datatype]}", number)
        except (struct.error, OverflowError):
            found = "a list" if isinstance(number, list) else number
            raise invalid(f"input '{name}' data[{at}] is {found}; expected {datatype}") from None
    raise AssertionError("packing all failed, packing each did not")
