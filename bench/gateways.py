"""What a gateway costs beside a bare echo on the same server library: `python -m narsil_stream.bench.gateways`.

Requests of 100 one-hot rows, 64 in flight from one client process, over HTTP in JSON and with binary tensors, and over
gRPC with raw contents. Two servers take turns in one run: the whole pipeline of `narsil serve` with a model that costs
next to nothing, and an echo (granian, grpc.aio; uvloop both) that takes the same request bytes, gives the same answer
bytes, and decodes nothing. An answer of the gateway is compared with the reference before anything is timed.

`requests` is throughput from the client's end: all processes share this machine's cores. `cpu` is the processor time of
the one server process for each request, by /proc: what the door itself costs, whatever else runs. A process that is
woken for each request costs more than one that finds many: hence a third turn, the echo at the gateway's pace.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
import uvloop
from granian.constants import Interfaces
from granian.server.embed import Server
from grpc import aio
from numpy.typing import NDArray

from narsil_stream.bench.report import machine
from narsil_stream.core.ports import free_port
from narsil_stream.kernels import reference
from narsil_stream.kernels.artifact import write
from narsil_stream.kernels.backend import RaggedBatch
from narsil_stream.kernels.init import criteo_spec, random_batch, random_model
from narsil_stream.schemas.protobuf import SERVICE, message_class

GRPC_INFER = f"/{SERVICE.full_name}/ModelInfer"
HTTP_INFER = "/v2/models/bench/infer"
IN_FLIGHT = 64
ROWS = 100
READY_S = 60.0
TIMEOUT_US = int(READY_S * 1e6)
"""A busy machine is no reason to give up."""

PACED = "echo at the gateway's pace"

Call = Callable[[bytes], Awaitable[bytes]]
Connect = Callable[[int], contextlib.AbstractAsyncContextManager[Call]]


class Round(NamedTuple):
    requests_per_s: float
    cpu_us: float
    """Processor time of the server process for each request."""


class Case(NamedTuple):
    """One way to ask, at both servers. `scores` reads an answer."""

    door: str
    name: str
    request: bytes
    connect: Connect
    scores: Callable[[bytes], NDArray[np.float32]]


# Requests


def cases(batch: RaggedBatch) -> list[Case]:
    dense, ids = batch.dense, batch.ids.reshape(batch.rows, -1)
    tensors = {"dense": ("FP32", dense), "sparse": ("INT32", ids)}
    described: list[dict[str, Any]] = [
        {"name": n, "datatype": t, "shape": list(a.shape)} for n, (t, a) in tensors.items()
    ]
    parameters = {"timeout": TIMEOUT_US}
    in_json = [one | {"data": tensors[one["name"]][1].reshape(-1).tolist()} for one in described]
    behind = [one | {"parameters": {"binary_data_size": tensors[one["name"]][1].nbytes}} for one in described]
    plain = json.dumps({"inputs": in_json, "parameters": parameters}).encode()
    head = json.dumps({"inputs": behind, "parameters": parameters | {"binary_data_output": True}}).encode()
    binary = head + dense.tobytes() + ids.tobytes()
    length = f"inference-header-content-length: {len(head)}\r\n"
    return [
        Case("http", "HTTP, JSON", _http(plain, ""), over_http, _json_scores),
        Case("http", "HTTP, binary", _http(binary, length), over_http, _raw_scores),
        Case("grpc", "gRPC, raw", _grpc(dense, ids), over_grpc, _grpc_scores),
    ]


def _http(body: bytes, headers: str) -> bytes:
    return f"POST {HTTP_INFER} HTTP/1.1\r\nhost: bench\r\n{headers}content-length: {len(body)}\r\n\r\n".encode() + body


def _grpc(dense: NDArray[Any], ids: NDArray[Any]) -> bytes:
    message = message_class("ModelInferRequest")(model_name="bench", id="0")
    message.inputs.add(name="dense", datatype="FP32", shape=dense.shape)
    message.inputs.add(name="sparse", datatype="INT32", shape=ids.shape)
    message.parameters["timeout"].int64_param = TIMEOUT_US
    message.raw_input_contents.extend([dense.tobytes(), ids.tobytes()])
    data: bytes = message.SerializeToString()
    return data


def _json_scores(answer: bytes) -> NDArray[np.float32]:
    return np.array(json.loads(answer)["outputs"][0]["data"], np.float32)


def _raw_scores(answer: bytes) -> NDArray[np.float32]:
    return np.frombuffer(answer[-4 * ROWS :], np.float32)


def _grpc_scores(answer: bytes) -> NDArray[np.float32]:
    message = message_class("ModelInferResponse").FromString(answer)
    return np.frombuffer(message.raw_output_contents[0], np.float32)


# Servers


@contextlib.contextmanager
def pipeline(folder: Path) -> Iterator[dict[str, tuple[int, int]]]:
    """`narsil serve` for the model: port and process of the gateway behind each door."""
    ports = [word for door in ("http", "grpc", "metrics", "nats") for word in (f"--{door}-port", "0")]
    command = [sys.executable, "-m", "narsil_stream.cli", "serve", "--model", str(folder / "model"), "--data-dir",
               str(folder), "--log-level", "warning", *ports]  # fmt: skip
    with _process(command) as process:
        (metrics,) = _line(process, r"http://\S+:(\d+)/metrics")
        with urllib.request.urlopen(f"http://127.0.0.1:{metrics}/health", timeout=5) as response:
            actors = json.load(response)["actors"]
        found = ((re.match(r"(http|grpc)://[^,]*:(\d+)", row["detail"]), row["pid"]) for row in actors)
        yield {door[1]: (int(door[2]), int(pid)) for door, pid in found if door is not None}


@contextlib.contextmanager
def echo(door: str, answer: bytes) -> Iterator[tuple[int, int]]:
    """The port and process of a server that gives this answer to everything."""
    with _process([sys.executable, "-m", "narsil_stream.bench.gateways", f"--echo-{door}", answer.hex()]) as process:
        (port,) = _line(process, r"echo on (\d+)")
        yield int(port), process.pid


async def echo_grpc(answer: bytes) -> None:
    async def infer(_: bytes, __: Any) -> bytes:
        return answer

    server = aio.server()
    handlers = {"ModelInfer": grpc.unary_unary_rpc_method_handler(infer)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE.full_name, handlers),))
    print(f"echo on {server.add_insecure_port('127.0.0.1:0')}", flush=True)
    await server.start()
    await server.wait_for_termination()


async def echo_http(answer: bytes) -> None:
    async def infer(_: Any, proto: Any) -> None:
        await proto()
        proto.response_bytes(200, [("content-type", "application/json")], answer)

    port = free_port("127.0.0.1", 0, "http.port")
    server = Server(infer, port=port, interface=Interfaces.RSGI, websockets=False, backlog=1_024, log_enabled=False)
    print(f"echo on {port}", flush=True)
    await server.serve()


@contextlib.contextmanager
def _process(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.terminate()
        process.communicate()


def _line(process: subprocess.Popen[str], pattern: str) -> tuple[str, ...]:
    assert process.stdout is not None
    for line in process.stdout:
        if found := re.search(pattern, line):
            return found.groups()
    raise RuntimeError(f"{process.args!r} ended with {process.wait()}")


# The client


@contextlib.asynccontextmanager
async def over_grpc(port: int) -> AsyncIterator[Call]:
    async with aio.insecure_channel(f"127.0.0.1:{port}", [("grpc.use_local_subchannel_pool", 1)]) as channel:
        infer = channel.unary_unary(GRPC_INFER)
        yield lambda request: infer(request, timeout=READY_S)


@contextlib.asynccontextmanager
async def over_http(port: int) -> AsyncIterator[Call]:
    """As many connections as requests in flight, kept alive."""
    free = [await _connection(port) for _ in range(IN_FLIGHT)]

    async def call(request: bytes) -> bytes:
        reader, writer = connection = free.pop()
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"(?i)\r\ncontent-length: (\d+)", head)
        assert head.startswith(b"HTTP/1.1 200 ") and length, head
        body = await reader.readexactly(int(length[1]))
        free.append(connection)
        return body

    try:
        yield call
    finally:
        for _, writer in free:
            writer.close()


async def _connection(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Tries until the server listens."""
    async with asyncio.timeout(READY_S):
        while True:
            try:
                return await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.02)


async def measured(call: Call, pid: int, request: bytes, length: int, count: int, pace: float = 0.0) -> Round:
    """`length`: of an answer, in bytes. `pace`: at most so many requests a second; 0: as many as it can."""
    left = iter(range(count))

    async def ask() -> None:
        for number in left:
            if pace and (early := started + number / pace - time.perf_counter()) > 0:
                await asyncio.sleep(early)
            assert len(await call(request)) == length, "an answer of another length"

    before, started = _cpu_s(pid), time.perf_counter()
    await asyncio.gather(*(ask() for _ in range(IN_FLIGHT)))
    took = time.perf_counter() - started
    return Round(count / took, (_cpu_s(pid) - before) / count * 1e6)


def _cpu_s(pid: int) -> float:
    """Processor time that a process has used, with its threads, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def compare(folder: Path, rounds: int, count: int) -> dict[tuple[str, str], list[Round]]:
    write(folder / "model", random_model(criteo_spec("bench", rows=1_000, dim=4, bottom=(8,), top=(8,)), seed=1))
    model = reference.load(folder / "model")
    batch, scores = random_batch(model.spec, ROWS, seed=2), np.empty(ROWS, np.float32)
    model.run(batch, scores)
    found: dict[tuple[str, str], list[Round]] = {}
    with pipeline(folder) as doors:
        for case in cases(batch):
            port, pid = doors[case.door]
            async with case.connect(port) as gateway:
                answer = await gateway(case.request)
                assert np.allclose(case.scores(answer), scores, atol=1e-6), f"wrong scores over {case.name}"
                with echo(case.door, answer) as (echo_port, echo_pid):
                    async with case.connect(echo_port) as echoed:
                        for number in range(rounds + 1):
                            asked = case.request, len(answer), count
                            bare = await measured(echoed, echo_pid, *asked)
                            own = await measured(gateway, pid, *asked)
                            paced = await measured(echoed, echo_pid, *asked, own.requests_per_s)
                            if number:  # the first round warms up
                                for name, one in {"echo": bare, PACED: paced, "gateway": own}.items():
                                    found.setdefault((case.name, name), []).append(one)
    return found


def text(found: dict[tuple[str, str], list[Round]]) -> str:
    middle = {key: Round(*map(statistics.median, zip(*rounds, strict=True))) for key, rounds in found.items()}
    spread = {key: Round(*(max(v) - min(v) for v in zip(*rounds, strict=True))) for key, rounds in found.items()}
    lines = [
        "| over | server | requests/s | ratio to echo | cpu, µs a request | cpu of the paced echo / its cpu |",
        "|---|---|---|---|---|---|",
    ]
    for (case, name), (speed, cpu) in middle.items():
        bare, paced = middle[case, "echo"], middle[case, PACED]
        speed_noise, cpu_noise = (value / 2 for value in spread[case, name])
        lines.append(
            f"| {case} | {name} | {speed:.0f} ± {speed_noise:.0f} | {speed / bare.requests_per_s:.2f}"
            f" | {cpu:.0f} ± {cpu_noise:.0f} | {paced.cpu_us / cpu:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=4_000, help="in each round, on each side")
    for door in ("http", "grpc"):
        parser.add_argument(f"--echo-{door}", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.echo_http:
        uvloop.run(echo_http(bytes.fromhex(arguments.echo_http)))
    elif arguments.echo_grpc:
        uvloop.run(echo_grpc(bytes.fromhex(arguments.echo_grpc)))
    else:
        print("\n".join(f"{name}: {value}" for name, value in machine().items()), flush=True)
        print(f"{ROWS} rows a request, {IN_FLIGHT} in flight, {arguments.rounds} rounds of {arguments.requests}\n")
        with tempfile.TemporaryDirectory(prefix="narsil-bench-") as folder:
            print(text(uvloop.run(compare(Path(folder), arguments.rounds, arguments.requests))))


if __name__ == "__main__":
    main()
