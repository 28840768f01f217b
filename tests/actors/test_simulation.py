"""Batchers, executors and gateways together under seeded faults: see `actors.simulation`. A seed that fails here fails
again with `narsil simulate --seed`."""

import os
import subprocess
import sys
from collections import Counter

import pytest
from msgspec.structs import replace

from narsil_stream.actors.scheduling import Scheduler
from narsil_stream.actors.simulation import run
from narsil_stream.actors.simulation.mutations import MUTATIONS, Mutation, planted
from narsil_stream.actors.simulation.run import REQUESTS, simulate
from narsil_stream.actors.simulation.weather import Faults
from narsil_stream.actors.simulation.world import LEASE_US, RULES, World
from narsil_stream.schemas.internal import ModelRef

REGRESSIONS = {
    1: "work waited for up to 20 ms beside an idle executor, because who had it had asked for a slot too recently",
    282: "a batcher kept the slot of an idle executor for work that it had sent elsewhere meanwhile",
    2010: "a lost result of a batch that was predicted to take long kept its flight open for four times that",
    1105: "a batcher refused all that waited just before the heartbeat of an executor that had given it a slot",
    101397: "a batcher did not let go of the slots of an executor that had heard of it before it heard of that one",
    5458: "a batch that was lost on its way kept its slot for as long as it might have been computed",
}
ROOMY = replace(RULES, queue_rows=10_000, queue_bytes=10_000 * 40)
"""Nothing is refused for want of room."""


@pytest.mark.parametrize("seed", REGRESSIONS, ids=lambda seed: f"seed {seed}")
def test_seeds_that_once_broke_a_rule_hold(seed: int):
    """What was found once must not come back."""
    assert simulate(seed).broken == ""


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_each_planted_error_is_found(mutation: Mutation):
    """A referee that passes a wrong scheduler proves nothing about the right one."""
    with planted(mutation.name):
        assert any(simulate(mutation.shows_from + more).broken for more in range(400))
    assert simulate(0).broken == ""


def test_each_run_is_as_large_and_as_stormy_as_promised():
    """Two of each actor, 200 requests and three kinds of fault: less would find less."""
    for seed in range(50):
        world = World(seed)
        assert min(map(len, (world.gateways, world.batchers, world.executors))) >= 2
        run.play(world)
        ends = Counter({name: times for (kind, name), times in world.tally.items() if kind == "end"})
        assert ends.total() >= REQUESTS
        struck = {name for kind, name in world.tally if kind == "fault"}
        assert len(struck) >= 3, f"seed {seed}: {struck}"


def test_a_seed_replays_exactly_in_any_process():
    """A failure that cannot be repeated cannot be understood; hashes of strings differ between processes."""
    command = [sys.executable, "-m", "narsil_stream", "simulate", "--seed", "11"]
    told = [
        subprocess.run(command, capture_output=True, check=True, env=os.environ | {"PYTHONHASHSEED": seed}).stdout
        for seed in ("1", "2")
    ]
    assert told[0] == told[1]
    here = simulate(11, traced=True)
    assert told[0].decode() == "\n".join([*here.trace, "seed 11: all rules held", ""])


def test_a_failure_comes_with_a_trace_that_tells_its_story():
    """A seed alone would send whoever reads it to a debugger."""
    with planted("double-dispatch"):
        outcome = simulate(0, traced=True)
    assert outcome.broken == "b0 sends r3 again while it is under way at e0"
    assert any("is asked r3:" in line for line in outcome.trace)
    assert "b0 -> e0" in outcome.trace[-1] and "r3" in outcome.trace[-1]


def test_an_exception_in_the_policy_is_a_failure_with_a_traceback(monkeypatch: pytest.MonkeyPatch):
    """It breaks no rule of the referee's, and would end the process that serves."""
    monkeypatch.setattr(Scheduler, "cancel", lambda *_: {}["nothing"])
    outcome = next(outcome for seed in range(20) if (outcome := simulate(seed, traced=True)).broken)
    assert outcome.broken == "KeyError: 'nothing'"
    assert "Traceback (most recent call last):" in outcome.trace


def calm(seed: int, actors: int = 2) -> World:
    world = World(seed, Faults(), actors=actors, rules=ROOMY)
    world.weather.bad = False
    for executor in world.executors:
        executor.models = tuple(ModelRef(*key) for key in world.models.values())
    return world


def scored(world: World) -> bool:
    return set(world.referee.ended.values()) == {"scored"}


@pytest.mark.parametrize("seed", range(10))
def test_in_calm_weather_every_request_is_scored(seed: int):
    """Faults must not be the policy's own making."""
    world = calm(seed)
    world.load(LEASE_US, 5 * LEASE_US, 60, budget_us=400_000)
    world.run_until(12 * LEASE_US)
    assert scored(world)
    world.referee.check_rest()


@pytest.mark.parametrize("kind", ["batcher", "executor"])
@pytest.mark.parametrize("seed", range(10))
def test_the_death_of_an_actor_goes_unnoticed(seed: int, kind: str):
    """Forward passes can be repeated: requesters should never see that one was lost."""
    world = calm(seed, actors=3)
    world.load(LEASE_US, 5 * LEASE_US, 100, budget_us=800_000)
    world.run_until(2 * LEASE_US)
    executor = max(world.executors, key=lambda executor: executor.inside)
    world.weather.befalls("crash", executor if kind == "executor" else world.batchers[0])
    world.end_actor(executor if kind == "executor" else world.batchers[0])
    world.run_until(20 * LEASE_US)
    assert scored(world)
    world.referee.check_rest()


@pytest.mark.parametrize("seed", range(10))
def test_a_frozen_executor_goes_unnoticed(seed: int):
    """Its heartbeats stop too, but no request should have to wait for that."""
    world = calm(seed, actors=3)
    world.load(LEASE_US, 5 * LEASE_US, 100, budget_us=800_000)
    world.run_until(2 * LEASE_US)
    executor = max(world.executors, key=lambda executor: executor.inside)
    executor.thaws_us = world.now + 3 * LEASE_US
    world.weather.shaken_us[executor.name] = executor.thaws_us + LEASE_US
    world.run_until(20 * LEASE_US)
    assert scored(world)
    world.referee.check_rest()


@pytest.mark.parametrize("seed", range(10))
def test_in_worker_mode_the_same_rules_hold(seed: int):
    """One request is one batch; nothing else changes."""
    assert simulate(seed, rules=replace(RULES, coalesce=False)).broken == ""
