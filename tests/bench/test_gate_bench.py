"""The performance gate: it fails when the hot path got slower, and not when one measurement was unlucky."""

from functools import partial

import pytest
from click.testing import CliRunner

from narsil_stream.actors.scheduling import Scheduler
from narsil_stream.actors.ticket import Ticket
from narsil_stream.bench import gate
from narsil_stream.cli import bench_policy, cli


def test_a_scheduler_that_does_its_work_three_times_over_fails_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate that nothing fails guards nothing."""
    check = Scheduler.check
    offer = Scheduler.offer

    def slower(self: Scheduler, ticket: Ticket, now_us: int) -> None:
        check(self, ticket, now_us)
        check(self, ticket, now_us)
        offer(self, ticket, now_us)

    monkeypatch.setattr(Scheduler, "offer", slower)
    monkeypatch.setattr(bench_policy, "scheduler", partial(bench_policy.scheduler, rounds=3))
    done = CliRunner().invoke(cli, ["bench", "gate", "--only", "scheduler"])
    assert done.exit_code == 1, done.output
    assert "second try | MISSED |" in done.output
    assert "below its limit" in done.output
    assert "Next: run `narsil bench gate` on the commit before" in done.output


def test_one_unlucky_measurement_does_not_fail_the_gate() -> None:
    """Machines are shared: what misses is measured once more, and nothing else is."""
    least = gate.LIMITS["nats requests"].least
    tries = [
        {"nats requests": [least / 2], "nats processor": [1.0]},
        {"nats requests": [least * 2], "nats processor": [0.0]},
    ]
    verdicts = gate.judge({"serving": (("nats requests", "nats processor"), lambda: tries.pop(0))}, lambda _: None)
    assert [(one.kept, one.again) for one in verdicts] == [(True, True), (True, False)]
    assert gate.complaint(verdicts) == ""


def test_a_miss_is_told_with_its_size() -> None:
    """Half as fast and a little below are different news."""
    limit = gate.LIMITS["http requests"]
    verdicts = gate.judge({"serving": ((limit.ratio,), lambda: {limit.ratio: [limit.least / 2]})}, lambda _: None)
    assert f"http requests: {limit.least / 2:.3g}, 50 % below its limit" in gate.complaint(verdicts)
    assert limit.what in gate.complaint(verdicts)
    assert "MISSED" in gate.table(verdicts)


def test_the_pipeline_is_measured_beside_an_echo_over_both_ways() -> None:
    """Ratios of real processes; whether they are within the limits is for `narsil bench gate`, on a quiet machine."""
    found = gate.served(lambda _: None, rounds=1)
    assert set(found) == set(gate.SERVED)
    assert all(0.01 < found[f"{way} {what}"][0] < 10 for way in ("nats", "http") for what in ("requests", "processor"))
    assert found["http messages"][0] > 1  # requests of a turn cross the broker together
