"""The stand-ins stand."""

import threading
from pathlib import Path

import numpy as np

from narsil_stream.kernels.backend import RaggedBatch
from tests.asking import metric, some_rows
from tests.doubles import Gate
from tests.support import until


def test_a_gate_holds_batches_until_it_opens(criteo_model: Path) -> None:
    """Tests of slow backends would prove nothing if theirs were not slow."""
    gate = Gate()
    backend = gate.load(criteo_model)
    rows = some_rows(criteo_model, 2)
    scores = np.zeros(2, np.float32)
    compute = threading.Thread(target=backend.run, args=(RaggedBatch(rows.dense, rows.ids.reshape(-1)), scores))
    with gate.closed():
        compute.start()
        until(lambda: gate.waiting == 1, "a batch waits")
        assert not scores.any()
    compute.join()
    assert gate.waiting == 0
    assert gate.rows == [2]
    assert np.allclose(scores, rows.scores)


def test_a_metric_is_summed_over_the_samples_with_the_labels() -> None:
    """A sum over too many or too few samples would hide what is lost."""
    text = '# HELP a b\na_total{how="x",kind="k"} 2.0\na_total{how="y"} 3\na_total_more 9\na_total 0.5\n'
    assert metric(text, "a_total") == 5.5
    assert metric(text, "a_total", how="x") == 2
    assert metric(text, "a_total", how="z") == 0
