"""Ways to ask that owe nothing to our own client: plain HTTP, nats-py, bytes on a socket."""

import asyncio
import contextlib
import http.client
import json
import re
import socket
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import nats
import numpy as np
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from numpy.typing import NDArray

from narsil_stream.kernels.artifact import read_spec
from narsil_stream.kernels.init import random_batch
from narsil_stream.schemas import codec
from narsil_stream.schemas.wire import InferRequest
from tests.support import PATIENCE_S, expected

Dense = NDArray[np.float32]
Ids = NDArray[np.int32]


class Rows(NamedTuple):
    dense: Dense
    ids: Ids
    scores: NDArray[np.float32]
    """What the reference backend says."""

    def part(self, *rows: int) -> "Rows":
        at = list(rows)
        return Rows(self.dense[at], self.ids[at], self.scores[at])


def some_rows(model: Path, count: int, seed: int = 5) -> Rows:
    """Random one-hot rows for an artifact, and their scores."""
    spec = read_spec(model)
    batch = random_batch(spec, count, seed)
    ids = batch.ids.reshape(count, spec.n_sparse)
    return Rows(batch.dense, ids, expected(model, batch.dense, ids))


def infer_json(rows: Rows, *, nested: bool = False, id: str = "", **parameters: int) -> dict[str, Any]:
    """An Open Inference Protocol request as other people's clients write it."""
    inputs = [("dense", "FP32", rows.dense), ("sparse", "INT64", rows.ids)]
    return {
        "inputs": [
            {"name": n, "datatype": t, "shape": list(a.shape), "data": (a if nested else a.reshape(-1)).tolist()}
            for n, t, a in inputs
        ],
        **({"id": id} if id else {}),
        **({"parameters": parameters} if parameters else {}),
    }


def infer_msgpack(rows: Rows, **fields: Any) -> bytes:
    inputs = (codec.tensor("dense", rows.dense), codec.tensor("sparse", rows.ids))
    return codec.encode_request(InferRequest(fields.pop("id", ""), inputs, **fields), codec.Spelling.MSGPACK)


def json_scores(answer: Any) -> list[float]:
    """The scores in an answer in JSON; says what it is when it is none."""
    assert "outputs" in answer, answer
    (output,) = answer["outputs"]
    assert (output["name"], output["datatype"], output["shape"]) == ("scores", "FP32", [len(output["data"])])
    scores: list[float] = output["data"]
    return scores


class HttpAnswer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class HttpCaller:
    """One connection to a gateway, kept alive."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)

    def __call__(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> HttpAnswer:
        """`body`: bytes, an iterator of bytes for a chunked one, or anything for JSON."""
        if isinstance(body, dict | list):
            body = json.dumps(body).encode()
        self._connection.request(method, path, body, dict(headers or {}))
        response = self._connection.getresponse()
        return HttpAnswer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._connection.close()


def ask_http(port: int, method: str, path: str, body: Any = None, **headers: str) -> HttpAnswer:
    """One request on a connection of its own."""
    with HttpCaller(port) as call:
        return call(method, path, body, headers)


class Producer:
    """A NATS client that knows nothing of us: nats-py, asked from ordinary code."""

    def __init__(self, url: str, **login: Any) -> None:
        """`login`: further arguments for nats-py."""
        self._url = url
        self._login = login
        self._loop = asyncio.new_event_loop()

    def __enter__(self) -> Self:
        self.nats = self._do(nats.connect(self._url, connect_timeout=5, allow_reconnect=False, **self._login))
        return self

    def __exit__(self, *error: object) -> None:
        with contextlib.suppress(nats.errors.Error, OSError):
            self._do(self.nats.close())
        self._loop.close()

    def ask(self, subject: str, payload: Any, timeout: float = PATIENCE_S) -> Msg:
        """The answer. Raises nats.errors.TimeoutError or NoRespondersError."""
        return self._do(self.nats.request(subject, _payload(payload), timeout=timeout))

    def ask_all(self, subject: str, payload: bytes = b"", count: int = 1) -> list[Msg]:
        """The first `count` answers."""
        heard = self.listen(inbox := self.nats.new_inbox())
        self.publish(subject, payload, inbox)
        return [self.next(heard) for _ in range(count)]

    def listen(self, subject: str) -> Subscription:
        heard = self._do(self.nats.subscribe(subject))
        self._do(self.nats.flush())
        return heard

    def next(self, heard: Subscription, timeout: float = PATIENCE_S) -> Msg:
        return self._do(heard.next_msg(timeout=timeout))

    def publish(self, subject: str, payload: Any, reply: str = "") -> None:
        """Returns when the broker has taken it."""
        self._do(self.nats.publish(subject, _payload(payload), reply))
        self._do(self.nats.flush())

    def _do(self, work: Any) -> Any:
        return self._loop.run_until_complete(work)


def _payload(payload: Any) -> bytes:
    return payload if isinstance(payload, bytes) else json.dumps(payload).encode()


class RawProducer:
    """Bytes to a NATS server, unchecked by any client library."""

    def __init__(self, url: str) -> None:
        self._socket = socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), PATIENCE_S)
        self._lines = self._socket.makefile("rb")
        self._lines.readline()
        self._socket.sendall(b'CONNECT {"verbose":false,"pedantic":false,"headers":true,"no_responders":true}\r\n')

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._lines.close()
        self._socket.close()

    def publish(self, subject: bytes, payload: bytes, reply: bytes = b"", headers: bytes = b"") -> bytes:
        """What the server says to it: PONG when it was taken, an error, or nothing when it cut the connection."""
        words = [b"HPUB" if headers else b"PUB", subject, *([reply] if reply else [])]
        words += [b"%d" % len(headers)] if headers else []
        words.append(b"%d" % (len(headers) + len(payload)))
        with contextlib.suppress(OSError):
            self._socket.sendall(b" ".join(words) + b"\r\n" + headers + payload + b"\r\nPING\r\n")
            return self._lines.readline()
        return b""


def metric(exposition: str, name: str, **labels: str) -> float:
    """The sum of a metric's samples that have these labels."""
    total = 0.0
    for line in exposition.splitlines():
        found = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line)
        if found and found[1] == name:
            given = dict(re.findall(r'(\w+)="([^"]*)"', found[2] or ""))
            if labels.items() <= given.items():
                total += float(found[3])
    return total


def scrape(port: int) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=PATIENCE_S) as response:
        text: str = response.read().decode()
    return text
