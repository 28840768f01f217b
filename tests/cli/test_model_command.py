"""`narsil model`: from nothing to a checked artifact."""

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from narsil_stream.cli.model import model
from narsil_stream.cli.model_view import as_table, described, size
from narsil_stream.core.criteo import Parser
from narsil_stream.kernels.artifact import MODEL, WEIGHTS, read, read_spec
from narsil_stream.kernels.init import plain_spec
from narsil_stream.schemas.model import DcnV2


def run(*args: object) -> Result:
    return CliRunner().invoke(model, [str(arg) for arg in args], env={"COLUMNS": "120"})


def tells(result: Result, *parts: str) -> bool:
    """Whether the command failed with these parts in its message, whatever the frame around it has broken apart."""
    assert (result.exit_code, result.stdout) == (1, ""), result.output
    assert "Traceback" not in result.stderr
    message = re.sub(r"[\s│]", "", result.stderr)
    return all(part.replace(" ", "") in message for part in parts)


@pytest.fixture
def made(tmp_path: Path) -> Path:
    folder = tmp_path / "made"
    result = run("init", folder, "--rows", 50, "--dim", 4, "--bottom", "8", "--top", "", "--name", "tiny")
    assert result.exit_code == 0, result.output
    return folder


def test_help_teaches_by_one_example_each_and_imports_no_numerics() -> None:
    """Help is what people ask for first: it must be quick, and show what to type."""
    code = (
        "import sys; from click.testing import CliRunner; from narsil_stream.cli.model import model;"
        "runs = [CliRunner().invoke(model, [*name, '--help']).output for name in [[], *([n] for n in model.commands)]];"
        "assert len(runs) == 9 and all('Example' in out for out in runs), runs;"
        "assert not {'numpy', 'torch', 'safetensors'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_default_model_reads_criteo_rows(tmp_path: Path) -> None:
    """`narsil model init FOLDER` alone must give something that can be served and scored."""
    assert run("init", tmp_path / "m").exit_code == 0
    spec = read(tmp_path / "m").spec
    assert (spec.name, spec.n_dense, spec.n_sparse, spec.preprocessing is not None) == ("dlrm", 13, 26, True)


def test_every_part_of_a_models_shape_can_be_chosen(tmp_path: Path) -> None:
    """Measurements need the shapes of others."""
    args = [
        "--dense",
        5,
        "--tables",
        3,
        "--rows",
        9,
        "--dim",
        2,
        "--bottom",
        "7,6",
        "--top",
        "4",
        "--precision",
        "INT8",
    ]
    assert run("init", tmp_path / "m", *args, "--version", "v2", "--seed", 3).exit_code == 0
    spec = read(tmp_path / "m").spec
    assert (spec.n_dense, spec.version, spec.preprocessing) == (5, "v2", None)
    assert (spec.architecture.bottom, spec.architecture.top) == ((7, 6, 2), (4, 1))
    assert [(table.name, table.rows, table.dtype) for table in spec.tables] == [(f"C{i}", 9, "INT8") for i in (1, 2, 3)]


def test_a_cross_network_is_a_choice_of_one_option(tmp_path: Path) -> None:
    """DCNv2 is the model of MLPerf: measured, trained and served like the other."""
    small = ("--rows", 9, "--dim", 2, "--top", "4")
    assert run("init", tmp_path / "m", "--architecture", "dcn-v2", *small).exit_code == 0
    assert read(tmp_path / "m").spec.architecture == DcnV2(13, 2, (64, 2), (4, 1), cross_layers=3, cross_rank=64)
    options = ("--architecture", "dcn-v2", "--cross-layers", 2, "--cross-rank", 5, "--pooling", "mean")
    assert run("init", tmp_path / "n", *options, *small).exit_code == 0
    spec = read(tmp_path / "n").spec
    assert spec.architecture == DcnV2(13, 2, (64, 2), (4, 1), "mean", cross_layers=2, cross_rank=5)
    shown = run("inspect", tmp_path / "n").stdout
    for text in ("cross network (DCNv2), mean pooling", "2 layers of rank 5, width 54", "54-4-1"):
        assert text in shown
    assert run("quantize", tmp_path / "n", tmp_path / "q", "--rows", 50).exit_code == 0
    assert run("verify", tmp_path / "q").stdout.startswith("OK: dlrm version 1, 66 tensors, ")


@pytest.mark.parametrize("option", ["--cross-layers", "--cross-rank"])
def test_options_of_a_cross_network_without_one_are_refused(tmp_path: Path, option: str) -> None:
    """Who sets a rank and gets dot products would measure the wrong model."""
    result = run("init", tmp_path / "m", option, 2)
    assert result.exit_code == 2
    assert f"{option} needs --architecture dcn-v2" in result.stderr
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("widths", ["64,", "a", "0", "64;32", "70000"])
def test_widths_that_are_none_are_refused_with_an_example(tmp_path: Path, widths: str) -> None:
    """A usage error, before anything is written."""
    result = run("init", tmp_path / "m", "--top", widths)
    assert result.exit_code == 2
    assert "64,32" in result.stderr
    assert not (tmp_path / "m").exists()


def test_an_artifact_is_replaced_only_on_purpose(made: Path) -> None:
    """A slip of the hand must not cost a trained model."""
    assert tells(run("init", made), "--overwrite")
    assert read_spec(made).name == "tiny"
    assert run("init", made, "--overwrite").exit_code == 0
    assert read_spec(made).name == "dlrm"


def test_a_name_that_cannot_be_served_is_refused(tmp_path: Path) -> None:
    """Names become NATS subjects."""
    assert tells(run("init", tmp_path / "m", "--name", "a.b"), "$.name")
    assert not (tmp_path / "m").exists()


def test_verify_says_ok_or_exactly_what_is_wrong(made: Path) -> None:
    """The last check before a model goes into service."""
    result = run("verify", made)
    assert result.exit_code == 0
    assert result.stdout.startswith("OK: tiny version 1, 32 tensors, ")
    assert read_spec(made).files[WEIGHTS] in result.stdout
    weights = bytearray((made / WEIGHTS).read_bytes())
    weights[-1] ^= 1
    (made / WEIGHTS).write_bytes(weights)
    assert tells(run("verify", made), f"{WEIGHTS}: found sha256", "expected", "Next:")


@pytest.mark.parametrize("command", [("verify",), ("inspect",), ("quantize", "target")])
def test_a_wrong_path_ends_in_one_message_without_a_traceback(tmp_path: Path, command: tuple[str, ...]) -> None:
    """The first mistake of a new user."""
    name, *rest = command
    assert tells(run(name, tmp_path / "no", *(tmp_path / part for part in rest)), f"no/{MODEL}: found nothing")


def test_inspect_shows_sizes_without_reading_weights(made: Path) -> None:
    """People look before they load; models are large."""
    (made / WEIGHTS).unlink()
    result = run("inspect", made)
    assert result.exit_code == 0
    for text in ("tiny, version 1", "13-8-4", "355-1", "C1 ... C26 (26)", "50 each", "FP32", "criteo"):
        assert text in result.stdout


def test_inspect_gives_json_to_scripts(made: Path) -> None:
    """The numbers must be those of the file."""
    facts = json.loads(run("inspect", made, "--json").stdout)
    tensors = read(made).tensors
    assert facts["spec"] == json.loads((made / MODEL).read_bytes())
    assert facts["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    assert facts["parameters"] == sum(tensor.size for tensor in tensors.values())
    assert facts["tables"][0] == {"name": "C1", "rows": 50, "dtype": "FP32", "bytes": 50 * 4 * 4}


def test_quantize_writes_the_smaller_model_and_tells_its_price(made: Path, tmp_path: Path) -> None:
    """Nobody should save memory without seeing what it costs."""
    result = run("quantize", made, tmp_path / "small", "--rows", 500)
    assert result.exit_code == 0, result.output
    small = read(tmp_path / "small").spec
    assert {table.dtype for table in small.tables} == {"INT8"}
    assert 0 < small.metrics["max_score_drift"] < 0.05
    assert f"at most {small.metrics['max_score_drift']:.2g}" in result.stdout
    assert tells(run("quantize", tmp_path / "small", tmp_path / "smaller"), "found INT8 rows")
    facts = described(small)
    assert facts["table_bytes"] == 26 * 50 * (4 + 4)
    assert facts["parameters"] == described(read_spec(made))["parameters"]


@pytest.mark.parametrize("labels", [True, False])
def test_synthesize_writes_rows_and_tells_the_best_a_model_can_do(tmp_path: Path, labels: bool) -> None:
    """Without the best AUC, a trained model's AUC says nothing."""
    file = tmp_path / "clicks.tsv"
    result = run("synthesize", file, "--rows", 1200, "--seed", 5, "--labels" if labels else "--no-labels")
    assert result.exit_code == 0, result.output
    assert "Best AUC 0." in result.stderr
    rows = Parser([10] * 26).feed(file.read_bytes())
    assert (len(rows.lines), rows.bad, rows.labels is not None) == (1200, [], labels)


def test_synthesize_can_feed_a_pipe() -> None:
    """`narsil model synthesize - | narsil score -` is the shortest demo there is."""
    result = run("synthesize", "-", "--rows", 7)
    assert result.stdout.count("\n") == 7
    assert "7 rows" in result.stderr


def test_train_prints_and_keeps_its_measurement(tmp_path: Path) -> None:
    """The number on the screen and the number in the artifact are the same."""
    pytest.importorskip("torch", reason="torch is not installed")
    run("synthesize", tmp_path / "clicks.tsv", "--rows", 3000)
    args = ["--rows", 500, "--dim", 4, "--top", "8", "--batch-rows", 128, "--name", "ctr"]
    result = run("train", tmp_path / "clicks.tsv", tmp_path / "m", *args)
    assert result.exit_code == 0, result.output
    metrics = read(tmp_path / "m").spec.metrics
    assert f"2,700 rows, measured on 300 held out: AUC {metrics['auc']:.4f}" in result.stdout
    assert np.isfinite(list(metrics.values())).all()
    assert tells(run("train", tmp_path / "clicks.tsv", tmp_path / "m", *args), "found an artifact")


def test_train_without_torch_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default installation has no torch."""
    monkeypatch.setitem(sys.modules, "torch", None)
    assert tells(run("train", tmp_path / "clicks.tsv", tmp_path / "m"), "make setup")


def test_tables_of_different_kinds_get_lines_of_their_own() -> None:
    """Only neighbours that are the same may share one."""
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(as_table(plain_spec("x", 2, [5, 5, 7, 5], 4, (), ())))
    text = console.export_text()
    assert "C1 ... C2 (2)" in text
    assert "C3 " in text and "C4 " in text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (16_753_484, "16.8 MB"), (999_900_000, "1 GB")]
)
def test_sizes_are_told_in_decimal_units(count: int, text: str) -> None:
    """1000 kB would be read as a mistake."""
    assert size(count) == text
