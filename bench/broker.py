"""What the pipeline costs beside a bare nats-py echo of the same bytes: `narsil bench broker`.

`cpu_us` is the processor time of each process for each request, by /proc: what it costs, whatever else runs.
"""

from collections.abc import Callable

from narsil_stream.bench import serving
from narsil_stream.bench.asking import Server, load_for, run_of
from narsil_stream.bench.figures import Figures, alternate, doubt, median
from narsil_stream.bench.questions import WAYS
from narsil_stream.bench.report import Report, Row
from narsil_stream.bench.shell import TOLERANCE, Gathered, Plan, Say, case_name, echo_run, questions_of, workplace

NATS = WAYS["nats"]


def broker(plan: Plan, say: Say) -> Report:
    """NATS producers against the pipeline with the no-op model, and against an echo on a broker of its own."""
    gathered = Gathered()
    with (
        workplace("shell") as (folder, model, backend),
        serving.pipeline(folder / "batch", model, "--backend", "noop", *plan.options) as ours,
    ):
        server = Server("pipeline", NATS, ours.broker.port, ours.broker)
        for rows in plan.rows:
            for connections in plan.connections:
                case = case_name("broker", "nats", rows, connections)
                say(case)
                questions = questions_of(NATS, backend, rows, "shell")
                load = load_for(server, questions, connections, plan.seconds, TOLERANCE["shell"])
                used = dict.fromkeys(ours.pids, 0.0)
                run = _counting(run_of(server, load, plan.generators), ours.pids, used)
                with echo_run(plan, load, folder, server) as echo:
                    found = alternate({"pipeline": run, "echo": echo}, plan.rounds, say)
                gathered.add(case, rows, found["pipeline"], "echo", found["echo"])
                gathered.add(case_name("broker", "nats", rows, connections, server="echo"), rows, found["echo"])
                gathered.note(case, f"mode batch: {ours.placement}")
                sent = sum(one.sent for one in found["pipeline"])
                each = {kind: seconds / sent * 1e6 for kind, seconds in used.items()}
                gathered.rows += [Row(f"{case}/{kind}", "cpu_us", value, "us") for kind, value in each.items()]
                spent = ", ".join(f"{kind} {value:.0f}" for kind, value in each.items())
                gathered.note(case, f"µs of processor time a request: {spent}")
                if why := doubt(median(found["pipeline"]), median(found["echo"])):
                    gathered.invalid[case] = why
    return gathered.report()


def _counting(run: Callable[[], Figures], pids: dict[str, list[int]], used: dict[str, float]) -> Callable[[], Figures]:
    """`run`, with the processor time of the processes added to `used`."""

    def counted() -> Figures:
        before = {kind: sum(map(serving.cpu_s, of)) for kind, of in pids.items()}
        figures = run()
        for kind, of in pids.items():
            used[kind] += sum(map(serving.cpu_s, of)) - before[kind]
        return figures

    return counted
