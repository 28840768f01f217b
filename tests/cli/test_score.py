"""`narsil score` against a real system: files, pipes, errors, interruptions."""

import os
import pty
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

import numpy as np
import pytest
from msgspec.structs import replace
from numpy.typing import NDArray

from narsil_stream.cli import score as command
from narsil_stream.kernels.artifact import write
from narsil_stream.kernels.init import criteo_spec, random_batch, random_model
from narsil_stream.schemas.model import DlrmDot, ModelSpec, Table
from tests.support import NatsServer, System, expected, invoke, narsil, plain_environ, until

TABLE_ROWS = 1000


def click_rows(count: int, seed: int = 0, labelled: bool = True) -> list[bytes]:
    """Rows in Criteo's format, one field in eight missing."""
    rng = np.random.default_rng(seed)
    numbers = rng.integers(-2, 500, (count, 13)).astype("S")
    hashes = np.array([[b"%08x" % value for value in row] for row in rng.integers(0, 2**32, (count, 26)).tolist()])
    fields = np.concatenate([numbers.astype("S8"), hashes], axis=1)
    fields[rng.random(fields.shape) < 0.125] = b""
    label = [b"0\t"] if labelled else [b""]
    return [label[0] + b"\t".join(row) for row in fields.tolist()]


def wanted(model: Path, rows: list[bytes]) -> NDArray[np.float32]:
    """Their scores, preprocessed a field at a time and computed by the reference backend."""
    cells = [row.split(b"\t")[-39:] for row in rows]
    dense = [[np.log1p(max(int(cell or 0), 0)) for cell in row[:13]] for row in cells]
    ids = [[int(cell or b"0", 16) % TABLE_ROWS for cell in row[13:]] for row in cells]
    return expected(model, np.array(dense, np.float32), np.array(ids, np.int32))


def file_of(folder: Path, rows: list[bytes], name: str = "rows.tsv") -> Path:
    path = folder / name
    path.write_bytes(b"".join(row + b"\n" for row in rows))
    return path


def scores_in(path: Path) -> NDArray[np.float32]:
    return np.array(path.read_text().split(), np.float32)


def read_lines(stream: IO[bytes] | None, count: int) -> list[bytes]:
    assert stream is not None
    return [stream.readline() for _ in range(count)]


@pytest.mark.parametrize("name", ["criteo_rows.tsv", "criteo_terabyte_rows.tsv", "criteo_unlabelled_rows.tsv"])
def test_real_rows_get_the_scores_of_the_reference(
    name: str, real_rows: Path, shared_system: System, criteo_model: Path, tmp_path: Path
):
    """Parsing, transport, batching and compute together must not change a score."""
    result = invoke("score", "--nats-url", shared_system.url, real_rows / name, tmp_path / "out")
    assert result.exit_code == 0, result.output
    rows = (real_rows / name).read_bytes().splitlines()
    assert np.allclose(scores_in(tmp_path / "out"), wanted(criteo_model, rows), rtol=0, atol=1e-6)


def test_many_small_requests_come_back_in_the_order_of_the_rows(
    shared_system: System, criteo_model: Path, tmp_path: Path
):
    """Batches of different sizes overtake each other; lines of the output must not."""
    rows = click_rows(1003)
    arguments = ("--rows-per-request", "7", "--window", "64", "--model", "ctr", "--model-version", "1")
    result = invoke("score", "--nats-url", shared_system.url, *arguments, file_of(tmp_path, rows), tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "scored 1,003 rows in" in result.stderr and "with ctr version 1" in result.stderr
    assert np.allclose(scores_in(tmp_path / "out"), wanted(criteo_model, rows), rtol=0, atol=1e-6)
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]


def test_a_pipe_gets_scores_before_it_sends_more(shared_system: System, criteo_model: Path):
    """A program on the other side may wait for its answer before it sends the next row."""
    rows = click_rows(6, labelled=False)
    with narsil("score", "--nats-url", shared_system.url, "-", "-") as process:
        assert process.stdin
        scores: list[bytes] = []
        for part in (rows[:2], rows[2:5]):
            process.stdin.write(b"".join(row + b"\n" for row in part))
            process.stdin.flush()
            scores += read_lines(process.stdout, len(part))
        process.stdin.write(rows[5])
        rest, said = process.communicate()
    assert process.returncode == 0, said
    assert np.allclose(np.array([*scores, rest], np.float32), wanted(criteo_model, rows), rtol=0, atol=1e-6)
    assert said.startswith(b"narsil: scored 6 rows") and said.count(b"\n") == 1, "no progress bar in a pipe"


def test_a_bad_row_stops_with_its_line_and_keeps_the_old_output(shared_system: System, tmp_path: Path):
    """Who reads OUT must never take half a file for a whole one."""
    rows = click_rows(20)
    rows[11] = rows[11].replace(b"\t", b"\tx", 3)
    out = tmp_path / "out"
    out.write_text("of an earlier run\n")
    result = invoke("score", "--nats-url", shared_system.url, "--rows-per-request", "4", file_of(tmp_path, rows), out)
    assert result.exit_code == 1
    assert "line 12, I1: found" in result.stderr
    assert f"11 lines were written to {out}.part" in result.stderr
    assert out.read_text() == "of an earlier run\n"
    assert len(scores_in(tmp_path / "out.part")) == 11


def test_skipped_and_blank_lines_stay_empty_lines(shared_system: System, criteo_model: Path, tmp_path: Path):
    """Line i of OUT belongs to line i of IN, so that `paste` can join them."""
    rows = click_rows(30)
    good = wanted(criteo_model, rows)
    rows[0], rows[4], rows[5], rows[29] = b"", b"no row", rows[5] + b"\t", b"x" * 9000
    result = invoke(
        "score", "--nats-url", shared_system.url, "--on-error", "skip", "--rows-per-request", "8",
        file_of(tmp_path, rows), tmp_path / "out",
    )  # fmt: skip
    assert result.exit_code == 3
    assert "scored 26 rows, skipped 3 in" in result.stderr
    assert "skipped line 5, row: found 1 fields" in result.stderr
    lines = (tmp_path / "out").read_text().split("\n")
    assert [i for i, line in enumerate(lines) if not line] == [0, 4, 5, 29, 30]
    kept = [i for i, line in enumerate(lines) if line]
    assert np.allclose(np.array([lines[i] for i in kept], np.float32), good[kept], rtol=0, atol=1e-6)


def test_empty_input_gives_empty_output(shared_system: System, tmp_path: Path):
    """The empty day of a nightly job is no error."""
    result = invoke("score", "--nats-url", shared_system.url, file_of(tmp_path, []), tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "out").read_bytes() == b""
    assert "scored 0 rows" in result.stderr


PEAK_MEMORY = """
import sys
from narsil_stream.cli import main
try:
    main()
finally:
    status = open("/proc/self/status").read()
    print("peak", status.partition("VmHWM:")[2].split()[0], file=sys.stderr)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_does_not_grow_with_the_input(shared_system: System):
    """A day of clicks is larger than any memory."""

    def peak_mib(blocks: int) -> float:
        block = b"".join(row + b"\n" for row in click_rows(2000))
        command = [sys.executable, "-c", PEAK_MEMORY, "score", "--nats-url", shared_system.url, "-", "/dev/null"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, env=plain_environ()) as process:
            assert process.stdin and process.stderr
            for _ in range(blocks):
                process.stdin.write(block)
            process.stdin.close()
            said = process.stderr.read().decode()
        assert f"scored {2000 * blocks:,} rows" in said
        return int(said.split()[-1]) / 1024

    small, large = peak_mib(5), peak_mib(100)
    assert large - small < 8, f"{small:.0f} MiB for 10,000 rows (2 MB), {large:.0f} MiB for 200,000 rows (40 MB)"


def test_without_a_broker_it_says_where_it_looked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The most common mistake of all."""
    monkeypatch.setattr(command, "CONNECT_S", 0.1)
    result = invoke("score", "--nats-url", "nats://127.0.0.1:1", file_of(tmp_path, []), tmp_path / "out")
    assert result.exit_code == 1
    assert "no NATS server at nats://127.0.0.1:1" in result.stderr
    assert "narsil serve" in result.stderr
    assert not list(tmp_path.glob("out*"))


def test_a_broker_on_which_nobody_serves_is_told_apart(
    monkeypatch: pytest.MonkeyPatch, nats_server: NatsServer, tmp_path: Path
):
    """Looking for the broker's fault would be looking in the wrong place."""
    monkeypatch.setattr(command, "CONNECT_S", 0.1)
    result = invoke("score", "--nats-url", nats_server.url, file_of(tmp_path, []), tmp_path / "out")
    assert result.exit_code == 1
    assert "the broker is there, but nothing serves a model on it" in result.stderr


@pytest.mark.parametrize("wrong", [("--model", "nope"), ("--model", "ctr", "--model-version", "7")])
def test_an_unknown_model_is_refused_before_anything_is_written(
    wrong: tuple[str, ...], shared_system: System, tmp_path: Path
):
    """Scores of another model look just like scores."""
    result = invoke("score", "--nats-url", shared_system.url, *wrong, file_of(tmp_path, []), tmp_path / "out")
    assert result.exit_code == 2
    assert "NOT_FOUND" in result.stderr and f"'{wrong[-1]}'" in result.stderr
    assert not list(tmp_path.glob("out*"))


def test_without_a_version_the_newest_one_scores(nats_server: NatsServer, tmp_path: Path):
    """By number: 10 comes after 9. One version scores a whole file, whatever is served meanwhile."""
    rows = click_rows(20)
    folders = [tmp_path / version for version in ("9", "10")]
    for seed, folder in enumerate(folders):
        spec = criteo_spec("ctr", rows=TABLE_ROWS, dim=4, bottom=(8,), top=(8,))
        write(folder, random_model(replace(spec, version=folder.name), seed))
    with System(nats_server.url, *folders):
        result = invoke("score", "--nats-url", nats_server.url, file_of(tmp_path, rows), tmp_path / "out")
    assert "with ctr version 10" in result.stderr
    assert np.allclose(scores_in(tmp_path / "out"), wanted(folders[1], rows), rtol=0, atol=1e-6)


def test_files_that_cannot_be_used_end_with_status_2(shared_system: System, tmp_path: Path):
    """A wrong path is told in one line with its name."""
    rows = file_of(tmp_path, click_rows(1))
    for source, target, reason in (
        (tmp_path / "none", tmp_path / "out", f"{tmp_path}/none: No such file"),
        (tmp_path, tmp_path / "out", f"{tmp_path}: Is a directory"),
        (rows, tmp_path / "none" / "out", f"{tmp_path}/none/out: No such file"),
        (rows, rows, f"IN and OUT are both {rows}"),
    ):
        result = invoke("score", "--nats-url", shared_system.url, source, target)
        assert (result.exit_code, reason in result.stderr) == (2, True), result.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_an_error_with_the_name_of_the_output(shared_system: System, tmp_path: Path):
    """Lost scores must not end with status 0."""
    result = invoke("score", "--nats-url", shared_system.url, file_of(tmp_path, click_rows(3)), "/dev/full")
    assert result.exit_code == 1
    assert "/dev/full: No space left on device" in result.stderr


def test_ctrl_c_keeps_what_is_complete_and_says_how_much(shared_system: System, tmp_path: Path):
    """An interrupted run is worth what it has done, and must not look finished."""
    rows = b"".join(row + b"\n" for row in click_rows(100))
    out = tmp_path / "out"
    with narsil("score", "--nats-url", shared_system.url, "-", out) as process:
        assert process.stdin
        process.stdin.write(rows)
        process.stdin.flush()
        part = tmp_path / "out.part"
        until(lambda: part.exists() and part.read_bytes().count(b"\n") == 100, "100 scores are written")
        process.send_signal(signal.SIGINT)
        _, said = process.communicate()
    assert process.returncode == 130
    assert said.decode() == f"narsil: interrupted\nnarsil: 100 lines were written to {part}\n"
    assert len(scores_in(part)) == 100
    assert not out.exists()


def test_a_reader_that_leaves_ends_it_without_a_word(shared_system: System):
    """`narsil score big.tsv - | head` is a question, not an error."""
    block = b"".join(row + b"\n" for row in click_rows(1000))
    with narsil("score", "--nats-url", shared_system.url, "-", "-") as process:
        assert process.stdin and process.stdout and process.stderr

        def feed(stdin: IO[bytes]) -> None:
            try:
                while True:
                    stdin.write(block)
            except BrokenPipeError:
                return

        feeder = threading.Thread(target=feed, args=(process.stdin,), daemon=True)
        feeder.start()
        assert process.stdout.readline()
        process.stdout.close()
        said = process.stderr.read()
        feeder.join()
    assert (process.returncode, said) == (141, b"")


def test_a_broker_that_restarts_costs_time_and_no_row(nats_server: NatsServer, system: System, criteo_model: Path):
    """A run of hours meets a restart sooner or later."""
    rows = click_rows(40)
    with narsil("score", "--nats-url", nats_server.url, "--budget-ms", "60000", "-", "-") as process:
        assert process.stdin
        scores: list[bytes] = []
        for part in (rows[:20], rows[20:]):
            process.stdin.write(b"".join(row + b"\n" for row in part))
            process.stdin.flush()
            scores += read_lines(process.stdout, 20)
            nats_server.kill()
            nats_server.start()
        process.stdin.close()
        assert process.wait() == 0
    assert np.allclose(np.array(scores, np.float32), wanted(criteo_model, rows), rtol=0, atol=1e-6)


def test_a_terminal_gets_a_progress_bar(shared_system: System, tmp_path: Path):
    """Hours without a sign of life look like a hang; rows/s says when it will be over."""
    ours, theirs = pty.openpty()
    source = file_of(tmp_path, click_rows(2000))
    with narsil("score", "--nats-url", shared_system.url, source, tmp_path / "out", stderr=theirs) as process:
        process.wait()
        os.close(theirs)
        seen = os.read(ours, 1 << 16).decode()
        os.close(ours)
    assert process.returncode == 0
    assert "100%" in seen and "rows/s" in seen
    assert "narsil: scored 2,000 rows" in seen


@pytest.fixture(scope="module")
def plain_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that does not say how text becomes its inputs."""
    spec = ModelSpec(
        name="plain",
        architecture=DlrmDot(dense=3, dim=4, bottom=(4,), top=(4, 1)),
        tables=tuple(Table(name=f"t{i}", rows=rows) for i, rows in enumerate((50, 7, 90))),
    )
    folder = tmp_path_factory.mktemp("models") / "plain"
    write(folder, random_model(spec, seed=5))
    return folder


@pytest.fixture(scope="module")
def plain_system(plain_model: Path):
    with NatsServer() as server, System(server.url, plain_model) as running:
        yield running


def test_text_is_refused_for_a_model_without_preprocessing(plain_system: System, tmp_path: Path):
    """Guessed inputs would give plausible, wrong scores."""
    result = invoke("score", "--nats-url", plain_system.url, file_of(tmp_path, click_rows(1)), tmp_path / "out")
    assert result.exit_code == 2
    assert "model 'plain' says no preprocessing" in result.stderr
    assert "dense [rows, 3]" in result.stderr


@pytest.mark.parametrize("bag", [None, 4], ids=["one-hot", "multi-hot"])
def test_arrays_get_the_scores_of_the_reference(
    bag: int | None, plain_system: System, plain_model: Path, tmp_path: Path
):
    """Rows that somebody has preprocessed need no detour over text."""
    from narsil_stream.kernels import reference

    backend = reference.load(plain_model)
    batch = random_batch(backend.spec, 500, seed=1, bag=bag)
    direct = np.empty(500, np.float32)
    backend.run(batch, direct)
    if batch.lengths is None:
        np.savez(tmp_path / "rows.npz", dense=batch.dense, sparse=batch.ids.reshape(500, 3))
    else:
        np.savez_compressed(tmp_path / "rows.npz", dense=batch.dense, values=batch.ids, lengths=batch.lengths)
    result = invoke(
        "score", "--nats-url", plain_system.url, "--rows-per-request", "64", tmp_path / "rows.npz", tmp_path / "out"
    )
    assert result.exit_code == 0, result.output
    assert np.allclose(scores_in(tmp_path / "out"), direct, rtol=0, atol=1e-6)


def test_a_bad_array_row_fails_alone_and_under_its_own_number(plain_system: System, tmp_path: Path):
    """The serving side refuses whole requests; 511 good rows must not be lost with a bad one."""
    dense, sparse = np.ones((10, 3), np.float32), np.ones((10, 3), np.int64)
    dense[2, 1] = np.nan
    sparse[7, 1] = 7
    np.savez(tmp_path / "rows.npz", dense=dense, sparse=sparse)
    result = invoke(
        "score", "--nats-url", plain_system.url, "--on-error", "skip", tmp_path / "rows.npz", tmp_path / "o"
    )
    assert result.exit_code == 3
    assert "skipped line 3, dense[1]: found nan, expected a finite FP32 number" in result.stderr
    assert "skipped line 8, table t1: found 7, expected an id from 0 to 6" in result.stderr
    lines = (tmp_path / "o").read_text().splitlines()
    assert [i for i, line in enumerate(lines) if not line] == [2, 7] and len(lines) == 10
