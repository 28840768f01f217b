"""Requests as clients may send them made into requests as batchers take them: other number types, many rows."""

import asyncio
from collections.abc import Awaitable, Callable
from itertools import pairwise
from typing import Any

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from narsil_stream.core.admission import Rows
from narsil_stream.schemas import codec
from narsil_stream.schemas.errors import Fault, Refused, invalid
from narsil_stream.schemas.model import ModelSpec
from narsil_stream.schemas.wire import InferAnswer, InferRequest, Tensor

Ask = Callable[[InferRequest], Awaitable[InferAnswer]]

MESSAGE_ROOM = 2_048
"""Bytes of a message beside its tensors: names, shapes, id, and the bundle around the request."""
OTHER_FLOATS = ("FP16", "FP64")


def converted(request: InferRequest) -> InferRequest:
    """Dense features in FP32, the one type that travels; FP64 is rounded to it, as numbers in JSON are.

    Raises INVALID_ARGUMENT for a number that FP32 cannot hold.
    """
    for tensor in request.inputs:
        if tensor.dtype in OTHER_FLOATS and tensor.name == "dense":
            return replace(request, inputs=tuple(map(_as_fp32, request.inputs)))
    return request


def _as_fp32(tensor: Tensor) -> Tensor:
    if tensor.name != "dense" or tensor.dtype not in OTHER_FLOATS:
        return tensor
    given = codec.array(tensor)
    with np.errstate(over="ignore"):
        narrow = given.astype(np.float32)
    lost = np.isinf(narrow) & np.isfinite(given)
    if lost.any():
        at = tuple(map(int, np.argwhere(lost)[0]))
        raise invalid(f"input 'dense' {list(at)} is {given[at]}; expected a number that FP32 can hold")
    return codec.tensor("dense", narrow)


def fits(request: InferRequest, max_rows: int, max_payload: int) -> bool:
    """Whether one batch and one message can hold it."""
    size = rows = 0
    for tensor in request.inputs:
        size += tensor.data.nbytes
        if tensor.name == "dense" and tensor.shape:
            rows = tensor.shape[0]
    return rows <= max_rows and size <= max_payload - MESSAGE_ROOM


def cut(request: InferRequest, rows: Rows, spec: ModelSpec, max_rows: int, max_payload: int) -> list[InferRequest]:
    """As few requests as batches and messages can hold, in the order of the rows. `rows`: the request's, checked.

    Raises TOO_LARGE when one row alone is more than a message.
    """
    dense = np.frombuffer(rows.dense, np.float32).reshape(rows.count, spec.n_dense)
    ids = np.frombuffer(rows.ids, np.int32)
    lengths = None
    if rows.lengths is not None:
        lengths = np.frombuffer(rows.lengths, np.int32).reshape(rows.count, spec.n_sparse)
    starts = _first_id_of_each_row(rows.count, spec.n_sparse, lengths)
    fixed = 4 * (spec.n_dense + (spec.n_sparse if lengths is not None else 0))
    before = 4 * starts + fixed * np.arange(rows.count + 1)  # bytes before each row
    return [
        replace(request, inputs=_part(dense, ids, lengths, starts, start, end))
        for start, end in pairwise(_cuts(before, max_rows, max_payload - MESSAGE_ROOM))
    ]


def _first_id_of_each_row(rows: int, n_sparse: int, lengths: NDArray[np.int32] | None) -> NDArray[np.int64]:
    """[rows + 1]: the last one is the number of ids."""
    each = n_sparse if lengths is None else lengths.sum(axis=1, dtype=np.int64)
    starts = np.zeros(rows + 1, np.int64)
    np.cumsum(np.broadcast_to(each, rows), out=starts[1:])
    return starts


def _cuts(before: NDArray[np.int64], max_rows: int, room: int) -> list[int]:
    """Where parts begin and end: each as long as it may be."""
    cuts, rows = [0], len(before) - 1
    while (start := cuts[-1]) < rows:
        end = int(np.searchsorted(before, before[start] + room, side="right")) - 1
        if end <= start:
            size = before[start + 1] - before[start]
            raise Refused(Fault.TOO_LARGE, f"row {start} has {size} bytes; a message holds at most {room}")
        cuts.append(min(end, start + max_rows, rows))
    return cuts


def _part(
    dense: NDArray[np.float32],
    ids: NDArray[np.int32],
    lengths: NDArray[np.int32] | None,
    starts: NDArray[np.int64],
    start: int,
    end: int,
) -> tuple[Tensor, ...]:
    """The tensors of rows `start` to `end`."""
    some: NDArray[Any] = ids[starts[start] : starts[end]]
    if lengths is None:
        return codec.tensor("dense", dense[start:end]), codec.tensor("sparse", some.reshape(end - start, -1))
    tensors = {"dense": dense[start:end], "values": some, "lengths": lengths[start:end]}
    return tuple(codec.tensor(name, values) for name, values in tensors.items())


class _Failed(Exception):
    """A part got an error for an answer."""

    def __init__(self, answer: InferAnswer) -> None:
        self.answer = answer


async def ask_all(ask: Ask, parts: list[InferRequest]) -> InferAnswer:
    """The parts' scores as one answer. The first error is the whole request's, and withdraws the other parts.

    Raises `Refused`.
    """

    async def scored(part: InferRequest) -> InferAnswer:
        answer = await ask(part)
        if answer.fault:
            raise _Failed(answer)
        return answer

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(scored(part)) for part in parts]
    except BaseExceptionGroup as failed:
        first = failed.exceptions[0]
        if isinstance(first, _Failed):
            return first.answer
        raise first from None
    answers = [task.result() for task in tasks]
    scores = np.concatenate([codec.array(answer.outputs[0]) for answer in answers])
    return replace(answers[0], outputs=(codec.tensor("scores", scores),))
