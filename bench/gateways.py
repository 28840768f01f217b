"""What a gateway costs beside a bare echo on the same server library: `python -m narsil_stream.bench.gateways`.

Requests of 100 one-hot rows, 64 in flight from one generator process, over HTTP in JSON and with binary tensors, and
over gRPC with raw contents. Two servers take turns in one run: the whole pipeline of `narsil serve` with the no-op
model, and an echo (granian, grpc.aio; uvloop both) that takes the same request bytes, gives the same answer bytes, and
decodes nothing. Answers of the gateway are compared with the right ones before anything is timed.

`requests` is throughput from the client's end: all processes share this machine's cores. `cpu` is the processor time of
the one server process for each request, by /proc: what the door itself costs, whatever else runs. A process that is
woken for each request costs more than one that finds many: hence a third turn, the echo at the gateway's pace.
"""

import argparse
import json
import statistics
from typing import NamedTuple

import numpy as np
from msgspec.structs import replace

from narsil_stream.bench import load, serving
from narsil_stream.bench.asking import Server, load_for
from narsil_stream.bench.load import Load
from narsil_stream.bench.questions import HTTP_INFER, TIMEOUT_US, WAYS, Question, Scores, Way, asked
from narsil_stream.bench.report import machine
from narsil_stream.bench.shell import TOLERANCE, workplace
from narsil_stream.kernels.backend import RaggedBatch

IN_FLIGHT = 64
ROWS = 100
PACED = "echo at the gateway's pace"


class Round(NamedTuple):
    requests_per_s: float
    cpu_us: float
    """Processor time of the server process for each request."""


def in_json(batch: RaggedBatch) -> Question:
    inputs = [
        {"name": name, "datatype": kind, "shape": list(array.shape), "data": array.reshape(-1).tolist()}
        for name, kind, array in (
            ("dense", "FP32", batch.dense),
            ("sparse", "INT32", batch.ids.reshape(batch.rows, -1)),
        )
    ]
    body = json.dumps({"inputs": inputs, "parameters": {"timeout": TIMEOUT_US}}).encode()
    return Question("http", HTTP_INFER, {"content-type": "application/json"}, body)


def json_scores(answer: bytes, rows: int) -> Scores:
    return np.array(json.loads(answer)["outputs"][0]["data"], np.float32)


CASES = {
    "HTTP, JSON": (Way("http-json", "http", in_json, json_scores), "granian"),
    "HTTP, binary": (WAYS["http-binary"], "granian"),
    "gRPC, raw": (WAYS["grpc"], "grpc"),
}
"""How it is asked, and by which echo."""


def measured(given: Load, pid: int) -> Round:
    before = serving.cpu_s(pid)
    outcome = load.run(given)
    if outcome.wrong or outcome.failed:
        raise load.LoadFailed(f"{outcome.wrong} answers were wrong, {outcome.failed} requests failed")
    return Round(outcome.good / outcome.seconds, (serving.cpu_s(pid) - before) / outcome.sent * 1e6)


def compare(rounds: int, seconds: float) -> dict[tuple[str, str], list[Round]]:
    found: dict[tuple[str, str], list[Round]] = {}
    with (
        workplace("shell") as (folder, model, backend),
        serving.pipeline(folder / "batch", model, "--backend", "noop") as ours,
    ):
        for name, (way, kind) in CASES.items():
            (pid,) = ours.pids[f"{way.transport} gateway"]
            server = Server("gateway", way, ours.port(way.transport))
            gateway = load_for(server, asked(way, backend, ROWS, 1), IN_FLIGHT, seconds, TOLERANCE["shell"])
            with serving.echo(kind, gateway.answers[0], folder) as (port, echo_pid):
                bare = replace(gateway, port=port)
                for _ in range(rounds):
                    echo, own = measured(bare, echo_pid), measured(gateway, pid)
                    paced = measured(replace(bare, rate=own.requests_per_s), echo_pid)
                    for side, one in {"echo": echo, PACED: paced, "gateway": own}.items():
                        found.setdefault((name, side), []).append(one)
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
    parser.add_argument("--seconds", type=float, default=2.0, help="of each round, on each side")
    arguments = parser.parse_args()
    print("\n".join(f"{name}: {value}" for name, value in machine().items()), flush=True)
    print(f"{ROWS} rows a request, {IN_FLIGHT} in flight, {arguments.rounds} rounds of {arguments.seconds} s\n")
    print(text(compare(arguments.rounds, arguments.seconds)))


if __name__ == "__main__":
    main()
