"""What the gRPC gateway costs beside a bare grpc.aio echo: `python -m narsil_stream.bench.grpc_echo`.

Requests of 100 one-hot rows, 64 in flight from one client process, against two servers that take turns in one run: the
whole pipeline of `narsil serve` with one process of each kind and a model that costs next to nothing, and an echo on
grpc.aio and uvloop that takes the same request bytes and gives the same answer bytes, and decodes nothing. An answer
of the gateway is compared with the reference before anything is timed.

`requests` is throughput from the client's end: all processes share this machine's cores. `cpu` is the processor time of
the one server process for each request, by /proc: what the door itself costs, whatever else runs.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
import uvloop
from grpc import aio

from narsil_stream.kernels import reference
from narsil_stream.kernels.artifact import write
from narsil_stream.kernels.init import criteo_spec, random_batch, random_model
from narsil_stream.schemas.protobuf import SERVICE, message_class

INFER = f"/{SERVICE.full_name}/ModelInfer"
IN_FLIGHT = 64
ROWS = 100
READY_S = 60.0


class Round(NamedTuple):
    requests_per_s: float
    cpu_us: float
    """Processor time of the server process for each request."""


class Load(NamedTuple):
    request: bytes
    answer: bytes


def request(folder: Path) -> tuple[bytes, np.ndarray[Any, Any]]:
    """A request to the model in `folder`, made there, and its scores."""
    write(folder, random_model(criteo_spec("bench", rows=1_000, dim=4, bottom=(8,), top=(8,)), seed=1))
    model = reference.load(folder)
    batch = random_batch(model.spec, ROWS, seed=2)
    scores = np.empty(ROWS, np.float32)
    model.run(batch, scores)
    message = message_class("ModelInferRequest")(model_name="bench", id="0")
    message.inputs.add(name="dense", datatype="FP32", shape=batch.dense.shape)
    message.inputs.add(name="sparse", datatype="INT32", shape=(ROWS, model.spec.n_sparse))
    message.parameters["timeout"].int64_param = int(READY_S * 1e6)  # a busy machine is no reason to give up
    message.raw_input_contents.extend([batch.dense.tobytes(), batch.ids.tobytes()])
    return message.SerializeToString(), scores


# Servers


@contextlib.contextmanager
def pipeline(folder: Path) -> Iterator[tuple[int, int]]:
    """`narsil serve` for the model: the gRPC gateway's port and process."""
    ports = [word for door in ("grpc", "metrics", "nats") for word in (f"--{door}-port", "0")]
    command = [sys.executable, "-m", "narsil_stream.cli", "serve", "--model", str(folder / "model"), "--data-dir",
               str(folder), "--http-processes", "0", "--log-level", "warning", *ports]  # fmt: skip
    with _process(command) as process:
        (metrics,) = _line(process, r"http://\S+:(\d+)/metrics")
        with urllib.request.urlopen(f"http://127.0.0.1:{metrics}/health", timeout=5) as response:
            gateways = [row for row in json.load(response)["actors"] if row["detail"].startswith("grpc://")]
        yield int(gateways[0]["detail"].partition(",")[0].rpartition(":")[2]), int(gateways[0]["pid"])


@contextlib.contextmanager
def echo(answer: bytes) -> Iterator[tuple[int, int]]:
    """The port and process of a server that gives this answer to everything."""
    with _process([sys.executable, "-m", "narsil_stream.bench.grpc_echo", "--echo", answer.hex()]) as process:
        (port,) = _line(process, r"echo on (\d+)")
        yield int(port), process.pid


async def serve_echo(answer: bytes) -> None:
    async def infer(_: bytes, __: Any) -> bytes:
        return answer

    server = aio.server()
    handlers = {"ModelInfer": grpc.unary_unary_rpc_method_handler(infer)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE.full_name, handlers),))
    print(f"echo on {server.add_insecure_port('127.0.0.1:0')}", flush=True)
    await server.start()
    await server.wait_for_termination()


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
async def caller(port: int) -> AsyncIterator[Any]:
    async with aio.insecure_channel(f"127.0.0.1:{port}", [("grpc.use_local_subchannel_pool", 1)]) as channel:
        yield channel.unary_unary(INFER)


async def measured(call: Any, pid: int, asked: Load, count: int) -> Round:
    left = iter(range(count))

    async def ask() -> None:
        for _ in left:
            answer = await call(asked.request, timeout=READY_S)
            assert len(answer) == len(asked.answer), "an answer of another length"

    before, started = _cpu_s(pid), time.perf_counter()
    await asyncio.gather(*(ask() for _ in range(IN_FLIGHT)))
    took = time.perf_counter() - started
    return Round(count / took, (_cpu_s(pid) - before) / count * 1e6)


def _cpu_s(pid: int) -> float:
    """Processor time that a process has used, with its threads, in seconds."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def compare(folder: Path, rounds: int, count: int) -> dict[str, list[Round]]:
    asked, scores = request(folder / "model")
    found: dict[str, list[Round]] = {"echo": [], "gateway": []}
    with pipeline(folder) as (gateway_port, gateway_pid):
        async with caller(gateway_port) as gateway:
            answer = await gateway(asked, timeout=READY_S)
            raw = message_class("ModelInferResponse").FromString(answer).raw_output_contents[0]
            assert np.allclose(np.frombuffer(raw, np.float32), scores, atol=1e-6), "the gateway's scores are wrong"
            load = Load(asked, answer)
            with echo(answer) as (echo_port, echo_pid):
                async with caller(echo_port) as echoed:
                    for number in range(rounds + 1):
                        for name, call, pid in (("echo", echoed, echo_pid), ("gateway", gateway, gateway_pid)):
                            one = await measured(call, pid, load, count)
                            if number:  # the first round warms up
                                found[name].append(one)
    return found


def text(found: dict[str, list[Round]]) -> str:
    middle = {name: Round(*map(statistics.median, zip(*rounds, strict=True))) for name, rounds in found.items()}
    spread = {name: Round(*(max(v) - min(v) for v in zip(*rounds, strict=True))) for name, rounds in found.items()}
    lines = [
        "| server | requests/s | ratio to echo | cpu, µs a request | ratio, echo's to it |",
        "|---|---|---|---|---|",
    ]
    bare = middle["echo"]
    for name, (speed, cpu) in middle.items():
        speed_noise, cpu_noise = (value / 2 for value in spread[name])
        lines.append(
            f"| {name} | {speed:.0f} ± {speed_noise:.0f} | {speed / bare.requests_per_s:.2f}"
            f" | {cpu:.0f} ± {cpu_noise:.0f} | {bare.cpu_us / cpu:.2f} |"
        )
    return "\n".join(lines)


def about(arguments: argparse.Namespace) -> str:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return (
        f"grpcio {grpc.__version__}, uvloop {uvloop.__version__}, Python {platform.python_version()},"
        f" {os.cpu_count()} cores, {ROWS} rows a request, {IN_FLIGHT} in flight, {arguments.rounds} rounds of"
        f" {arguments.requests} requests on each side, commit {commit or 'unknown'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=4_000, help="in each round, on each side")
    parser.add_argument("--echo", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.echo:
        uvloop.run(serve_echo(bytes.fromhex(arguments.echo)))
        return
    print(about(arguments) + "\n", flush=True)
    with tempfile.TemporaryDirectory(prefix="narsil-bench-") as folder:
        print(text(uvloop.run(compare(Path(folder), arguments.rounds, arguments.requests))))


if __name__ == "__main__":
    main()
