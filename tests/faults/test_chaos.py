"""A short run of `narsil bench chaos`: a whole system beyond its capacity, killed and frozen under load.

Asserted is what holds on the slowest machine; the bars of docs/scheduling.md are for `make chaos`.
"""

from msgspec.structs import replace

from narsil_stream.bench.chaos.plan import ROWS, Plan, Row
from narsil_stream.bench.chaos.run import chaos
from narsil_stream.cli.bench_chaos import NAMES

SHORT = Plan(rows=("200", "kill", "freeze-batcher"), length=0.07, doors=1)


def test_each_request_ends_once_and_rightly_whatever_is_killed_frozen_or_too_much() -> None:
    """The promise behind all others: no answer lost, none of somebody else's, none twice."""
    table = chaos(replace(SHORT, capacity=SHORT.ceiling), lambda seconds, what: None, lambda text: None)
    overload, refusals, killed, frozen = table.rows
    for row in (overload, killed, frozen):
        assert (row.figures["unanswered"], row.figures["wrong"], row.figures["double"]) == (0, 0, 0), row
        assert row.figures["broken"] == 0, row
    assert overload.figures["overloaded"] > 0, overload
    assert refusals.figures["without_time"] == 0, refusals
    assert late(overload) < 0.2, overload
    assert late(killed) < 0.1, killed
    assert "no GPU" in table.markdown()


def late(row: Row) -> float:
    """Of those admitted, the part that was not answered in time."""
    return 1 - row.figures["in_time"] / row.figures["admitted"]


def test_the_command_knows_every_row() -> None:
    """A row that no command runs keeps no bar."""
    assert NAMES == ROWS
