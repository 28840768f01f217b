import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from narsil_stream.kernels.metrics import auc, log_loss

graded = st.lists(st.tuples(st.booleans(), st.integers(0, 5)), max_size=40)


@given(rows=graded)
def test_auc_is_the_share_of_pairs_in_the_right_order(rows: list[tuple[bool, int]]) -> None:
    """Ties count half: scores of INT8 tables often tie."""
    clicks = [score for label, score in rows if label]
    others = [score for label, score in rows if not label]
    pairs = [(c > o) + 0.5 * (c == o) for c in clicks for o in others]
    found = auc(np.array([label for label, _ in rows], np.float32), np.array([score for _, score in rows], np.float32))
    assert found == (pytest.approx(sum(pairs) / len(pairs)) if pairs else None)


@pytest.mark.parametrize("scores", [np.float32([0.5, 0.25, 1, 0]), np.float64([0.5, 0.25, 1, 0])])
def test_log_loss_is_the_mean_surprise_and_stays_finite(scores: Any) -> None:
    """One score of exactly 0 or 1 must not make the mean infinite."""
    labels = np.array([1, 0, 1, 1], np.float32)
    expected = (math.log(2) - math.log(0.75) + 0 + 7 * math.log(10)) / 4
    assert log_loss(labels, scores) == pytest.approx(expected, abs=1e-6)
    assert log_loss(labels[:0], scores[:0]) is None
