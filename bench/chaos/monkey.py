"""Who kills and freezes processes of a running system, at random but by a seed."""

import contextlib
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from narsil_stream.bench.serving import Pipeline

EVERY_S = 1.0
POLL_S = 0.1


class Process(NamedTuple):
    kind: str
    """executor, batcher, http gateway, grpc gateway"""
    pid: int


def up(pipeline: Pipeline) -> list[Process]:
    """Processes that work, by what their supervisor has heard of them."""
    rows = [row for row in pipeline.actors() if row["state"] == "up"]
    return [Process(re.sub(r" \d+$", "", row["process"]), row["pid"]) for row in rows]


def wait_all_up(pipeline: Pipeline, count: int, patience_s: float = 60.0) -> None:
    """Raises TimeoutError."""
    end_s = time.monotonic() + patience_s
    while len(up(pipeline)) < count:
        if time.monotonic() > end_s:
            raise TimeoutError(f"{len(up(pipeline))} of {count} processes work after {patience_s:.0f} s")
        time.sleep(POLL_S)


def kill(
    pipeline: Pipeline, kinds: tuple[str, ...], until_s: float, seed: int, show: Callable[[], None] = lambda: None
) -> dict[str, int]:
    """SIGKILL for a random process of these kinds each second; the last one of a kind that works is spared.

    Returns how many were killed by kind; "spared": seconds in which there was none to kill.
    """
    choose = random.Random(seed)
    killed = dict.fromkeys((*kinds, "spared"), 0)
    due_s = time.monotonic()
    while (due_s := due_s + EVERY_S) < until_s:
        time.sleep(max(0.0, due_s - time.monotonic()))
        show()
        alive = [one for one in up(pipeline) if one.kind in kinds]
        several = [one for one in alive if sum(other.kind == one.kind for other in alive) > 1]
        if not several:
            killed["spared"] += 1
            continue
        victim = choose.choice(several)
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim.pid, signal.SIGKILL)
            killed[victim.kind] += 1
    return killed


@contextlib.contextmanager
def frozen(pid: int) -> Iterator[None]:
    """It stands still while the block runs, its connections open."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)
