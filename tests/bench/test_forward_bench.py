"""The bench of the forward pass: what it refuses to time and how it reports."""

import sys

import numpy as np
import pytest

from narsil_stream.bench import forward
from narsil_stream.bench.forward import Report, Row, WrongScores
from narsil_stream.kernels.reference import Reference, sigmoid


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


def test_families_that_the_machine_lacks_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty table looks like success."""
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setattr(forward, "LATENCY_ROWS", (3,))
    report = forward.forward(forward.reference_model(table_rows=20), repeats=1)
    assert "CuPy" in report.absent["native"]
    assert [row.case for row in report.rows] == ["forward/reference/cpu/fp64/3"]
    assert "absent: native" in forward.text(report)


def test_the_report_shows_ratios_and_rows_a_second_against_batch_size() -> None:
    """Figures without their baseline are not comparable."""
    rows = [
        Row("forward/native/cuda/fp16/1600/fused", "device", 20.0, "us", "fbgemm-graph", 5.0),
        Row("forward/native/cuda/fp16/4096/fused", "throughput", 100.0, "Mrows/s"),
        Row("forward/native/cuda/fp16/8192/fused", "throughput", 200.0, "Mrows/s"),
    ]
    shown = forward.text(Report({"gpu": "one GPU"}, rows, {}))
    assert "5.00x fbgemm-graph" in shown
    assert f"{'#' * 20} 100.0 M rows/s" in shown
    assert f"{'#' * 40} 200.0 M rows/s" in shown
