"""Our policy and what others do, under the same simulated loads. Rivals get the setting that is best at each load."""

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

from msgspec import Struct
from msgspec.structs import replace

from narsil_stream.actors.simulation.campaign import processors
from narsil_stream.actors.simulation.load import (
    BUDGETS_US,
    BUS_US,
    MAX_ROWS,
    MEDIAN_ROWS,
    RULES,
    SIGMA,
    Arrival,
    Device,
    Ours,
    Score,
    Stretch,
    arrivals,
    between_us,
    play,
)
from narsil_stream.actors.simulation.rivals import FixedTimeout, Preferred

LOADS = (0.1, 0.25, 0.5, 0.75, 0.9, 1.0, 1.25, 1.5, 2.0, 3.0, 5.0)
CONSOLIDATED_LOADS = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1.1)
FLEET = 4
SLO_US = 20_000
KNEE = Device(fixed_us=500, row_us=4, knee_rows=256, knee=4)
"""Beyond 256 rows each row takes four times as long: what leaves a cache behaves like this."""
DEVICES = {"straight": Device(), "knee": KNEE}
AS_GOOD = 0.002
"""Goodputs that differ by less of the load are equal: the better p99 decides."""

QUEUES = (16, 32, 64, 128, 256)
FIXED = [("fixed", setting) for setting in product((256, 512, 1024), (0, 1_000, 4_000), QUEUES)]
TRITON = [("triton", setting) for setting in product(((), (256, 512, 1024)), (0, 1_000, 4_000), QUEUES)]
OURS = [("ours", ()), ("adaptive", ())]


class Effort(Struct, frozen=True):
    """How long each run is: so many requests, and at least so long. A sweep's runs are a third as long."""

    requests: int = 6_000
    least_us: int = 3_000_000
    loads: tuple[float, ...] = LOADS
    rivals: tuple[tuple[str, tuple[Any, ...]], ...] = (*FIXED, *TRITON)
    seed: int = 1


class Job(NamedTuple):
    policy: str
    setting: tuple[Any, ...]
    load: float
    device: str
    executors: int
    requests: int
    least_us: int
    seed: int


class Point(Struct, frozen=True):
    """One run. Parts are of 1; `load` and `goodput` are parts of the executors' capacity, in rows."""

    policy: str
    setting: tuple[Any, ...]
    """fixed: most rows, time-out in µs, requests of the queue; triton: preferred sizes, delay in µs, requests of the
    queue."""
    device: str
    executors: int
    load: float
    goodput: float
    p50_us: int
    p99_us: int
    """Of what was answered inside its budget."""
    inside_slo: float
    """Of all that was asked, answered within `SLO_US`."""
    refused: float
    missed: float
    """Of what was admitted: too late, or expired."""
    executors_busy: float
    """Executor-seconds used, for each second."""
    rows_per_batch: float
    requests: int


class Comparison(Struct, frozen=True):
    """What `narsil bench scheduling` finds. All simulated: devices take exactly the time that `Device` says."""

    conditions: dict[str, Any]
    points: list[Point]
    """Of each policy, at each load; a rival's at its best setting there."""
    swept: int
    """Runs to find those settings."""


def compare(effort: Effort, show: Callable[[int, int], None], jobs: int = 0) -> Comparison:
    """`show` gets how far it is, out of `size(effort)`. `jobs` 0: a process for each processor; 1: in this one."""
    sweep, final, fleet = _sweep(effort), _final(effort), _fleet(effort)
    done = 0
    with _mapper(jobs) as run:

        def points(work: Sequence[Job]) -> Iterator[Point]:
            nonlocal done
            for point in run(work):
                done += 1
                show(done, done)
                yield point

        best = _best(list(points(sweep)))
        rivals = [_job(effort, one.policy, one.setting, one.load, one.device) for one in best]
        found = list(points([*final, *rivals, *fleet]))
    return Comparison(_conditions(effort), found, len(sweep))


def size(effort: Effort) -> int:
    """Runs in all."""
    rivals = {policy for policy, _ in effort.rivals}
    best = len(rivals) * len(effort.loads) * len(DEVICES)
    return len(_sweep(effort)) + len(_final(effort)) + best + len(_fleet(effort))


def measure(job: Job) -> Point:
    device = DEVICES[job.device]
    for_us = max(job.least_us, int(job.requests * between_us(job.load, device, job.executors)))
    came = arrivals(job.seed, [Stretch(job.load, for_us)], device, job.executors)
    score = _played(job, came, device)
    admitted = max(1, score.offered - score.refused)
    return Point(
        job.policy,
        job.setting,
        job.device,
        job.executors,
        job.load,
        goodput=round(score.goodput(job.executors, device), 4),
        p50_us=score.quantile(0.5),
        p99_us=score.quantile(0.99),
        inside_slo=round(sum(us <= SLO_US for us in score.waits_us) / score.offered, 4),
        refused=round(score.refused / score.offered, 4),
        missed=round(score.missed / admitted, 5),
        executors_busy=round(score.busy_us / score.lasted_us, 3),
        rows_per_batch=round(score.rows / max(1, score.batches), 1),
        requests=score.offered,
    )


def _played(job: Job, came: list[Arrival], device: Device) -> Score:
    match job.policy:
        case "fixed":
            return play(FixedTimeout(*job.setting), came, device, job.executors)
        case "triton":
            return play(Preferred(*job.setting), came, device, job.executors)
        case "adaptive":
            rules = replace(RULES, slo_us=SLO_US)
        case "consolidated":
            rules = replace(RULES, consolidate=True)
        case _:
            rules = RULES
    return Ours(came, device, job.executors, rules).play()


def _job(effort: Effort, policy: str, setting: tuple[Any, ...], load: float, device: str, part: int = 1) -> Job:
    return Job(policy, setting, load, device, 1, effort.requests // part, effort.least_us // part, effort.seed)


def _sweep(effort: Effort) -> list[Job]:
    """With other arrivals than those that count: nobody is tuned to the very requests that come."""
    swept = replace(effort, seed=effort.seed + 1_000)
    return [
        _job(swept, *rival, load, device, part=3)
        for device in DEVICES
        for load in effort.loads
        for rival in effort.rivals
    ]


def _final(effort: Effort) -> list[Job]:
    return [_job(effort, *ours, load, device) for device in DEVICES for load in effort.loads for ours in OURS]


def _fleet(effort: Effort) -> list[Job]:
    """Four executors, with and without consolidation."""
    if effort.loads != LOADS:
        return []
    return [
        Job(policy, (), load, "straight", FLEET, effort.requests, 0, effort.seed)
        for load in CONSOLIDATED_LOADS
        for policy in ("ours", "consolidated")
    ]


def _best(swept: list[Point]) -> list[Point]:
    """Of each rival, device and load."""
    best: dict[tuple[str, str, float], Point] = {}
    for point in swept:
        key = (point.policy, point.device, point.load)
        held = best.get(key)
        if held is None or _better(point, held):
            best[key] = point
    return list(best.values())


def _better(point: Point, held: Point) -> bool:
    if abs(point.goodput - held.goodput) > AS_GOOD * held.load:
        return point.goodput > held.goodput
    return point.p99_us < held.p99_us


def _conditions(effort: Effort) -> dict[str, Any]:
    return {
        "simulated": True,
        "seed": effort.seed,
        "devices": {name: device._asdict() for name, device in DEVICES.items()},
        "max_rows": MAX_ROWS,
        "budgets_us": BUDGETS_US,
        "rows": {"log-normal": {"median": MEDIAN_ROWS, "sigma": SIGMA, "most": MAX_ROWS}},
        "bus_us": BUS_US,
        "slo_us": SLO_US,
        "requests": effort.requests,
        "least_us": effort.least_us,
    }


class _mapper:
    """A `map` over processes, or in this one."""

    def __init__(self, jobs: int) -> None:
        jobs = jobs or processors()
        self._pool = multiprocessing.get_context("spawn").Pool(jobs) if jobs > 1 else None

    def __enter__(self) -> Callable[[Sequence[Job]], Iterator[Point]]:
        if self._pool is None:
            return partial(map, measure)
        return partial(self._pool.imap, measure)

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.terminate()
            self._pool.join()
