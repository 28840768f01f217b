"""One, two, four of each actor: `narsil bench scale`."""

import contextlib
import os
from pathlib import Path

from msgspec.structs import replace

from narsil_stream.bench import serving
from narsil_stream.bench.asking import Server, load_for, run_of
from narsil_stream.bench.figures import alternate, doubt, median
from narsil_stream.bench.questions import WAYS, Asked, Way
from narsil_stream.bench.report import Report
from narsil_stream.bench.shell import TOLERANCE, Gathered, Plan, Say, case_name, echo_run, questions_of, workplace


def sizes() -> list[int]:
    """No more than there are cores."""
    cores = len(os.sched_getaffinity(0))
    return [count for count in (1, 2, 4, 8) if count <= cores]


def scale(plan: Plan, say: Say) -> Report:
    """The pipeline with the no-op model in each size; all sizes run, and take turns under load."""
    gathered = Gathered(plan.file)
    with workplace("shell") as (folder, model, backend), contextlib.ExitStack() as stack:
        running = {
            f"x{count}": stack.enter_context(
                serving.pipeline(folder / str(count), model, *_options(count), *plan.options)
            )
            for count in sizes()
        }
        for way in (WAYS[name] for name in plan.ways):
            for rows in plan.rows:
                questions = questions_of(way, backend, rows, "shell")
                for connections in plan.connections:
                    say(case_name("scale", way.name, rows, connections))
                    _case(plan, gathered, say, folder, running, way, questions, connections)
    return gathered.report()


def _case(
    plan: Plan,
    gathered: Gathered,
    say: Say,
    folder: Path,
    running: dict[str, serving.Pipeline],
    way: Way,
    questions: list[Asked],
    connections: int,
) -> None:
    """All sizes and a bare echo take turns. As many generators as actors of a kind, so that they are not the limit."""
    rows = len(questions[0].scores)
    case = case_name("scale", way.name, rows, connections)
    sides = {}
    for name, ours in running.items():
        server = Server(name, way, ours.port(way.transport), ours.broker)
        load = load_for(server, questions, connections, plan.seconds, TOLERANCE["shell"])
        generators = max(plan.generators, len(ours.pids["batcher"]))
        sides[name] = run_of(server, load, generators)
    with echo_run(replace(plan, generators=generators), load, folder, server) as echo:
        found = alternate(sides | {"echo": echo}, plan.rounds, say)
    for name, ours in running.items():
        versus = ("x1", found["x1"]) if name != "x1" else ()
        gathered.add(f"{case}/{name}", rows, found[name], *versus)
        gathered.note(f"{case}/{name}", f"mode batch: {ours.placement}")
        if why := doubt(median(found[name]), median(found["echo"])):
            gathered.invalid[f"{case}/{name}"] = why
    gathered.case_done()


def _options(count: int) -> list[str]:
    doors = [f"--{door}-processes" for door in ("http", "grpc")]
    return [
        "--backend",
        "noop",
        *(w for o in (*doors, "--batch-batchers", "--executor-executors") for w in (o, str(count))),
    ]
