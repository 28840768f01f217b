"""`narsil simulate`, as it is typed."""

import re

import pytest
from click.testing import CliRunner, Result

from narsil_stream.actors.simulation.mutations import MUTATIONS, Mutation
from narsil_stream.cli import cli


def narsil(*arguments: str) -> Result:
    return CliRunner().invoke(cli, ["simulate", *arguments])


def test_seeds_that_hold_end_with_a_table_and_0():
    """Whoever runs it wants to know what was tried, not only that nothing broke."""
    done = narsil("--seeds", "20", "--jobs", "1")
    assert done.exit_code == 0, done.output
    for told in ("Faults", "crash", "Decisions", "batcher: dispatched", "How requests ended", "OVERLOADED"):
        assert told in done.output
    assert "20 seeds" in done.output and "all rules held" in done.output


def test_several_processes_find_what_one_finds():
    """The order in which they end must not show."""
    assert narsil("--seeds", "30", "--jobs", "2").output == narsil("--seeds", "30", "--jobs", "1").output


def test_a_failure_names_its_seed_which_replays_it():
    """From there on it is a bug that can be looked at."""
    found = narsil("--mutate", "fifo", "--first-seed", "7", "--seeds", "40", "--jobs", "2")
    assert found.exit_code == 1
    (broken,) = re.findall(r"BROKEN: (.*)", found.output)
    (command,) = re.findall(r"narsil simulate (--seed .*)", found.output)
    again = narsil(*command.split())
    assert again.exit_code == 1
    assert broken in again.output


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_every_planted_error_ends_with_1(mutation: Mutation):
    """CI asks the exit code."""
    first = str(mutation.shows_from)
    assert narsil("--mutate", mutation.name, "--first-seed", first, "--seeds", "400", "--jobs", "1").exit_code == 1


def test_planted_errors_are_listed_and_unknown_ones_answered_with_their_names():
    """Nobody should have to read the source for them."""
    listed = narsil("--mutate", "list")
    assert listed.exit_code == 0
    assert len(listed.output.splitlines()) == len(MUTATIONS) >= 8
    unknown = narsil("--mutate", "fifi")
    assert unknown.exit_code == 2
    assert "'fifi' is none of" in unknown.output and "fifo" in unknown.output
