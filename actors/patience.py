"""How long what waits may be left waiting although there is a slot for it. Pure; times in µs of a monotonic clock.

0 stands for "not at all". An executor that is idle waits for nobody, unless there is a linger or consolidation.
"""

from collections.abc import Iterable

from narsil_stream.actors.flights import Executor
from narsil_stream.actors.queue import ModelKey

SAFETY = 1.5
"""Times the predicted wait for a busy executor: it has to fit into the time that is left."""
LOOK_EVERY_US = 200
"""At the soonest, whether a busy executor has done what it was predicted to have done."""


def staged_us(executor: Executor, model: ModelKey, lead_us: int, now_us: int) -> int:
    """A batch that is not full is cut for a busy executor just in time to be there when that one is free: what comes
    meanwhile joins it, and nobody waits a whole pass more."""
    if executor.idle(model):
        return 0
    return now_us + executor.remaining_us(model, now_us) - lead_us


def spared_us(
    idle: Executor, model: ModelKey, serving: Iterable[Executor], pass_us: int, due_us: int, now_us: int
) -> int:
    """With consolidation: an executor stays idle while another one, at work already, can still answer what waits until
    `due_us`, all of it in one batch of `pass_us`."""
    if idle.flights or not pass_us:
        return 0
    others = [one for one in serving if one is not idle and one.up and one.flights]
    busy = [left_us for one in others if (left_us := one.remaining_us(model, now_us)) or one.free]
    if not busy or now_us + SAFETY * (min(busy) + pass_us) > due_us:
        return 0
    return now_us + max(LOOK_EVERY_US, min(busy))


def in_order(executors: Iterable[Executor], consolidate: bool) -> list[Executor]:
    """Those with a free lane first, of them those with the least under way, of them our own process's. With
    consolidation by name where that is equal, so that the last ones are idle for longest."""
    if consolidate:
        return sorted(executors, key=lambda one: (len(one.flights) >= one.lanes, len(one.flights), one.id))
    return sorted(executors, key=lambda one: (len(one.flights) >= one.lanes, len(one.flights), not one.near))
