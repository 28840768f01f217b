"""What the batcher's policy knows of a request and of a model."""

import enum
from dataclasses import dataclass
from typing import Any, NamedTuple


class ModelKey(NamedTuple):
    """One model's weights. What was checked against some weights is never computed with others of the same version."""

    name: str
    version: str
    digest: str


class State(enum.Enum):
    WAITING = "waiting"
    IN_FLIGHT = "in flight"
    DONE = "done"


@dataclass(slots=True, eq=False)
class Ticket:
    """One admitted request, as the policy sees it. What to score and whom to answer is `payload`, which it ignores."""

    id: int
    """Grows with each ticket of a batcher."""
    model: ModelKey
    rows: int
    bytes: int
    priority: int
    """1 is the most urgent."""
    arrived_us: int
    deadline_us: int
    payload: Any = None
    state: State = State.WAITING
    tenant: str = ""
    work: int = 0
    """In rows, for predicted times: more than `rows` where bags hold more ids than one. 0: as many as `rows`."""

    def __post_init__(self) -> None:
        self.work = self.work or self.rows

    def aged(self, now_us: int) -> bool:
        """Whether half of its budget has run out."""
        return 2 * now_us >= self.arrived_us + self.deadline_us
