"""Our pipeline beside what users would pick instead: `narsil bench peers`.

mosec, LitServe, Ray Serve and Triton (nvidia-pytriton), each in a virtual environment of its own, around the very
callable that our executors call, asked with the very bytes that our pipeline is asked with. Each gets the best settings
of a small grid, found at 100 rows and 64 connections; then both sides take turns.
"""

import contextlib
import os
from collections.abc import Iterator, Mapping
from itertools import product
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import msgspec
from msgspec.structs import replace

from narsil_stream.bench import environments, serving
from narsil_stream.bench.asking import Server, answers, load_for, run_of
from narsil_stream.bench.environments import NotInstalled
from narsil_stream.bench.figures import alternate, doubt, median
from narsil_stream.bench.load import Load
from narsil_stream.bench.peer_servers.engine import EAGER, VARIABLE, Order, Settings
from narsil_stream.bench.questions import HTTP_INFER, WAYS, Asked, Misbehaved, Way, binary, over_http, raw_scores
from narsil_stream.bench.report import Report
from narsil_stream.bench.shell import (
    TOLERANCE,
    Gathered,
    Plan,
    Say,
    case_name,
    echo_run,
    open_loop,
    questions_of,
    workplace,
)
from narsil_stream.core.ports import free_port
from narsil_stream.kernels.backend import Backend

ENGINES = MappingProxyType(
    {EAGER: "TorchRec eager", "torch": "TorchRec's layers over FBGEMM's tables, on CUDA in a graph for each size"}
)
"""What users of peers have instead of ours."""
READY_S = 180.0
"""Ray takes its time."""
TUNED_AT = 100, 64
"""Rows and connections that settings are chosen at."""
TRIES = 3


class Peer(NamedTuple):
    name: str
    packages: tuple[str, ...]
    way: Way
    ours: str
    """Our way that takes the same payload."""
    environ: Mapping[str, str] = MappingProxyType({})


def _msgpack(path: str) -> Way:
    return Way("http", "http", over_http(path), raw_scores)


RAY = MappingProxyType(
    {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    }
)
"""HAProxy as its front carries ten times what its proxy in Python does."""

PEERS = {
    peer.name: peer
    for peer in (
        Peer("mosec", ("mosec==0.9.8",), _msgpack("/inference"), "http"),
        Peer("litserve", ("litserve==0.2.19",), _msgpack("/predict"), "http"),
        Peer("ray", ("ray[serve]==2.60.0",), _msgpack("/"), "http", RAY),
        Peer(
            "triton",
            ("nvidia-pytriton==0.7.0", "numpy<2"),
            Way("http-binary", "http", lambda batch: binary(batch, HTTP_INFER), raw_scores),
            "http-binary",
        ),
    )
}


class Bench(NamedTuple):
    """What stays the same for all peers of one kind of case."""

    kind: str
    plan: Plan
    gathered: Gathered
    say: Say
    folder: Path
    model: Path
    backend: Backend
    ours: serving.Pipeline
    data_dir: Path

    def own(self, way: str) -> Server:
        return Server("pipeline", WAYS[way], self.ours.port(WAYS[way].transport), self.ours.broker)


def grid(quick: bool) -> list[Settings]:
    """Batches of requests; mosec's least wait is 1 ms. Threads as our executor takes them, and all cores."""
    if quick:
        return [Settings(64, 1)]
    cores = len(os.sched_getaffinity(0))
    few = [Settings(*one) for one in product((64, 16), (1, 2))]
    return [*few, Settings(64, 1, workers=2), *([Settings(64, 1, threads=cores)] if cores > 1 else [])]


def peers(
    kinds: tuple[str, ...],
    names: tuple[str, ...],
    plan: Plan,
    data_dir: Path,
    table_rows: int,
    quick: bool,
    say: Say,
    engines: tuple[str, ...] = (EAGER,),
) -> Report:
    """`kinds`: shell and pipeline; `names`: of `PEERS`; `engines`: of the fastest peer besides ours, in `ENGINES`."""
    gathered = Gathered(plan.file)
    for kind in kinds:
        with workplace(kind, table_rows) as (folder, model, backend):
            engine = "noop" if kind == "shell" else "auto"
            with serving.pipeline(folder / "batch", model, "--backend", engine, *plan.options) as ours:
                bench = Bench(kind, plan, gathered, say, folder, model, backend, ours, data_dir)
                fastest = _all(bench, [PEERS[name] for name in names], engine, grid(quick))
                if kind == "pipeline" and fastest is not None:
                    for other in engines:
                        _one(bench, fastest, other, grid(quick))
    return gathered.report()


def _all(bench: Bench, wanted: list[Peer], engine: str, settings: list[Settings]) -> Peer | None:
    """The peer that was fastest."""
    reached: dict[str, float] = {}
    for peer in wanted:
        speed = _one(bench, peer, engine, settings)
        if speed:
            reached[peer.name] = speed
    return PEERS[max(reached, key=lambda name: reached[name])] if reached else None


def _one(bench: Bench, peer: Peer, engine: str, settings: list[Settings]) -> float:
    """Measure one peer; what it reached where it was tuned, 0 when it is absent."""
    label = f"{peer.name}+{engine}" if engine in ENGINES else peer.name
    try:
        python = environments.python(bench.data_dir / "peers" / peer.name, peer.packages, bench.say)
        for name, version in environments.versions(python, peer.packages).items():
            bench.gathered.versions[name] = version
        best = _tuned(bench, peer, python, engine, settings)
        with _running(bench, peer, python, engine, best) as server:
            speed = _beside(bench, peer, label, server, best)
        if peer.name == "mosec" and engine not in ENGINES and 1 in bench.plan.connections:
            _unbatched(bench, peer, python, engine)
    except (NotInstalled, Misbehaved) as error:
        if isinstance(error, Misbehaved) and error.server != peer.name:
            raise  # ours, or an echo
        bench.gathered.absent[f"{bench.kind}/{label}"] = f"{type(error).__name__}: {error}"
        bench.say(f"{label} is absent: {error}")
        return 0.0
    return speed


def _tuned(bench: Bench, peer: Peer, python: Path, engine: str, settings: list[Settings]) -> Settings:
    """The settings that carry most requests, by the best of some runs each."""
    if len(settings) == 1:
        return settings[0]
    found: dict[Settings, float] = {}
    rows, connections = TUNED_AT
    for one in settings:
        try:
            with _running(bench, peer, python, engine, one) as server:
                load = _load(bench, server, peer.way, rows, connections)
                found[one] = max(run_of(server, load)().requests_per_s for _ in range(TRIES))
        except Misbehaved as error:
            bench.say(f"{bench.kind}/{peer.name}: {one}: {error}")
            continue
        bench.say(f"{bench.kind}/{peer.name}: {one}: {found[one]:,.0f} requests/s")
    if not found:
        raise serving.NotStarted(peer.name, "it did as it must in none of its settings; each is told above")
    return max(found, key=lambda one: found[one])


@contextlib.contextmanager
def _running(bench: Bench, peer: Peer, python: Path, engine: str, settings: Settings) -> Iterator[Server]:
    """The peer, once it answers."""
    port = free_port(serving.HOST, 0, peer.name)
    order = Order(port, str(bench.model), engine, max(bench.plan.rows), settings)
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), str(settings.threads))
    environ = os.environ | threads | {VARIABLE: msgspec.json.encode(order).decode()} | dict(peer.environ)
    environ.pop("PYTHONPATH", None)
    command = [str(python), "-m", f"narsil_stream.bench.peer_servers.{peer.name}"]
    log = bench.folder / f"{peer.name}.log"
    server = Server(peer.name, peer.way, port)
    question = questions_of(peer.way, bench.backend, 1, bench.kind)[0]
    with serving.process(command, log, environ=environ) as running:

        def ready() -> bool | None:
            return True if answers(server, [question.question], patience_s=2.0) != [None] else None

        serving.patiently(peer.name, ready, running, log, READY_S)
        yield server


def _load(bench: Bench, server: Server, way: Way, rows: int, connections: int) -> Load:
    questions: list[Asked] = questions_of(way, bench.backend, rows, bench.kind)
    return load_for(server, questions, connections, bench.plan.seconds, TOLERANCE[bench.kind])


def _beside(bench: Bench, peer: Peer, label: str, server: Server, settings: Settings) -> float:
    """All cases of one peer beside ours."""
    speed = 0.0
    for rows in bench.plan.rows if label == peer.name else bench.plan.rows[:1]:
        for connections in bench.plan.connections:
            reached = _case(bench, peer, label, server, settings, rows, connections)
            speed = speed or reached
    return speed


def _case(
    bench: Bench, peer: Peer, label: str, server: Server, settings: Settings, rows: int, connections: int
) -> float:
    """One case: the peer, ours with the same payload, NATS producers, and the bare echo take turns."""
    kind, plan, gathered = bench.kind, bench.plan, bench.gathered
    theirs = case_name(kind, peer.way.name, rows, connections, server=label)
    case = case_name(kind, peer.ours, rows, connections)
    bench.say(theirs)
    own, load = bench.own(peer.ours), _load(bench, server, peer.way, rows, connections)
    own_load = _load(bench, own, own.way, rows, connections)
    sides = {label: run_of(server, load), "pipeline": run_of(own, own_load, plan.generators)}
    with contextlib.ExitStack() as stack:
        sides["echo"] = stack.enter_context(echo_run(plan, load, bench.folder, server))
        if "nats" in plan.ways:
            producer = bench.own("nats")
            by_nats = _load(bench, producer, producer.way, rows, connections)
            sides["nats"] = run_of(producer, by_nats, plan.generators)
            sides["nats echo"] = stack.enter_context(echo_run(plan, by_nats, bench.folder, producer))
        found = alternate(sides, plan.rounds, bench.say)
    gathered.add(theirs, rows, found[label])
    gathered.note(theirs, f"{_label(label)}; {settings}")
    gathered.add(case, rows, found["pipeline"], label, found[label])
    gathered.note(case, f"mode batch: {bench.ours.placement}")
    if "nats" in sides:
        produced = case_name(kind, "nats", rows, connections)
        gathered.add(produced, rows, found["nats"], f"{label}/{peer.way.name}", found[label])
        gathered.note(produced, "NATS producers against HTTP: different protocol")
        if why := doubt(median(found["nats"]), median(found["nats echo"])):
            gathered.invalid[produced] = why
    if why := doubt(max(median(found[label]), median(found["pipeline"])), median(found["echo"])):
        gathered.invalid[case] = gathered.invalid[theirs] = why
    for part in plan.open_at if connections > 1 else ():
        _open(bench, theirs, case, label, rows, part, {label: (server, load), "pipeline": (own, own_load)},
              min(median(found[label]), median(found["pipeline"])))  # fmt: skip
    gathered.case_done()
    return median(found[label])


def _open(
    bench: Bench,
    theirs: str,
    case: str,
    label: str,
    rows: int,
    part: float,
    sides: dict[str, tuple[Server, Load]],
    reached: float,
) -> None:
    """Both at one rate, a part of what the slower one reached."""
    found = open_loop(bench.gathered, theirs, rows, part, reached, sides, bench.plan, bench.say)
    name = f"{case}/open{round(100 * part)}"
    bench.gathered.add(name, rows, found["pipeline"], label, found[label])


def _unbatched(bench: Bench, peer: Peer, python: Path, engine: str) -> None:
    """One connection has no use for batches, and mosec's wait costs it."""
    single = Settings(1, 0)
    with _running(bench, peer, python, engine, single) as server:
        for rows in bench.plan.rows:
            alone = bench._replace(plan=replace(bench.plan, connections=(1,), open_at=()))
            _case(alone, peer, f"{peer.name}-batch1", server, single, rows, 1)


def _label(label: str) -> str:
    return f"engine + shell: {ENGINES[label.partition('+')[2]]}" if "+" in label else "shell + same engine"
