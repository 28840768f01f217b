"""The bench of the forward pass: what it refuses to time and how it reports."""

import json
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from narsil_stream import __version__
from narsil_stream.bench import forward, report
from narsil_stream.bench.forward import WrongScores
from narsil_stream.bench.report import NoPlot, Report, Row
from narsil_stream.cli import cli
from narsil_stream.kernels.backend import RaggedBatch
from narsil_stream.kernels.quantize import quantize
from narsil_stream.kernels.reference import Reference, sigmoid
from narsil_stream.kernels.torch_family import unit


def test_wrong_scores_are_not_timed() -> None:
    """A fast wrong kernel would top the table."""
    model = forward.reference_model(table_rows=20)
    reference = Reference(model)
    (long,) = forward.batches(model.spec, 600, 1)
    forward.check("right", model, lambda batch: sigmoid(reference.logits(batch)), batch=long)
    forward.check("right", model, lambda batch: sigmoid(reference.logits(batch)))
    with pytest.raises(WrongScores, match="wrong, 512 rows: scores differ"):
        forward.check("wrong", model, lambda batch: np.full(batch.rows, 0.5, np.float32))
    with pytest.raises(WrongScores):
        forward.check("last row", model, lambda b: np.append(sigmoid(reference.logits(b))[:-1], 0.9), batch=long)
    with pytest.raises(WrongScores):
        forward.check("not a number", model, lambda batch: np.full(batch.rows, np.nan, np.float32))


def test_measures_take_turns_and_the_first_round_does_not_count() -> None:
    """A machine that slows down must slow baseline and candidate alike."""
    calls: list[str] = []
    times = {"a": iter([900.0, 1.0, 5.0, 3.0]), "b": iter([900.0, 10.0, 10.0, 40.0])}

    def measure(name: str) -> float:
        calls.append(name)
        return next(times[name])

    assert forward.alternate(3, lambda: measure("a"), lambda: measure("b")) == [3.0, 10.0]
    assert calls[2:] == ["a", "b"] * 3


def test_every_batch_has_its_turn() -> None:
    """One batch again and again is served by the caches: its figure would be too good."""
    model = forward.reference_model(table_rows=20)
    seen: list[int] = []

    class Way:
        def run(self, batch: RaggedBatch, scores: np.ndarray) -> None:
            seen.append(id(batch))

    given = forward.batches(model.spec, 2)
    forward.alternate(3, forward.turns(Way(), given, 22))
    assert len(given) == 64
    assert set(seen[22:]) == set(map(id, given)), "the first round does not count"


def test_a_message_is_what_was_packed_into_it() -> None:
    """The throughput with packing must pack the same batches as the one without."""
    from narsil_stream.bench.native import Message

    batch = forward.batches(forward.reference_model(table_rows=20).spec, 3, 1)[0]
    found = Message(batch.dense.tobytes(), batch.ids.tobytes()).batch(forward.reference_model(table_rows=20).spec)
    np.testing.assert_array_equal(found.dense, batch.dense)
    np.testing.assert_array_equal(found.ids, batch.ids)


def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without GPU and without torch."""
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(forward, "LATENCY_ROWS", (3,))

    def version(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(unit, "version", version)


def test_families_that_the_machine_lacks_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty table looks like success."""
    bare(monkeypatch)
    found = forward.forward(forward.reference_model(table_rows=20), repeats=1)
    assert "CuPy" in found.absent["native"]
    assert "torch missing" in found.absent["torch"]
    assert [row.case for row in found.rows] == ["forward/reference/cpu/fp64/3"]
    assert "absent: native" in report.text(found)
    assert "absent: torch" in report.text(found)
    assert set(found.absent) == {"native", "torch", "torchrec-eager", "torch on CUDA", "fbgemm-graph"}
    assert "run: the Backend protocol's call" in report.text(found), "what a figure includes"


def test_only_the_device_that_was_asked_for_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Minutes on a GPU machine are dear."""
    bare(monkeypatch)
    model = forward.reference_model(table_rows=20)
    cpu, cuda = (forward.forward(model, 1, device) for device in ("cpu", "cuda"))  # type: ignore[arg-type]
    assert "native" not in cpu.absent and "torchrec-eager" in cpu.absent
    assert cuda.rows == [] and "native" in cuda.absent and "torchrec-eager" not in cuda.absent


def test_the_command_writes_rows_and_machine_as_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Programs compare runs by these names."""
    bare(monkeypatch)
    file = tmp_path / "new" / "folder" / "forward.json"
    done = CliRunner().invoke(cli, ["bench", "forward", "--table-rows", "20", "--repeats", "1", "--json", str(file)])
    assert done.exit_code == 0, done.output
    found = json.loads(file.read_bytes())
    assert {"command", "commit", "python", "cpu", "cores", "numpy"} <= set(found["machine"])
    assert found["rows"][0].keys() == {"case", "metric", "value", "unit", "baseline", "ratio"}
    assert found["rows"][0]["case"] == "forward/reference/cpu/fp64/3"


@pytest.mark.parametrize(
    ("option", "name", "told"),
    [("--json", "file/forward.json", "file"), ("--plot", "forward.txt", "there are: ")],
)
def test_a_file_that_cannot_be_written_is_told_before_anything_is_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, option: str, name: str, told: str
) -> None:
    """Minutes of measurement would be lost."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    (tmp_path / "file").touch()
    monkeypatch.setattr(forward, "forward", lambda *given: pytest.fail("was measured"))
    done = CliRunner().invoke(cli, ["bench", "forward", option, str(tmp_path / name)])
    assert done.exit_code == 1
    assert told in done.output


def test_a_copy_of_a_checkout_names_the_commit_it_was_told_and_an_installed_package_its_version(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A figure without its code cannot be repeated; the commit of whatever repository lies around would be wrong."""
    monkeypatch.setattr(report, "__file__", str(tmp_path / "report.py"))
    monkeypatch.delenv("GIT_COMMIT", raising=False)
    assert report.machine()["commit"] == f"none: narsil-stream {__version__}"
    monkeypatch.setenv("GIT_COMMIT", "abc1234")
    assert report.machine()["commit"] == "abc1234"


@pytest.mark.skipif(not unit.is_here(), reason="no locked unit of torch, FBGEMM and TorchRec")
def test_the_torch_family_is_measured_against_eager_torchrec(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides give the reference's scores, or nothing is timed."""
    from narsil_stream.bench import torch_cpu

    monkeypatch.setattr(torch_cpu, "SIZES", (5, 40))
    model = forward.reference_model(table_rows=20)
    rows = list(torch_cpu.measure(model, quantize(model, "INT8"), 1, {}))
    measured = {row.case: row for row in rows if row.metric == "run"}
    assert measured["forward/torchrec-eager/cpu/fp32/40"].value > 0
    fp32 = measured["forward/torch/cpu/fp32/40"]
    assert fp32.baseline == "torchrec-eager"
    assert fp32.ratio == pytest.approx(measured["forward/torchrec-eager/cpu/fp32/40"].value / fp32.value)


def test_the_picture_has_a_line_for_each_way(tmp_path: Path) -> None:
    """Rows a second against batch size is what people choose a batch size by."""
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    rows = [
        Row(f"forward/{way}/{size}", "throughput", size / 100, "Mrows/s")
        for way in ("torch/cpu/bf16", "torchrec-eager/cpu/fp32")
        for size in (16, 1600)
    ]
    report.plot(Report({}, rows, {}), tmp_path / "forward.svg")
    drawn = (tmp_path / "forward.svg").read_text()
    assert drawn.startswith("<?xml")
    assert "torch cpu bf16" in drawn and "torchrec-eager cpu fp32" in drawn
    with pytest.raises(NoPlot, match="nothing to draw"):
        report.plot(Report({}, [], {}), tmp_path / "none.svg")


def test_a_picture_without_matplotlib_is_refused_with_the_extras_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an optional part."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(NoPlot, match=r"narsil-stream\[bench\]"):
        report.plot(Report({}, [], {}), Path("x.svg"))


def test_the_report_shows_ratios_and_rows_a_second_against_batch_size() -> None:
    """Figures without their baseline are not comparable."""
    rows = [
        Row("forward/native/cuda/fp16/1600/fused", "device", 20.0, "us", "fbgemm-graph", 5.0),
        Row("forward/native/cuda/fp16/4096/fused", "throughput", 100.0, "Mrows/s"),
        Row("forward/native/cuda/fp16/8192/fused", "throughput", 200.0, "Mrows/s"),
    ]
    shown = report.text(Report({"gpu": "one GPU"}, rows, {}))
    assert "5.00x fbgemm-graph" in shown
    assert f"{'#' * 20} 100 M rows/s" in shown
    assert f"{'#' * 40} 200 M rows/s" in shown
