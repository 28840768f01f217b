"""`narsil top` on a real system, as it is typed."""

import json
import os
import pty
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from narsil_stream.core.client import BlockingClient
from tests.asking import some_rows
from tests.support import NatsServer, System, invoke, narsil, until


@contextmanager
def asking(system: System, model: Path) -> Iterator[None]:
    """Ten rows again and again, while the block runs."""
    rows, stop = some_rows(model, 10), threading.Event()

    def ask() -> None:
        with BlockingClient(system.url) as client:
            while not stop.is_set():
                client.score("ctr", dense=rows.dense, sparse=rows.ids)

    caller = threading.Thread(target=ask)
    caller.start()
    try:
        yield
    finally:
        stop.set()
        caller.join(20)


def test_one_table_shows_every_actor_and_that_it_is_up(shared_system: System):
    """The first question at 3 a.m. is who is there."""
    result = invoke("top", "--once", "--nats-url", shared_system.url)
    assert result.exit_code == 0, result.output
    for kind in ("gateway", "batcher", "executor"):
        (actor,) = shared_system.actors(kind)
        (line,) = [line for line in result.stdout.splitlines() if line.startswith(actor.name)]
        assert " up " in line
    assert "3 of 3 up" in result.stdout


def test_scripts_get_a_line_of_json_each_second_with_the_rates_of_now(shared_system: System, criteo_model: Path):
    """Whoever does not want to look can compare."""
    (batcher,) = shared_system.actors("batcher")
    with asking(shared_system, criteo_model):
        top = narsil("top", "--json", "--nats-url", shared_system.url)
        with top:
            assert top.stdout is not None
            for line in top.stdout:
                row = {row["actor"]: row for row in json.loads(line)}.get(batcher.name, {})
                if row.get("rows_per_s"):
                    break
            top.send_signal(signal.SIGINT)
    assert row["rows_per_s"] == pytest.approx(10 * row["requests_per_s"], rel=0.2)  # some are under way
    assert 0 < row["p50_ms"] <= row["p99_ms"]
    assert row["slots"] >= 1 and row["failed_per_s"] == 0
    assert top.returncode == 0


def test_the_live_table_is_drawn_until_ctrl_c(shared_system: System):
    """It takes the whole terminal and has to give it back."""
    ours, theirs = pty.openpty()
    with narsil("top", "--nats-url", shared_system.url, stdout=theirs, stdin=theirs) as top:
        os.close(theirs)
        screen = b""
        (executor,) = shared_system.actors("executor")
        while executor.name.encode() not in screen:
            screen += os.read(ours, 4096)
        top.send_signal(signal.SIGINT)
        until(lambda: top.poll() is not None, "it ends")
        screen += os.read(ours, 4096)
        assert top.stderr is not None
        assert (top.returncode, top.stderr.read()) == (0, b"")
    os.close(ours)
    assert b"\x1b[?1049l" in screen  # back to the ordinary screen


def test_without_actors_the_next_step_is_named(nats_server: NatsServer):
    """An empty table would leave the reader guessing."""
    result = invoke("top", "--once", "--nats-url", nats_server.url)
    assert result.exit_code == 1
    assert "no actor reports on it" in result.stderr
    assert "narsil serve" in result.stderr
