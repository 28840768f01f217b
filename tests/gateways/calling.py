"""Ways to ask the gRPC gateway: Triton's client, and bytes on a channel that no client library looks at."""

import queue
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import grpc
import numpy as np
import tritonclient.grpc as triton
from numpy.typing import NDArray

from narsil_stream.schemas.protobuf import SERVICE, message_class
from tests.asking import Rows
from tests.support import PATIENCE_S, System

Scores = NDArray[np.float32]
MINUTE_US = 60_000_000


@contextmanager
def triton_client(port: int) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(f"127.0.0.1:{port}") as client:
        yield client


def triton_inputs(rows: Rows, ids: str = "INT64", dense: str = "FP32") -> list[triton.InferInput]:
    inputs = []
    for name, datatype, values in (("dense", dense, rows.dense), ("sparse", ids, rows.ids)):
        given = triton.InferInput(name, list(values.shape), datatype)
        given.set_data_from_numpy(values.astype(triton.triton_to_np_dtype(datatype)))
        inputs.append(given)
    return inputs


def close(found: Any, rows: Rows) -> bool:
    """Whether these are the rows' scores."""
    return found is not None and found.shape == rows.scores.shape and np.allclose(found, rows.scores, rtol=0, atol=1e-6)


def infer_message(rows: Rows, *, typed: bool = False, ids: str = "INT64", id: str = "", **parameters: int) -> Any:
    """A ModelInferRequest for the model "ctr"."""
    message = message_class("ModelInferRequest")(model_name="ctr", id=id)
    for name, datatype, values in (("dense", "FP32", rows.dense), ("sparse", ids, rows.ids)):
        tensor = message.inputs.add(name=name, datatype=datatype, shape=values.shape)
        if not typed:
            message.raw_input_contents.append(values.astype(triton.triton_to_np_dtype(datatype)).tobytes())
        elif datatype == "FP32":
            tensor.contents.fp32_contents.extend(values.reshape(-1).tolist())
        elif datatype == "INT64":
            tensor.contents.int64_contents.extend(values.reshape(-1).tolist())
        else:
            tensor.contents.int_contents.extend(values.reshape(-1).tolist())
    for name, value in parameters.items():
        message.parameters[name].int64_param = value
    return message


def one(rows: Rows, row: int, timeout: int = MINUTE_US) -> Any:
    """A request for one row."""
    return infer_message(rows.part(row), id=str(row), timeout=timeout)


class GrpcAnswer(NamedTuple):
    code: grpc.StatusCode
    detail: str
    body: bytes
    trailing: Mapping[str, str | bytes]

    @property
    def scores(self) -> Scores:
        assert self.code is grpc.StatusCode.OK, self
        said = message_class("ModelInferResponse").FromString(self.body)
        (output,) = said.outputs
        (raw,) = said.raw_output_contents
        assert (output.name, output.datatype, list(output.shape)) == ("scores", "FP32", [len(raw) // 4])
        return np.frombuffer(raw, np.float32)


class GrpcCaller:
    """One channel. `with GrpcCaller(port) as call: call("ModelInfer", message)`; bytes are sent as they are."""

    def __init__(self, port: int, **options: int) -> None:
        arguments = [(f"grpc.{name}", value) for name, value in options.items()]
        unlimited = [("grpc.max_receive_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}", [*unlimited, *arguments])

    def future(self, verb: str, message: Any, timeout: float | None = PATIENCE_S, **call: Any) -> Any:
        """A grpc.Future of bytes."""
        body = message if isinstance(message, bytes) else message.SerializeToString()
        return self.channel.unary_unary(f"/{SERVICE.full_name}/{verb}").future(body, timeout=timeout, **call)

    def __call__(self, verb: str, message: Any, timeout: float | None = PATIENCE_S, **call: Any) -> GrpcAnswer:
        return ended(self.future(verb, message, timeout, **call))

    def __enter__(self) -> "GrpcCaller":
        return self

    def __exit__(self, *error: object) -> None:
        self.channel.close()


def ended(future: Any) -> GrpcAnswer:
    """How a call ended, once it has."""
    code = future.code()
    trailing = dict(future.trailing_metadata() or ())
    body = future.result() if code is grpc.StatusCode.OK else b""
    return GrpcAnswer(code, future.details(), body, trailing)


def gauge(system: System, kind: str, name: str, **labels: str) -> float:
    (actor,) = system.actors(kind)
    return actor.registry.get_sample_value(name, labels) or 0.0


class Stream:
    """A ModelStreamInfer call, with requests and answers as messages."""

    def __init__(self, call: GrpcCaller) -> None:
        self._requests: queue.Queue[Any] = queue.Queue()
        method = call.channel.stream_stream(
            f"/{SERVICE.full_name}/ModelStreamInfer",
            request_serializer=lambda message: message if isinstance(message, bytes) else message.SerializeToString(),
            response_deserializer=message_class("ModelStreamInferResponse").FromString,
        )
        self.call = method(iter(self._requests.get, None), timeout=20)

    def send(self, *messages: Any) -> None:
        for message in messages:
            self._requests.put(message)

    def half_close(self) -> None:
        self._requests.put(None)

    def next(self) -> Any:
        return next(self.call)
