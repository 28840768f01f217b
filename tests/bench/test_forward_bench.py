"""The bench of the forward pass: what it refuses to time and how it reports."""

import json
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from narsil_stream.bench import forward, report
from narsil_stream.bench.forward import WrongScores
from narsil_stream.bench.report import NoPlot, Report, Row
from narsil_stream.cli import cli
from narsil_stream.kernels.quantize import quantize
from narsil_stream.kernels.reference import Reference, sigmoid
from narsil_stream.kernels.torch_family import unit


def test_wrong_scores_are_not_timed() -> None:
    """A fast wrong kernel would top the table."""
    model = forward.reference_model(table_rows=20)
    reference = Reference(model)
    forward.check("right", model, lambda batch: sigmoid(reference.logits(batch)))
    with pytest.raises(WrongScores, match="wrong: scores differ"):
        forward.check("wrong", model, lambda batch: np.full(batch.rows, 0.5, np.float32))
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


def test_the_command_writes_rows_and_machine_as_json(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Programs compare runs by these names."""
    bare(monkeypatch)
    file = tmp_path / "forward.json"
    done = CliRunner().invoke(cli, ["bench", "forward", "--table-rows", "20", "--repeats", "1", "--json", str(file)])
    assert done.exit_code == 0, done.output
    found = json.loads(file.read_bytes())
    assert {"command", "commit", "python", "cpu", "cores", "numpy"} <= set(found["machine"])
    assert found["rows"][0].keys() == {"case", "metric", "value", "unit", "baseline", "ratio"}
    assert found["rows"][0]["case"] == "forward/reference/cpu/fp64/3"


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
