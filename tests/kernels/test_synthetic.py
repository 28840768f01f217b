import io

import numpy as np

from narsil_stream.core.criteo import read
from narsil_stream.kernels.metrics import auc, log_loss
from narsil_stream.kernels.synthetic import Clicks, clicks


def whole(rows: int, seed: int, **options: bool | int) -> Clicks:
    pieces = list(clicks(rows, seed, **options))  # type: ignore[arg-type]
    return Clicks(
        b"".join(piece.text for piece in pieces),
        np.concatenate([piece.labels for piece in pieces]),
        np.concatenate([piece.probability for piece in pieces]),
    )


def test_synthetic_rows_are_criteo_rows_and_carry_their_labels() -> None:
    """Demos and tests feed them to everything that reads the format."""
    made = whole(2500, seed=1, piece_rows=1000)
    (rows, rest) = read(io.BytesIO(made.text), [10_000] * 26, piece_bytes=1 << 30)
    assert rows.bad == rest.bad == []
    assert rows.labels is not None
    np.testing.assert_array_equal(rows.labels, made.labels)
    missing = made.text.replace(b"\n", b"\t").split(b"\t").count(b"") / (2500 * 39)
    assert 0.08 < missing < 0.2
    assert (rows.sparse.max(axis=0) > 0).all()
    assert (rows.dense.std(axis=0) > 0.3).all()


def test_the_labels_are_drawn_from_the_probability_that_is_told() -> None:
    """The best AUC is known only if the probability is the true one."""
    made = whole(40_000, seed=2)
    assert 0.15 < made.probability.mean() < 0.35
    for low in np.arange(0, 0.9, 0.1):
        inside = (made.probability >= low) & (made.probability < low + 0.1)
        error = 4 * (0.25 / max(inside.sum(), 1)) ** 0.5
        assert abs(made.labels[inside].mean() - made.probability[inside].mean()) < error
    best = auc(made.labels, made.probability)
    assert best is not None
    assert 0.76 < best < 0.82
    loss, prior = log_loss(made.labels, made.probability), log_loss(made.labels, np.full(40_000, made.labels.mean()))
    assert loss is not None and prior is not None and loss < 0.9 * prior


def test_a_seed_repeats_and_another_draws_other_rows_of_the_same_truth() -> None:
    """Measurements name their seed; a model trained on one seed is tested on another."""
    first, again, other = (whole(500, seed=seed) for seed in (3, 3, 4))
    assert first.text == again.text
    assert first.text != other.text
    words = {cell for line in first.text.splitlines() for cell in line.split(b"\t")[14:] if cell}
    shared = [cell in words for line in other.text.splitlines() for cell in line.split(b"\t")[14:] if cell]
    assert np.mean(shared) > 0.8


def test_rows_without_labels_have_39_fields_and_are_otherwise_the_same() -> None:
    """The same rows serve for scoring, where the label is not known yet."""
    with_labels, without = whole(50, seed=5), whole(50, seed=5, labelled=False)
    assert without.text == b"".join(line.split(b"\t", 1)[1] for line in with_labels.text.splitlines(keepends=True))
