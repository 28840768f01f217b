"""Processes that live and cannot be reached: the broker keeps their connections, and nothing comes through."""

from pathlib import Path

import pytest

from tests.faults.relay import Relay
from tests.faults.serving import Serve, actor
from tests.faults.traffic import BUDGET_S, Traffic
from tests.support import until

MANY = 500


@pytest.mark.parametrize("kind", ["batcher", "executor"])
def test_a_process_that_is_cut_off_holds_up_no_request_and_answers_none_twice(
    criteo_model: Path, tmp_path: Path, kind: str
) -> None:
    """It believes that it is the one that works; what it says once it is heard again comes too late for everybody."""
    with Serve(criteo_model, tmp_path) as serve, Relay(serve.nats_url) as relay:
        model = ["--model", str(criteo_model)] if kind == "executor" else []
        with actor(kind, tmp_path, "--nats-url", relay.url, *model):
            log = tmp_path / f"{kind}.log"
            until(lambda: "is ready" in log.read_text(), f"another {kind}")
            with Traffic(criteo_model, http=serve.http_port, nats=serve.nats_url) as traffic:
                for _ in range(2):
                    traffic.answered(MANY)
                    relay.cut()
                    traffic.answered(MANY)
                    relay.heal()
                    traffic.answered(MANY)
            assert not traffic.bad, traffic.ended
            assert traffic.slowest_s < BUDGET_S / 2
