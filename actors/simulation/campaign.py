"""Many seeds, over several processes. What is found is told in the order of the seeds."""

import gc
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field

from narsil_stream.actors.simulation.mutations import planted
from narsil_stream.actors.simulation.run import Outcome, simulate

BLOCK = 5
"""Seeds that a process runs before it reports."""

_planted = ExitStack()


@dataclass
class Findings:
    """Of some seeds."""

    seeds: int = 0
    events: int = 0
    tally: Counter[tuple[str, str]] = field(default_factory=Counter)
    broken: list[Outcome] = field(default_factory=list)
    """In order of the seeds, without their traces: `simulate` shows them."""

    def add(self, other: "Findings") -> None:
        self.seeds += other.seeds
        self.events += other.events
        self.tally.update(other.tally)
        self.broken += other.broken


def processors() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def campaign(first: int, seeds: int, jobs: int = 0, mutation: str = "") -> Iterator[Findings]:
    """What each block of seeds has shown, in order. `jobs` 0: one for each processor; 1: in this process."""
    blocks = [range(at, min(at + BLOCK, first + seeds)) for at in range(first, first + seeds, BLOCK)]
    jobs = min(jobs or processors(), len(blocks))
    if jobs <= 1:
        with planted(mutation):
            yield from map(run_block, blocks)
        return
    with multiprocessing.get_context("spawn").Pool(jobs, _begin, (mutation,)) as pool:
        yield from pool.imap(run_block, blocks)


def run_block(seeds: range) -> Findings:
    """Worlds are full of cycles: they are collected once a block, which is a tenth cheaper than as they grow. What was
    there before is not looked at."""
    enabled = gc.isenabled()
    gc.disable()
    gc.freeze()
    findings = Findings()
    try:
        for seed in seeds:
            outcome = simulate(seed)
            findings.add(Findings(1, outcome.events, outcome.tally, [outcome] if outcome.broken else []))
    finally:
        gc.collect()
        gc.unfreeze()
        if enabled:
            gc.enable()
    return findings


def _begin(mutation: str) -> None:
    """In a new process. It takes what processor time others leave: what they do may hang on time, this never does."""
    if hasattr(os, "nice"):
        os.nice(19)
    _planted.enter_context(planted(mutation))
