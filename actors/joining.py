"""Rows of several requests made into one batch message."""

from narsil_stream.actors.decisions import Dispatch
from narsil_stream.actors.queue import Ticket
from narsil_stream.core.admission import Admission, Rows, one_hot_lengths
from narsil_stream.schemas.errors import Refused
from narsil_stream.schemas.internal import Batch

Unsound = list[tuple[Ticket, Refused]]


def join(batcher: str, decision: Dispatch, admission: Admission) -> tuple[Batch, Unsound]:
    """One-hot unless some request is multi-hot.

    Also returns the tickets whose values turn out to be bad, with the reason: their rows are zeros in the batch, which
    every model can compute, so that the others need not wait for a new one.
    """
    parts: list[Rows] = [ticket.payload.rows for ticket in decision.tickets]
    dense = bytearray().join([rows.dense for rows in parts])
    ids = bytearray().join([rows.ids for rows in parts])
    lengths = b""
    one_hot = all(rows.lengths is None for rows in parts)
    if not one_hot:
        lengths = b"".join(one_hot_lengths(rows, admission.spec.n_sparse) for rows in parts)
    unsound = []
    if not (admission.sound(dense, ids) if one_hot else all(rows.checked for rows in parts)):
        unsound = _blanked(decision.tickets, dense, ids, admission)
    batch = Batch(
        decision.batch,
        batcher,
        decision.slot,
        decision.model.name,
        decision.model.version,
        decision.model.digest,
        decision.rows,
        memoryview(dense),
        memoryview(ids),
        memoryview(lengths),
        decision.budget_us,
        decision.demand,
    )
    return batch, unsound


def _blanked(tickets: list[Ticket], dense: bytearray, ids: bytearray, admission: Admission) -> Unsound:
    """Looks at each request by itself, and makes zeros of those that fail."""
    unsound = []
    dense_at = ids_at = 0
    for ticket in tickets:
        rows: Rows = ticket.payload.rows
        if not rows.checked:
            try:
                admission.check(rows)
            except Refused as refused:
                unsound.append((ticket, refused))
                dense[dense_at : dense_at + rows.dense.nbytes] = bytes(rows.dense.nbytes)
                ids[ids_at : ids_at + rows.ids.nbytes] = bytes(rows.ids.nbytes)
        dense_at += rows.dense.nbytes
        ids_at += rows.ids.nbytes
    return unsound
