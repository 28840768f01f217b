"""The benches of serving: what load generators count, which figures are refused, how they are told."""

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from msgspec.structs import replace

from narsil_stream.bench import figures, load, report, serving, shell, table, wrk
from narsil_stream.bench.asking import Server, load_for, run_of
from narsil_stream.bench.callers import http_request
from narsil_stream.bench.figures import BadRun, Figures, doubt, rows_of
from narsil_stream.bench.load import Load
from narsil_stream.bench.questions import WAYS, Question, WrongAnswer, asked
from narsil_stream.bench.report import Report
from narsil_stream.cli import cli
from narsil_stream.kernels import noop
from narsil_stream.kernels.backend import RaggedBatch
from tests.support import PATIENCE_S

ASK = Question("http", "/", {}, b"question")


class Door:
    """An HTTP server of the test's own. It counts requests, and stands still from time to time if it is told to."""

    def __init__(self, answer: bytes = b"answer", stall_s: float = 0.0, every: int = 0) -> None:
        self.answer, self.stall_s, self.every = answer, stall_s, every
        self.count = 0
        self.port = 0
        self._loop = asyncio.new_event_loop()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                await reader.readuntil(b"\r\n\r\n")
                await reader.readexactly(len(ASK.body))
                self.count += 1
                if self.every and self.count % self.every == 0:
                    time.sleep(self.stall_s)  # noqa: ASYNC251 the whole server stands still
                head = b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(self.answer)
                writer.write(head + self.answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    def __enter__(self) -> "Door":
        self._loop.run_until_complete(self._listen())
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE_S)
        self._server.close()


def loop_for(door: Door, **changes: object) -> Load:
    return replace(Load(door.port, [ASK], [b"answer"], in_flight=4, seconds=0.3, warm_s=0.05), **changes)


def test_a_closed_loop_counts_what_the_server_counted() -> None:
    """Requests that never went out would make a server look fast."""
    with Door() as door:
        outcome = load.run(loop_for(door), processes=2)
        assert outcome.sent == door.count
    assert 0 < outcome.good == len(outcome.latencies) <= outcome.sent
    assert (outcome.wrong, outcome.failed) == (0, 0)
    assert outcome.latencies.min() > 0


def test_there_are_no_more_generators_than_requests_in_flight() -> None:
    """One list of connections holds 64 and 1: the second case must not end the run."""
    with Door() as door:
        outcome = load.run(loop_for(door, in_flight=1), processes=4)
        assert outcome.sent == door.count
    assert outcome.good > 0
    assert outcome.failed == 0


@pytest.mark.parametrize("ignored", [False, True], ids=["as usual", "SIGCHLD ignored"])
def test_a_generator_that_dies_is_told_with_what_it_said(ignored: bool) -> None:
    """Where a parent ignores SIGCHLD each status reads 0, and nothing from a dead one read as "data was truncated"."""
    script = (
        "import signal, sys\n"
        f"if {ignored}: signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
        "from narsil_stream.bench import load\n"
        "from narsil_stream.bench.questions import Question\n"
        "try: load.run(load.Load(1, [Question('none', '/', {}, b'x')], [b'a'], 8, 0.1), 2)\n"
        "except load.LoadFailed as error: sys.exit(str(error))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 1
    assert f"ended with status {0 if ignored else 1} and no outcome" in done.stderr
    assert "Invalid enum value 'none'" in done.stderr


def test_what_a_library_prints_is_not_taken_for_an_outcome(tmp_path: Path) -> None:
    """Some libraries print when they are loaded."""
    noisy = tmp_path / "sitecustomize.py"
    noisy.write_text("import uvloop\nrun = uvloop.run\nuvloop.run = lambda it: (print('hello'), run(it))[1]\n")
    with Door() as door, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
        assert load.run(loop_for(door, seconds=0.1)).good > 0


def test_wrong_answers_fail_the_run() -> None:
    """A server that answers rubbish is the fastest of all."""
    with Door(answer=b"rubbish") as door, pytest.raises(BadRun, match="answers were wrong"):
        figures.measure("door", loop_for(door))


def test_an_open_loop_keeps_its_rate_whatever_the_server_does() -> None:
    """Poisson arrivals: as many as were asked for, whether the server keeps up or not."""
    with Door() as door:
        outcome = load.run(loop_for(door, rate=400.0, seconds=0.5))
        assert outcome.sent == door.count == int(400 * 0.55)
    assert outcome.good / outcome.seconds == pytest.approx(400, rel=0.35)


def test_latency_of_an_open_loop_counts_from_the_intended_time() -> None:
    """A server that stands still for 0.2 s keeps requests from being sent: what they waited is latency all the same."""
    with Door(stall_s=0.2, every=60) as door:
        given = loop_for(door, in_flight=1, seconds=0.6, warm_s=0.0)
        opened = load.run(replace(given, rate=200.0))
        closed = load.run(given)
    assert np.median(closed.latencies) < 20  # a closed loop waits with the server, and does not notice
    assert np.mean(opened.latencies > 50) > 0.2
    assert opened.latencies.max() >= 180


@pytest.mark.parametrize("way", ["http", "http-binary", "grpc", "nats"])
def test_a_bare_echo_answers_each_request_once(way: str, tmp_path: Path) -> None:
    """An echo that answers twice would let every generator pass for fast enough."""
    with shell.workplace("shell") as (_, _, backend):
        questions = [one.question for one in asked(WAYS[way], backend, 10, 3)]
    with ExitStack() as stack:
        url = stack.enter_context(serving.own_broker(tmp_path)).url if way == "nats" else ""
        port, _ = stack.enter_context(serving.echo(WAYS[way].transport, b"answer", tmp_path, url))
        given = Load(port, questions, [b"answer"] * 3, 4, 0.2, 0.0)
        outcome = load.run(given)
        assert outcome.good > 0
        assert outcome.wrong == outcome.failed == 0
        if WAYS[way].transport == "http":
            asyncio.run(nothing_more_than_one_answer(port, http_request(questions[0])))


async def nothing_more_than_one_answer(port: int, request: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    assert (await reader.readuntil(b"answer")).count(b"HTTP/1.1") == 1
    writer.write(request)  # whatever came in excess would come before the next answer
    assert (await reader.readuntil(b"answer")).count(b"HTTP/1.1") == 1
    writer.write_eof()
    assert await reader.read() == b""


@pytest.mark.skipif(not wrk.available(), reason="wrk is not installed")
def test_wrk_counts_what_the_server_counted() -> None:
    """Its script and its output are ours to get right."""
    with Door() as door:
        said = wrk.run(loop_for(door, seconds=1.0))
        assert 0 < said["requests"] <= door.count <= said["requests"] + 4
    assert said["failed"] == 0
    assert 0 < said["p50"] <= said["p99"] <= said["p999"]


@pytest.mark.skipif(not wrk.available(), reason="wrk is not installed")
def test_wrk_refuses_answers_of_another_length() -> None:
    """It compares no bytes, so their number has to do."""
    with Door(answer=b"x" * 5000) as door, pytest.raises(load.LoadFailed, match="bytes a request"):
        wrk.run(loop_for(door, seconds=1.0))


@contextmanager
def served(folder: Path, *options: str) -> Iterator[tuple[serving.Pipeline, list[shell.Asked]]]:
    with (
        shell.workplace("shell") as (_, model, backend),
        serving.pipeline(folder, model, "--backend", "noop", *options) as ours,
    ):
        yield ours, asked(WAYS["http"], backend, 10, 4)


def test_figures_that_bypassed_the_broker_are_refused(tmp_path: Path) -> None:
    """In mode inline a gateway's requests never reach the broker: a figure of it is not one of the pipeline."""
    with served(tmp_path, "--mode", "inline") as (ours, questions):
        server = Server("inline", WAYS["http"], ours.http, ours.broker)
        given = load_for(server, questions, 4, 0.3, 1e-6)
        with pytest.raises(serving.Bypassed, match="another way"):
            run_of(server, given)()
        assert run_of(server._replace(broker=None), given)().requests_per_s > 0


def test_a_server_with_other_scores_is_not_timed(tmp_path: Path) -> None:
    """Answers are checked before anything is timed."""
    with served(tmp_path) as (ours, questions):
        server = Server("pipeline", WAYS["http"], ours.http, ours.broker)
        wrong = [one._replace(scores=one.scores + 0.5) for one in questions]
        with pytest.raises(WrongAnswer, match="scores differ"):
            load_for(server, wrong, 4, 0.3, 1e-6)


def test_a_generator_that_is_not_fast_enough_is_told() -> None:
    """Otherwise the generator may be what was measured."""
    assert doubt(fastest=1000, echo=1500) == ""
    assert "1.49 times the fastest" in doubt(fastest=1000, echo=1490)


def test_ratios_say_how_many_times_better() -> None:
    """More requests and less time are both better."""
    slow, fast = Figures(100, 4.0, 8.0, 9.0, 1), Figures(300, 1.0, 2.0, 3.0, 1)
    rows = {row.metric: row for row in rows_of("case", 10, [fast] * 3, "peer", [slow] * 3)}
    assert (rows["requests_per_s"].value, rows["requests_per_s"].ratio) == (300, 3)
    assert (rows["rows_per_s"].value, rows["rows_per_s"].ratio) == (3000, 3)
    assert (rows["p50_ms"].value, rows["p50_ms"].ratio) == (1.0, 4)


def test_the_table_marks_what_does_not_count() -> None:
    """A figure in a table is read before any remark below it."""
    rows = list(rows_of("shell/http/100rows/c64", 100, [Figures(300, 1.0, 2.0, 3.0, 1)]))
    shown = table.markdown(Report({"cpu": "one"}, rows, {"ray": "no"}, {"shell/http/100rows/c64": "slow generator"}))
    assert "| `shell/http/100rows/c64` (invalid) | 300 ± 0 % | 30,000 | 1.00 | 2.00 | 3.00 |" in shown
    assert "- absent: `ray`: no" in shown


def test_the_command_measures_http_and_nats_and_writes_them_as_json(tmp_path: Path) -> None:
    """Gates read these names."""
    file, plot = tmp_path / "shell.json", tmp_path / "shell.svg"
    pick = [
        "--ways",
        "http,nats",
        "--rows",
        "10",
        "--connections",
        "8",
        "--seconds",
        "0.3",
        "--rounds",
        "1",
        "--open-at",
        "0.5",
    ]
    done = CliRunner().invoke(cli, ["bench", "shell", *pick, "--json", str(file), "--plot", str(plot)])
    assert done.exit_code == 0, done.output
    found = json.loads(file.read_bytes())
    assert {"command", "commit", "cpu", "cores"} <= set(found["machine"])
    assert "state" not in found["machine"]
    rows = {(row["case"], row["metric"], row["baseline"]): row for row in found["rows"]}
    for way in ("http", "nats"):
        for metric in ("requests_per_s", "rows_per_s", "p50_ms", "p99_ms", "p999_ms"):
            assert rows[f"shell/{way}/10rows/c8", metric, "echo"]["value"] > 0
        assert rows[f"shell/echo/{way}/10rows/c8", "requests_per_s", None]["ratio"] is None
    opened = rows["shell/nats/10rows/c8/open50", "requests_per_s", None]
    assert opened["value"] < rows["shell/nats/10rows/c8", "requests_per_s", "echo"]["value"]
    assert set(found["rows"][0]) == {"case", "metric", "value", "unit", "baseline", "ratio"}
    assert "1 executor + batcher" in found["notes"]["shell/http/10rows/c8"]
    assert "| `shell/http/10rows/c8`" in done.output
    assert "shell/nats/10rows/c8" in plot.read_text()


def test_what_was_measured_before_an_interruption_is_kept(tmp_path: Path) -> None:
    """A run of an hour that is stopped in its last case had nothing to show."""
    file = tmp_path / "new" / "shell.json"
    plan = shell.Plan(("http",), (10,), (4, 2), 0.2, 1, (), file=file)

    def say(text: str) -> None:
        if text.endswith("/c2"):
            raise KeyboardInterrupt

    report.prepare(file, None)
    with pytest.raises(KeyboardInterrupt):
        shell.shell(plan, say)
    found = json.loads(file.read_bytes())
    assert "unfinished" in found["machine"]["state"]
    assert {row["case"] for row in found["rows"]} == {"shell/http/10rows/c4", "shell/echo/http/10rows/c4"}
    assert list(file.parent.iterdir()) == [file]


def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path: Path) -> None:
    """It was told after an hour."""
    done = CliRunner().invoke(cli, ["bench", "shell", "--json", "/proc/shell.json"])
    assert done.exit_code == 1
    assert "/proc/shell.json" in done.output
    assert "shell/http" not in done.output


def test_the_no_op_family_tells_rows_apart() -> None:
    """Answers of a bench are checked by it."""
    with shell.workplace("shell") as (_, model, backend):
        assert isinstance(backend, noop.Noop)
        (one,) = asked(WAYS["http"], noop.load(model), 50, 1)
        ragged = RaggedBatch(
            np.zeros((3, 13), np.float32), np.array([1, 2, 512], np.int32), np.zeros((3, 26), np.int32)
        )
        ragged.lengths[0, 5], ragged.lengths[1, 0] = 2, 1
        scores = np.empty(3, np.float32)
        backend.run(ragged, scores)
    assert len(set(one.scores.tolist())) > 40
    assert ((one.scores >= 0) & (one.scores < 1)).all()
    assert (scores * 1024).tolist() == [1, 512, 0]  # bags of 2, 1 and no ids


def test_scores_may_differ_in_their_last_bits_and_nothing_else_may() -> None:
    """A real engine's scores depend on the batch; other rows' scores must not pass for that."""
    scores = np.array([0.25, 0.5], np.float32)
    right = b"head" + scores.tobytes() + b"tail"
    near, far = (b"head" + (scores + by).astype(np.float32).tobytes() + b"tail" for by in (1e-4, 1e-1))
    for answer, passes in ((right, True), (near, True), (far, False), (near[:-1] + b"x", False), (near + b"x", False)):
        with Door(answer=answer) as door:
            given = loop_for(door, answers=[right], tolerance=1e-3, scores_at=4, rows=2, seconds=0.1)
            outcome = load.run(given)
        assert (outcome.wrong == 0, outcome.good > 0) == (passes, passes)
