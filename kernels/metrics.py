"""How good scores are, and how far two sets of scores lie apart."""

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32] | NDArray[np.float64]


def auc(labels: Floats, scores: Floats) -> float | None:
    """The probability that a random click scores above a random non-click; equal scores count half.

    labels [N] of 0 and 1, scores [N]. None when one of the two classes is empty.
    """
    clicks = labels > 0
    n_clicks, n_others = int(clicks.sum()), int((~clicks).sum())
    if not n_clicks or not n_others:
        return None
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(counts) - (counts - 1) / 2
    rank_sum = float(mean_rank[place][clicks].sum())
    return (rank_sum - n_clicks * (n_clicks + 1) / 2) / (n_clicks * n_others)


def log_loss(labels: Floats, scores: Floats) -> float | None:
    """Mean of -log(the probability given to what happened), in nats; scores are kept 1e-7 away from 0 and 1.

    labels [N] of 0 and 1, scores [N]. None without rows.
    """
    if not len(labels):
        return None
    p = np.clip(scores.astype(np.float64), 1e-7, 1 - 1e-7)
    return float(-np.where(labels > 0, np.log(p), np.log1p(-p)).mean())
