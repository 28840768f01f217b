"""What load generators ask: the same rows in each protocol, and whether an answer is right."""

import functools
import json
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from narsil_stream.kernels.backend import Backend, RaggedBatch
from narsil_stream.kernels.init import random_batch
from narsil_stream.schemas import codec, subjects
from narsil_stream.schemas.protobuf import SERVICE, message_class
from narsil_stream.schemas.wire import InferRequest

Transport = Literal["http", "grpc", "nats"]
Scores = NDArray[np.float32]

MODEL = "bench"
HTTP_INFER = f"/v2/models/{MODEL}/infer"
GRPC_INFER = f"/{SERVICE.full_name}/ModelInfer"
TIMEOUT_US = 60_000_000
"""A busy machine is no reason to give up."""


class Question(Struct, frozen=True):
    """One way to ask for some rows. `path`: of HTTP or gRPC, or the subject."""

    transport: Transport
    path: str
    headers: dict[str, str]
    body: bytes


class Way(NamedTuple):
    """A door of a server. `ask` spells a batch, `scores` reads an answer to so many rows."""

    name: str
    """http: msgpack; http-binary: Triton's binary tensors; grpc: raw contents; nats: msgpack."""
    transport: Transport
    ask: Callable[[RaggedBatch], Question]
    scores: Callable[[bytes, int], Scores]


class Misbehaved(Exception):
    """A server under test did not do what it must; no figure of it counts."""

    def __init__(self, server: str, detail: str) -> None:
        super().__init__(f"{server}: {detail}")
        self.server = server


class WrongAnswer(Misbehaved):
    """A server whose scores are not the expected ones: it is not timed."""


class Asked(NamedTuple):
    """A question, what it weighs without its protocol's framing in bytes, and the right scores."""

    question: Question
    tensor_bytes: int
    scores: Scores


def asked(way: Way, backend: Backend, rows: int, count: int) -> list[Asked]:
    """Different random questions; the same on every call. `backend` knows the right scores."""
    found = []
    for seed in range(count):
        batch, scores = _scored(backend, rows, seed)  # type: ignore[arg-type]
        found.append(Asked(way.ask(batch), batch.dense.nbytes + batch.ids.nbytes, scores))
    return found


@functools.lru_cache(maxsize=1024)
def _scored(backend: Backend, rows: int, seed: int) -> tuple[RaggedBatch, Scores]:
    """Kept, because the reference takes its time and every server is asked the same."""
    batch, scores = random_batch(backend.spec, rows, seed), np.empty(rows, np.float32)
    backend.run(batch, scores)
    return batch, scores


def check(name: str, way: Way, one: Asked, answer: bytes, tolerance: float) -> None:
    """Raise WrongAnswer unless the answer holds the right scores."""
    try:
        found = way.scores(answer, len(one.scores))
        apart = float(np.abs(found - one.scores).max()) if found.shape == one.scores.shape else float("nan")
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise WrongAnswer(name, f"no scores in the answer {answer[:200]!r}: {error}") from error
    if not apart <= tolerance:
        raise WrongAnswer(name, f"scores differ from the reference by {apart:g}, more than {tolerance:g}")


def _tensors(batch: RaggedBatch) -> dict[str, tuple[str, NDArray[Any]]]:
    return {"dense": ("FP32", batch.dense), "sparse": ("INT32", batch.ids.reshape(batch.rows, -1))}


def msgpack(batch: RaggedBatch) -> bytes:
    """The wire's request: what NATS producers send, and HTTP clients that care for speed."""
    inputs = tuple(codec.tensor(name, array) for name, (_, array) in _tensors(batch).items())
    return codec.encode_request(InferRequest("0", inputs, budget_us=TIMEOUT_US), codec.Spelling.MSGPACK)


def binary(batch: RaggedBatch, path: str = HTTP_INFER) -> Question:
    """JSON with the tensors' bytes behind it, as Triton has it."""
    inputs = [
        {"name": name, "datatype": kind, "shape": list(array.shape), "parameters": {"binary_data_size": array.nbytes}}
        for name, (kind, array) in _tensors(batch).items()
    ]
    parameters = {"timeout": TIMEOUT_US, "binary_data_output": True}
    head = json.dumps({"inputs": inputs, "parameters": parameters}).encode()
    body = head + b"".join(array.tobytes() for _, array in _tensors(batch).values())
    headers = {"content-type": "application/octet-stream", "inference-header-content-length": str(len(head))}
    return Question("http", path, headers, body)


def over_http(path: str) -> Callable[[RaggedBatch], Question]:
    """The wire's msgpack as a body."""
    return lambda batch: Question("http", path, {"content-type": "application/msgpack"}, msgpack(batch))


def _grpc(batch: RaggedBatch) -> Question:
    message = message_class("ModelInferRequest")(model_name=MODEL, id="0")
    for name, (kind, array) in _tensors(batch).items():
        message.inputs.add(name=name, datatype=kind, shape=array.shape)
        message.raw_input_contents.append(array.tobytes())
    message.parameters["timeout"].int64_param = TIMEOUT_US
    return Question("grpc", GRPC_INFER, {}, message.SerializeToString())


def _nats(batch: RaggedBatch) -> Question:
    return Question("nats", subjects.infer(MODEL), {}, msgpack(batch))


def wire_scores(answer: bytes, rows: int) -> Scores:
    (output,) = codec.decode_answer(answer).outputs
    return codec.array(output)


def raw_scores(answer: bytes, rows: int) -> Scores:
    """The scores' bytes at the end of the answer."""
    return np.frombuffer(answer[-4 * rows :], np.float32)


def _grpc_scores(answer: bytes, rows: int) -> Scores:
    message = message_class("ModelInferResponse").FromString(answer)
    return np.frombuffer(message.raw_output_contents[0], np.float32)


WAYS = {
    way.name: way
    for way in (
        Way("http", "http", over_http(HTTP_INFER), wire_scores),
        Way("http-binary", "http", binary, raw_scores),
        Way("grpc", "grpc", _grpc, _grpc_scores),
        Way("nats", "nats", _nats, wire_scores),
    )
}
"""How our own pipeline is asked."""
