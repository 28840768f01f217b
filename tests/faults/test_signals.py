"""The end of `narsil serve` by signals, when requests are under way."""

import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.asking import HttpAnswer, ask_http, infer_json, json_scores, metric, some_rows
from tests.faults.serving import Serve, alive
from tests.faults.traffic import Traffic
from tests.support import PATIENCE_S, until

CALLERS = 4


def test_ctrl_c_drains(criteo_model: Path, tmp_path: Path) -> None:
    """What was accepted is answered; then callers are turned away or see closed connections, never a wrong answer."""
    with Serve(criteo_model, tmp_path, "--grpc-processes", "1") as serve:
        pids = [row["pid"] for row in serve.actors()]
        with Traffic(criteo_model, http=serve.http_port) as traffic:
            traffic.answered(300)
            assert serve.interrupt() == 0
        assert set(traffic.bad) <= {"connection", "UNAVAILABLE"}, traffic.ended
        assert not list(filter(alive, pids))
        assert "killing it" not in serve.log.read_text()


@contextmanager
def slowly_served(model: Path, folder: Path, batch_s: int) -> Iterator[tuple[Serve, list[Future[HttpAnswer]]]]:
    """Requests under way in a system whose device takes `batch_s` for a batch; one of them is computed, others wait."""
    device = ("--backend", "noop", "--executor-noop-us", str(batch_s * 1_000_000))
    asked = infer_json(some_rows(model, 1), timeout=60_000_000)
    with ThreadPoolExecutor(CALLERS) as pool, Serve(model, folder, "--mode", "inline", *device) as serve:
        port = serve.http_port
        asking = [pool.submit(ask_http, port, "POST", "/v2/models/ctr/infer", asked) for _ in range(CALLERS)]
        until(lambda: offered(serve) == CALLERS, "all requests are accepted")
        yield serve, asking


def offered(serve: Serve) -> float:
    """Requests that came to the gateway."""
    text = serve.metrics()
    names = set(re.findall(r'actor="(gateway-\w+)"', text))
    return sum(metric(text, "narsil_requests_offered_total", actor=name) for name in names)


def test_a_signal_that_comes_over_two_ways_still_drains(criteo_model: Path, tmp_path: Path) -> None:
    """What stops a whole group reaches `make` and what it runs, and `make` passes it on: nobody has lost patience."""
    with slowly_served(criteo_model, tmp_path, batch_s=1) as (serve, asking):
        assert serve.process is not None
        serve.process.send_signal(signal.SIGTERM)
        until(lambda: "stopping: " in serve.log.read_text(), "the first signal is heard")
        serve.process.send_signal(signal.SIGTERM)
        assert not all(one.done() for one in asking), "requests were still under way"
        answers = [one.result(PATIENCE_S) for one in asking]
        assert serve.process.wait(PATIENCE_S) == 0
        assert [len(json_scores(answer.json)) for answer in answers] == [1] * CALLERS
        assert "asked twice" not in serve.log.read_text()


def test_who_asks_again_later_has_all_killed_that_is_left(criteo_model: Path, tmp_path: Path) -> None:
    """A person who presses Ctrl-C once more does not want to wait for a device that takes half a minute."""
    with slowly_served(criteo_model, tmp_path, batch_s=30) as (serve, asking):
        assert serve.process is not None
        pids = [row["pid"] for row in serve.actors()]
        serve.process.send_signal(signal.SIGINT)
        until(lambda: "stopping: " in serve.log.read_text(), "the first signal is heard")
        first = time.monotonic()

        def ended() -> bool:
            assert serve.process is not None
            serve.process.send_signal(signal.SIGINT)
            return serve.process.poll() is not None

        until(ended, "narsil serve ends")
        assert time.monotonic() - first > 0.4, "what comes at once is the same wish"
        assert "asked twice: killing what is left" in serve.log.read_text()
        assert not list(filter(alive, pids))
        for one in asking:
            with pytest.raises(OSError):
                one.result(PATIENCE_S)
