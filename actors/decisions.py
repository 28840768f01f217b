"""What the batcher's policy is told once, and what it says. Times in µs."""

from msgspec import Struct

from narsil_stream.actors.queue import ModelKey, State, Ticket
from narsil_stream.core.config import Config
from narsil_stream.schemas.errors import Fault
from narsil_stream.schemas.internal import Demand, Slot


class Rules(Struct, frozen=True):
    max_rows: int
    max_bytes: int
    queue_rows: int
    queue_bytes: int
    lease_us: int
    failover_floor_us: int
    failover_factor: float
    linger_us: int = 0
    coalesce: bool = True
    """False: one request is one batch (mode `worker`)."""
    ageing: float = 0.0
    """Share of the rows for less urgent work that has aged; 0: strict priorities."""
    weights: dict[str, float] = {}
    """Of tenants; 1 for those that are not named."""
    slo_us: int = 0
    """The p99 that row cap and linger are tuned to; 0: they are as configured."""
    consolidate: bool = False


def rules(config: Config, max_bytes: int) -> Rules:
    """As configured. `max_bytes`: of rows in one message."""
    batch, timing = config.batch, config.timing
    return Rules(
        max_rows=batch.max_rows,
        max_bytes=max_bytes,
        queue_rows=batch.queue_rows,
        queue_bytes=batch.queue_bytes,
        lease_us=timing.lease_ms * 1_000,
        failover_floor_us=timing.failover_floor_ms * 1_000,
        failover_factor=timing.failover_factor,
        linger_us=batch.linger_us,
        coalesce=config.mode != "worker",
        ageing=batch.ageing_percent / 100,
        weights=batch.weights,
        slo_us=int(batch.slo_p99_ms * 1_000),
        consolidate=batch.consolidate,
    )


class Dispatch(Struct, frozen=True):
    """Send these tickets as one batch."""

    batch: int
    executor: str
    slot: Slot
    model: ModelKey
    tickets: list[Ticket]
    rows: int
    budget_us: int
    demand: Demand
    again: bool
    """Sent before, to an executor that was lost or silent."""


class Drop(Struct, frozen=True):
    """Answer this ticket with an error."""

    ticket: Ticket
    fault: Fault
    detail: str
    retry_after_us: int = 0


def dropped(ticket: Ticket, fault: Fault, detail: str, retry_after_us: int = 0) -> Drop:
    """The end of this ticket."""
    ticket.state = State.DONE
    return Drop(ticket, fault, detail, retry_after_us)


class Plead(Struct, frozen=True):
    """Tell an executor what waits."""

    executor: str
    demand: Demand


Decision = Dispatch | Drop | Plead
