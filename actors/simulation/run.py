"""One seed: faults for a while, then calm, then a burst that needs every slot."""

import random
import traceback
from collections import Counter
from dataclasses import dataclass, field

from msgspec.structs import replace

from narsil_stream.actors.decisions import Rules
from narsil_stream.actors.simulation.referee import Violation
from narsil_stream.actors.simulation.world import BEAT_US, LEASE_US, RULES, World

STORM_US = 200_000
CALM_US = LEASE_US + 4 * BEAT_US
"""After the last fault, for leases to end and slots to come back."""
BURST = 25
"""Requests in the last burst, for each executor."""
BURSTS = 3
"""Until all slots were seen in use."""
REQUESTS = 200
"""At least, in each run."""


@dataclass(frozen=True)
class Outcome:
    """What a seed has shown. `broken`: the rule that did not hold, if one did not."""

    seed: int
    tally: Counter[tuple[str, str]]
    events: int
    broken: str = ""
    trace: list[str] = field(default_factory=list)


def rules_of(seed: int) -> Rules:
    """Mostly the plain ones; some have a linger, a target, consolidation, strict priorities, or each request alone."""
    rng = random.Random(seed)
    return replace(
        RULES,
        coalesce=rng.random() > 0.1,
        linger_us=rng.choice((0,) * 9 + (2_000,)),
        ageing=rng.choice((0.0, 0.1, 0.5)),
        weights=rng.choice(({}, {"a": 3.0})),
        slo_us=rng.choice((0,) * 4 + (5_000,)),
        consolidate=rng.random() < 0.1,
    )


def simulate(seed: int, traced: bool = False, rules: Rules | None = None) -> Outcome:
    """Runs one seed to its end or to the first broken rule."""
    world = World(seed, rules=rules or rules_of(seed), trace=[] if traced else None)
    broken = ""
    try:
        play(world)
    except Violation as violation:
        broken = str(violation)
    except Exception as error:
        broken = f"{type(error).__name__}: {error}"
        if world.trace is not None:
            world.trace += traceback.format_exc().splitlines()
    world.tally["seed", "failed" if broken else "held"] += 1
    return Outcome(seed, world.tally, world.events, broken, world.trace or [])


def play(world: World) -> None:
    """Raises Violation."""
    world.note("faults", ", ".join(world.weather.faults.kinds))
    world.load(2 * BEAT_US, STORM_US, REQUESTS - BURST * len(world.executors))
    world.weather.misfortunes(BEAT_US, STORM_US)
    world.run_until(STORM_US)
    world.note("weather", "clears up")
    world.weather.clear_up()
    world.run_until(max(STORM_US, world.weather.over_us) + CALM_US)
    if any(executor.inside for executor in world.executors):  # a slow pass that began in the storm
        world.run_until(world.now + CALM_US)
    world.referee.check_rest()
    burst(world)


def burst(world: World) -> None:
    """Every request is scored, or refused for want of room, and each executor uses all its slots at once: in one of
    some bursts, as a slot may be between two batchers while the work of one of them lasts."""
    referee = world.referee
    for executor in world.executors:
        executor.most_inside = 0
    asked = max(BURST * len(world.executors), REQUESTS - len(referee.ended))
    for _ in range(BURSTS):
        _ask_at_once(world, asked)
        unused = [executor for executor in world.executors if executor.most_inside < executor.slots]
        if not unused:
            return
    for executor in unused:
        referee.fail(f"{executor.name} uses {executor.most_inside} of its {executor.slots} slots")


def _ask_at_once(world: World, asked: int) -> None:
    referee, before = world.referee, len(world.referee.ended)
    for at in range(0, asked, BURST):
        world.ask(min(BURST, asked - at), budget_us=2_000_000, rows=16)
    end_us = world.now + 2_000_000
    while any(gateway.unended for gateway in world.gateways) and world.now < end_us:
        world.run_until(world.now + BEAT_US)
    world.run_until(world.now + BEAT_US)
    referee.check_rest()
    how = set(list(referee.ended.values())[before:])
    if not how <= {"scored", "OVERLOADED"}:
        referee.fail(f"in calm weather, too, requests ended {', '.join(sorted(how))}")
