"""The ten thousand seeds of `make test`. One that fails here fails again with `narsil simulate --seed`.

One test in a file of its own, over all processors: pytest-xdist begins the files with the fewest tests last, when its
workers would wait for each other.
"""

import pytest

from narsil_stream.actors.simulation.campaign import Findings, campaign
from narsil_stream.actors.simulation.run import REQUESTS
from narsil_stream.actors.simulation.weather import KINDS

SEEDS = 10_000


@pytest.mark.timeout(3_600)
def test_no_seed_breaks_a_rule_and_together_they_see_every_fault_and_every_way_to_end():
    """Whatever is dropped, delayed, doubled, crashed, frozen or cut off: the promises of the wire hold. A fault that
    never strikes, or an answer that nobody gets, is not tested."""
    findings = Findings()
    for block in campaign(0, SEEDS):
        findings.add(block)
    assert {outcome.seed: outcome.broken for outcome in findings.broken} == {}
    assert findings.seeds == SEEDS
    counts = findings.tally
    assert {name for kind, name in counts if kind == "fault"} == set(KINDS)
    assert min(counts["fault", kind] for kind in KINDS) > SEEDS / 10
    ends = {name: times for (kind, name), times in counts.items() if kind == "end"}
    assert sum(ends.values()) >= REQUESTS * SEEDS
    assert ends.keys() == {
        "scored", "OVERLOADED", "DEADLINE_EXCEEDED", "UNAVAILABLE", "CANCELLED", "INTERNAL", "lost with its gateway",
    }  # fmt: skip
    assert ends["scored"] > sum(ends.values()) / 3
    assert counts["decision", "gateway: request throttled"] > SEEDS
