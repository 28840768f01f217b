"""Batchers and executors together under seeded faults: see `simulation`. A seed that fails here fails again there."""

import pytest
from msgspec.structs import replace

from tests.actors.simulation import LEASE_US, RULES, Faults, World, run

BLOCKS, SEEDS = 10, 30
ROOMY = replace(RULES, queue_rows=10_000, queue_bytes=10_000 * 40)
"""Nothing is refused for want of room."""


@pytest.mark.parametrize("block", range(BLOCKS))
def test_every_request_ends_once_and_in_time_and_no_slot_is_lost(block: int):
    """Whatever is dropped, delayed, doubled, crashed, frozen or poisoned: the promises of the wire hold."""
    for seed in range(block * SEEDS, (block + 1) * SEEDS):
        try:
            run(seed)
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise


@pytest.mark.parametrize("seed", range(10))
def test_in_calm_weather_every_request_is_scored(seed: int):
    """Faults must not be the policy's own making."""
    world = World(seed, Faults(), batchers=2, executors=2, rules=ROOMY)
    world.faulty = False
    world.load(world.now + LEASE_US, world.now + 5 * LEASE_US, 60, budget_us=400_000)
    world.run_until(world.now + 12 * LEASE_US)
    assert set(world.outcomes.values()) == {"scored"}
    world.check_at_rest()


@pytest.mark.parametrize("seed", range(10))
def test_the_death_of_an_executor_goes_unnoticed(seed: int):
    """Forward passes can be repeated: requesters should never see that one was lost."""
    world = World(seed, Faults(), batchers=2, executors=3, rules=ROOMY)
    world.faulty = False
    world.load(world.now + LEASE_US, world.now + 5 * LEASE_US, 100, budget_us=800_000)
    world.run_until(world.now + 2 * LEASE_US)
    world.end_actor(max(world.executors, key=lambda executor: executor.inside))
    world.run_until(world.now + 20 * LEASE_US)
    assert set(world.outcomes.values()) == {"scored"}


@pytest.mark.parametrize("seed", range(10))
def test_a_frozen_executor_goes_unnoticed(seed: int):
    """Its heartbeats stop too, but no request should have to wait for that."""
    world = World(seed, Faults(), batchers=2, executors=3, rules=ROOMY)
    world.faulty = False
    world.load(world.now + LEASE_US, world.now + 5 * LEASE_US, 100, budget_us=800_000)
    world.run_until(world.now + 2 * LEASE_US)
    max(world.executors, key=lambda executor: executor.inside).thaws_us = world.now + 3 * LEASE_US
    world.run_until(world.now + 20 * LEASE_US)
    assert set(world.outcomes.values()) == {"scored"}
    world.check_at_rest()


@pytest.mark.parametrize("seed", range(10))
def test_in_worker_mode_the_same_rules_hold(seed: int):
    """One request is one batch; nothing else changes."""
    run(seed, rules=replace(RULES, coalesce=False))


def test_a_seed_replays_exactly():
    """A failure that cannot be repeated cannot be understood."""
    assert run(11).outcomes == run(11).outcomes
