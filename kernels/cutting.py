"""Batch sizes that devices prepare for, and how longer batches are cut. NumPy alone."""

import numpy as np

from narsil_stream.kernels.backend import RaggedBatch

SMALLEST_BUCKET = 128


def buckets(max_rows: int) -> tuple[int, ...]:
    """Batch sizes that get a graph of their own: powers of two from 128, and `max_rows` itself as the last."""
    sizes = []
    size = SMALLEST_BUCKET
    while size < max_rows:
        sizes.append(size)
        size *= 2
    return (*sizes, max_rows)


def pieces(batch: RaggedBatch, max_rows: int, max_ids: int) -> list[RaggedBatch]:
    """Cut a batch into consecutive ones of at most `max_rows` rows and, multi-hot, about `max_ids` ids.

    A single row with more ids than that stays whole.
    """
    if batch.lengths is None:
        if batch.rows <= max_rows:
            return [batch]
        width = batch.ids.size // batch.rows
        starts = range(0, batch.rows, max_rows)
        return [
            RaggedBatch(batch.dense[s : s + max_rows], batch.ids[s * width : (s + max_rows) * width]) for s in starts
        ]
    if batch.rows <= max_rows and batch.ids.size <= max_ids:
        return [batch]
    ends = np.cumsum(batch.lengths.sum(axis=1, dtype=np.int64))
    parts = []
    start, used = 0, 0
    while start < batch.rows:
        fits = int(np.searchsorted(ends, used + max_ids, side="right"))
        stop = min(max(fits, start + 1), start + max_rows, batch.rows)
        last = int(ends[stop - 1])
        parts.append(RaggedBatch(batch.dense[start:stop], batch.ids[used:last], batch.lengths[start:stop]))
        start, used = stop, last
    return parts
