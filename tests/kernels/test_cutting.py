"""Batch sizes that devices prepare for, and the cutting of longer batches."""

import numpy as np
import pytest

from narsil_stream.kernels import cutting
from narsil_stream.kernels.backend import RaggedBatch
from narsil_stream.kernels.init import criteo_spec, random_batch

SPEC = criteo_spec(rows=50)


def test_buckets_rise_and_end_with_the_largest_batch() -> None:
    """A batch of max_rows must have a graph that fits exactly."""
    assert cutting.buckets(1) == (1,)
    assert cutting.buckets(128) == (128,)
    assert cutting.buckets(1600) == (128, 256, 512, 1024, 1600)


@pytest.mark.parametrize("bag", [None, 3])
@pytest.mark.parametrize(("max_rows", "max_ids"), [(1000, 10**6), (7, 10**6), (64, 100), (1, 1)])
def test_a_cut_batch_is_the_same_batch(bag: int | None, max_rows: int, max_ids: int) -> None:
    """No row lost, doubled or moved at the cuts; no piece beyond its bounds but a single row's."""
    batch = random_batch(SPEC, 150, seed=2, bag=bag)
    parts = cutting.pieces(batch, max_rows, max_ids)
    np.testing.assert_array_equal(np.concatenate([part.dense for part in parts]), batch.dense)
    np.testing.assert_array_equal(np.concatenate([part.ids for part in parts]), batch.ids)
    assert all(0 < part.rows <= max_rows for part in parts)
    if batch.lengths is not None:
        lengths = [part.lengths for part in parts if part.lengths is not None]
        np.testing.assert_array_equal(np.concatenate(lengths), batch.lengths)
        assert all(part.ids.size <= max_ids or part.rows == 1 for part in parts)


def test_rows_without_ids_are_cut_by_rows_alone() -> None:
    """Empty bags at the end of a batch must not be dropped."""
    batch = RaggedBatch(np.ones((5, 13), np.float32), np.zeros(0, np.int32), np.zeros((5, 26), np.int32))
    assert [part.rows for part in cutting.pieces(batch, 2, 10)] == [2, 2, 1]
