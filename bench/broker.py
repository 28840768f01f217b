"""What the pipeline costs beside a bare nats-py echo of the same bytes: `narsil bench broker`.

`cpu_us` is the processor time of each process for each request, by /proc: what it costs, whatever else runs.
"""

from collections.abc import Callable
from itertools import product

from narsil_stream.bench import serving
from narsil_stream.bench.asking import Server, load_for, run_of
from narsil_stream.bench.figures import Figures, alternate, doubt, median
from narsil_stream.bench.questions import WAYS, Way
from narsil_stream.bench.report import Report, Row
from narsil_stream.bench.shell import (
    TOLERANCE,
    Gathered,
    Place,
    Plan,
    Say,
    case_name,
    echo_run,
    questions_of,
    workplace,
)


def broker(plan: Plan, say: Say) -> Report:
    """The pipeline with the no-op model, and an echo; NATS producers' has a broker of its own."""
    gathered = Gathered(plan.file)
    with (
        workplace("shell") as (folder, model, backend),
        serving.pipeline(folder / "batch", model, "--backend", "noop", *plan.options) as ours,
    ):
        place = Place("broker", plan, gathered, say, folder, backend)
        for way, rows, connections in product((WAYS[name] for name in plan.ways), plan.rows, plan.connections):
            _case(place, ours, way, rows, connections)
    return gathered.report()


def _case(at: Place, ours: serving.Pipeline, way: Way, rows: int, connections: int) -> None:
    plan, gathered = at.plan, at.gathered
    case = case_name("broker", way.name, rows, connections)
    at.say(case)
    server = Server("pipeline", way, ours.port(way.transport), ours.broker)
    questions = questions_of(way, at.backend, rows, "shell")
    load = load_for(server, questions, connections, plan.seconds, TOLERANCE["shell"])
    used = dict.fromkeys(ours.processes, 0.0)
    run = _counting(run_of(server, load, plan.generators), ours.processes, used)
    with echo_run(plan, load, at.folder, server) as echo:
        found = alternate({"pipeline": run, "echo": echo}, plan.rounds, at.say)
    gathered.add(case, rows, found["pipeline"], "echo", found["echo"])
    gathered.add(case_name("broker", way.name, rows, connections, server="echo"), rows, found["echo"])
    gathered.note(case, f"mode batch: {ours.placement}")
    sent = sum(one.sent for one in found["pipeline"])
    each = {what: seconds / sent * 1e6 for what, seconds in used.items()}
    gathered.rows += [Row(f"{case}/{what}", "cpu_us", value, "us") for what, value in each.items()]
    spent = ", ".join(f"{what} {value:.0f}" for what, value in each.items())
    gathered.note(case, f"µs of processor time a request: {spent}")
    if why := doubt(median(found["pipeline"]), median(found["echo"])):
        gathered.invalid[case] = why
    gathered.case_done()


def _counting(run: Callable[[], Figures], pids: dict[str, list[int]], used: dict[str, float]) -> Callable[[], Figures]:
    """`run`, with the processor time of the processes added to `used`."""

    def counted() -> Figures:
        before = {kind: sum(map(serving.cpu_s, of)) for kind, of in pids.items()}
        figures = run()
        for kind, of in pids.items():
            used[kind] += sum(map(serving.cpu_s, of)) - before[kind]
        return figures

    return counted
