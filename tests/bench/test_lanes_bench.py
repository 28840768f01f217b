"""The bench of several lanes: what it measures and what it leaves out."""

import pytest

from narsil_stream.bench import lanes
from narsil_stream.bench.forward import reference_model
from narsil_stream.kernels.quantize import quantize


def test_a_family_with_one_lane_is_measured_with_that_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures for lanes that do not exist would be those of one thread, under another name."""
    monkeypatch.setattr(lanes, "ROUND_S", 0.01)
    monkeypatch.setattr(lanes, "ROWS", (1, 8))
    rows = list(lanes.measure(quantize(reference_model(table_rows=20), "INT8"), "reference", repeats=1))
    assert [(row.case, row.metric) for row in rows] == [
        (f"lanes/reference/fp64/{size}/1", metric) for size in (1, 8) for metric in ("throughput", "run")
    ]
    assert all(row.value > 0 for row in rows)
