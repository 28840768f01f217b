"""Rows of several requests made into one batch message."""

from narsil_stream.actors.decisions import Dispatch
from narsil_stream.core.admission import Rows, one_hot_lengths
from narsil_stream.schemas.internal import Batch
from narsil_stream.schemas.model import ModelSpec


def join(batcher: str, decision: Dispatch, spec: ModelSpec) -> Batch:
    """One-hot unless some request is multi-hot."""
    parts: list[Rows] = [ticket.payload.rows for ticket in decision.tickets]
    lengths = b""
    if any(rows.lengths is not None for rows in parts):
        lengths = b"".join(one_hot_lengths(rows, spec.n_sparse) for rows in parts)
    return Batch(
        decision.batch,
        batcher,
        decision.slot,
        decision.model.name,
        decision.model.version,
        decision.model.digest,
        decision.rows,
        memoryview(b"".join(rows.dense for rows in parts)),
        memoryview(b"".join(rows.ids for rows in parts)),
        memoryview(lengths),
        decision.budget_us,
        decision.demand,
    )
