"""Processes killed, frozen and gone under load: what callers see."""

import os
import signal
import time
from pathlib import Path

import pytest

from tests.faults.serving import Serve
from tests.faults.traffic import BUDGET_S, Traffic
from tests.support import until

MANY = 300
"""Answers awaited around each fault, so that requests are under way when it strikes, and after it."""
PAIRS = ("--batch-batchers", "2", "--executor-executors", "2")
"""Two processes of a batcher and an executor each, unless they are placed apart."""


def test_an_executor_killed_under_load_is_noticed_by_nobody(criteo_model: Path, tmp_path: Path) -> None:
    """Batches that it held must be computed by the other one, each caller getting its own scores."""
    with Serve(criteo_model, tmp_path, "--executor-executors", "2", "--placement", "apart") as serve:
        with Traffic(criteo_model, http=serve.http_port, nats=serve.nats_url) as traffic:
            for _ in range(2):
                traffic.answered(MANY)
                os.kill(serve.pids("executor")[0], signal.SIGKILL)
                traffic.answered(MANY)
                with traffic.gentle():
                    serve.until_up("executor", 2)
        assert not traffic.bad, traffic.ended


def test_a_batcher_killed_under_load_loses_no_request_of_gateways_and_clients(
    criteo_model: Path, tmp_path: Path
) -> None:
    """What it had accepted must be asked again elsewhere, and answered once."""
    with Serve(criteo_model, tmp_path, "--batch-batchers", "2", "--placement", "apart") as serve:
        with Traffic(criteo_model, http=serve.http_port, nats=serve.nats_url) as traffic:
            for _ in range(2):
                traffic.answered(MANY)
                os.kill(serve.pids("batcher")[0], signal.SIGKILL)
                traffic.answered(MANY)
                with traffic.gentle():
                    serve.until_up("batcher", 2)
        assert not traffic.bad, traffic.ended


@pytest.mark.parametrize("kind", ["batcher", "executor"])
def test_a_killed_process_is_known_to_be_gone_long_before_its_lease_is_over(
    criteo_model: Path, tmp_path: Path, kind: str
) -> None:
    """Who waits for a dead one waits for a lease: for most of a budget. `narsil serve` sees it end, and says so."""
    lease = ["--timing-lease-ms", "60000", "--timing-failover-floor-ms", "60000"]
    with Serve(criteo_model, tmp_path, "--batch-batchers", "2", "--executor-executors", "2", *lease) as serve:
        with Traffic(criteo_model, http=serve.http_port, nats=serve.nats_url) as traffic:
            for _ in range(2):
                traffic.answered(MANY)
                os.kill(serve.pids(kind)[0], signal.SIGKILL)
                traffic.answered(MANY)
                with traffic.gentle():
                    serve.until_up(kind, 2)
        assert not traffic.bad, traffic.ended
        assert traffic.slowest_s < BUDGET_S / 2


def test_a_batcher_killed_together_with_its_executor_loses_no_request_of_gateways_and_clients(
    criteo_model: Path, tmp_path: Path
) -> None:
    """One process, two deaths: what was queued, under way and computed there must be asked again, and answered once."""
    with Serve(criteo_model, tmp_path, *PAIRS) as serve:
        with Traffic(criteo_model, http=serve.http_port, nats=serve.nats_url) as traffic:
            for _ in range(2):
                traffic.answered(MANY)
                batcher = serve.pids("batcher")[0]
                assert batcher in serve.pids("executor")
                os.kill(batcher, signal.SIGKILL)
                traffic.answered(MANY)
                with traffic.gentle():
                    serve.until_up("batcher", 2)
        assert not traffic.bad, traffic.ended


@pytest.mark.parametrize(("kind", "placement"), [("batcher", "apart"), ("executor", "apart"), ("executor", "together")])
def test_a_frozen_process_of_two_holds_up_no_request_for_long(
    criteo_model: Path, tmp_path: Path, kind: str, placement: str
) -> None:
    """Half alive is worse than dead: its connection stays open and messages to it vanish. Awake again, it must not
    answer twice or wrongly."""
    with Serve(criteo_model, tmp_path, *PAIRS, "--placement", placement) as serve:
        with Traffic(criteo_model, http=serve.http_port, nats=serve.nats_url) as traffic:
            traffic.answered(MANY)
            frozen = serve.pids(kind)[0]
            os.kill(frozen, signal.SIGSTOP)
            try:
                traffic.answered(MANY)
            finally:
                os.kill(frozen, signal.SIGCONT)
            traffic.answered(MANY)
        assert not traffic.bad, traffic.ended
        assert traffic.slowest_s < 5


@pytest.mark.parametrize("placement", ["apart", "together"])
def test_without_any_executor_callers_are_told_at_once_and_served_again_when_one_is_back(
    criteo_model: Path, tmp_path: Path, placement: str
) -> None:
    """Waiting for nobody until the budget runs out would stall every caller."""
    with Serve(criteo_model, tmp_path, "--placement", placement) as serve:
        with Traffic(criteo_model, http=serve.http_port, nats=serve.nats_url) as traffic:
            os.kill(serve.pids("executor")[0], signal.SIGKILL)
            traffic.until_ended("UNAVAILABLE")
            traffic.answered(MANY)
        assert set(traffic.bad) == {"UNAVAILABLE"}, traffic.ended
        assert traffic.slowest_s < 5


def test_a_broker_killed_and_restarted_leaves_the_gateway_honest_and_nothing_stale_scored(
    criteo_model: Path, tmp_path: Path
) -> None:
    """Requests buffered for a dead broker and delivered later would be scored for callers who have left."""
    with Serve(criteo_model, tmp_path) as serve:
        port = serve.http_port
        with Traffic(criteo_model, http=port, nats=serve.nats_url) as traffic:
            traffic.answered(MANY)
            for _ in range(2):
                (broker,) = serve.pids("broker")
                os.kill(broker, signal.SIGKILL)
                traffic.until_ended("UNAVAILABLE")
                traffic.answered(MANY)
        until(serve.ready, "ready again")
        assert set(traffic.bad) == {"UNAVAILABLE"}, traffic.ended


def test_readiness_tells_the_truth_while_the_broker_is_away_for_seconds(criteo_model: Path, tmp_path: Path) -> None:
    """A gateway that says ready without a broker draws traffic that it can only refuse."""
    with Serve(criteo_model, tmp_path) as serve:
        port = serve.http_port
        assert serve.ready()
        (broker,) = serve.pids("broker")
        with Traffic(criteo_model, http=port) as traffic:
            os.kill(broker, signal.SIGSTOP)  # as good as gone, and the supervisor does not replace it
            try:
                until(lambda: not serve.ready(), "not ready without a broker")
                traffic.until_ended("UNAVAILABLE")
            finally:
                os.kill(broker, signal.SIGCONT)
            traffic.answered(MANY)
        assert set(traffic.bad) <= {"UNAVAILABLE"}, traffic.ended
        assert serve.ready()


def test_retries_hide_the_loss_of_the_only_executor(criteo_model: Path, tmp_path: Path) -> None:
    """The client retries where the error table says that it helps, within the caller's budget."""
    with Serve(criteo_model, tmp_path) as serve:
        with Traffic(criteo_model, nats=serve.nats_url, retry=True) as traffic:
            os.kill(serve.pids("executor")[0], signal.SIGKILL)
            started = time.monotonic()
            traffic.answered(MANY)
        assert not traffic.bad, traffic.ended
        assert time.monotonic() - started < 10
