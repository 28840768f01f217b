"""What actors say to each other: msgpack arrays, tagged by their first element. Structs only grow here too.

Where both ends live in one process the Struct itself is handed over.
"""

from typing import Literal

from msgspec import Struct

from narsil_stream.schemas.compute import Capabilities
from narsil_stream.schemas.model import ModelSpec
from narsil_stream.schemas.oip import RepositoryEntry
from narsil_stream.schemas.wire import InferAnswer, InferRequest


class ModelRef(Struct, array_like=True, frozen=True, gc=False):
    name: str
    version: str
    digest: str
    """Of `model.json`, which names the sha256 of all weights: equal digests are equal models."""


class ModelCard(Struct, frozen=True):
    """The answer to `describe`, in JSON."""

    digest: str
    spec: ModelSpec
    backend: str = ""
    device: str = ""
    precision: str = ""
    lanes: int = 1
    """Batches that are computed at the same time."""
    capabilities: Capabilities | None = None
    """None: of an executor that does not tell yet."""

    @property
    def takes_bags(self) -> bool:
        return self.capabilities is None or self.capabilities.multi_hot


class Ask(Struct, array_like=True, frozen=True, gc=False):
    """One request inside a bundle. `slot` is the asker's own number for it."""

    slot: int
    model: str
    version: str
    request: InferRequest


class Bundle(Struct, array_like=True, frozen=True, gc=False, tag=1):
    """Gateway or client -> batcher: requests of one turn of its event loop."""

    reply: str
    asks: tuple[Ask, ...]


class Cancel(Struct, array_like=True, frozen=True, gc=False, tag=2):
    """Gateway or client -> batcher: these callers have left."""

    reply: str
    slots: tuple[int, ...]


class Answers(Struct, array_like=True, frozen=True, gc=False, tag=3):
    """Batcher -> gateway or client: `slots[i]` is answered by `answers[i]`."""

    batcher: str
    slots: tuple[int, ...]
    answers: tuple[InferAnswer, ...]
    by_deadline: tuple[int, ...] = ()
    """Slots of those refused because their deadlines were too early, by `retry_after_us`, and for nothing else."""


class Slot(Struct, array_like=True, frozen=True, gc=False):
    """The right to send one batch. A slot is handed out again under the next generation, so an old one is void."""

    index: int
    generation: int


class Demand(Struct, array_like=True, frozen=True, gc=False, tag=4):
    """Batcher -> executor: work that waits for a slot, and slots given back unused."""

    batcher: str
    rows: int
    """Rows that wait beyond the slots in hand; 0: none."""
    slack_us: int
    """Time until the earliest deadline among them."""
    returned: tuple[Slot, ...] = ()


class Batch(Struct, array_like=True, frozen=True, gc=False, tag=5):
    """Batcher -> executor: rows of several requests, joined."""

    batch: int
    batcher: str
    slot: Slot
    model: str
    version: str
    digest: str
    rows: int
    dense: memoryview
    """FP32 [rows, n_dense]"""
    ids: memoryview
    """INT32 [N]; one-hot: N = rows * n_sparse, batch-major"""
    lengths: memoryview
    """INT32 [rows, n_sparse]; empty: one-hot"""
    budget_us: int
    """Time until the last of its requests expires."""
    demand: Demand
    """What waits behind it."""


class Result(Struct, array_like=True, frozen=True, gc=False, tag=6):
    """Executor -> batcher. Neither scores nor a fault: the slot was void, the batch did not run."""

    batch: int
    executor: str
    scores: memoryview
    """FP32 [rows]"""
    service_us: int
    """Measured time of the forward pass, copies included."""
    fault: str = ""
    detail: str = ""
    grant: Slot | None = None
    """The slot again, under its next generation, if the batcher keeps it."""


class Grant(Struct, array_like=True, frozen=True, gc=False, tag=7):
    executor: str
    slot: Slot


class Lease(Struct, array_like=True, frozen=True, gc=False):
    batcher: str
    slot: Slot
    busy: bool


class Waiting(Struct, array_like=True, frozen=True, gc=False):
    batcher: str
    rows: int


class ExecutorBeat(Struct, array_like=True, frozen=True, gc=False, tag=8):
    """Executor -> all batchers, several times within a lease: alive, and who holds which slot."""

    executor: str
    models: tuple[ModelRef, ...]
    slots: int
    leases: tuple[Lease, ...]
    state: str = "up"
    """up; leaving: takes no new batch; gone: said goodbye"""
    retiring: tuple[ModelRef, ...] = ()
    """Models beside `models` that are on their way out: only what was admitted before is still computed."""
    unloaded: tuple[str, ...] = ()
    """Names of models that somebody unloaded: an executor that joins leaves them out."""
    waiting: tuple[Waiting, ...] = ()
    """Rows that wait for this executor, at each batcher that has some."""
    lanes: tuple[int, ...] = ()
    """Of each in `models`: batches that it computes at once. All of them together: no more than the most of these."""


class BatcherBeat(Struct, array_like=True, frozen=True, gc=False, tag=9):
    """Batcher -> all gateways, clients and executors."""

    batcher: str
    models: tuple[ModelRef, ...]
    wait_us: int
    """Predicted wait of a request that would come now."""
    demand_rows: int = 0
    slack_us: int = 0
    state: str = "up"
    lease_ms: int = 500
    """Who hears nothing for this long should take the batcher for dead."""
    finishing: tuple[str, ...] = ()
    """Digests of models that no executor offers any more, and that requests here still wait for."""
    unloaded: bool = False
    """Executors are alive and none of them offers a model: `models` is empty on purpose."""
    paired: bool = False
    """An executor lives in the same process: idle slots of others are better off with batchers that have none."""


class Report(Struct, array_like=True, frozen=True, gc=False, tag=10):
    """A process's state and metrics, for `narsil serve`."""

    kind: str
    actor: str
    pid: int
    state: str
    detail: str
    metrics: str
    """Prometheus text exposition"""
    token: str = ""
    """What the supervisor gave this process, to tell its own children from others on the same broker."""


class Control(Struct, array_like=True, frozen=True, gc=False, tag=11):
    """Gateway -> executor, on its admin subject: load or unload a model. `slot` is the asker's own number for it."""

    reply: str
    slot: int
    verb: Literal["load", "unload"]
    model: str


class Look(Struct, array_like=True, frozen=True, gc=False, tag=12):
    """Gateway -> executor: what is in its model repository?"""

    reply: str
    slot: int


class Done(Struct, array_like=True, frozen=True, gc=False, tag=13):
    """Executor -> gateway: the answer to a control, when it has taken effect, or to a look."""

    executor: str
    slot: int
    fault: str = ""
    detail: str = ""
    entries: tuple[RepositoryEntry, ...] = ()


class Tune(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Administrator -> all processes with batchers or gateways, in JSON: change live settings. Empty: look at them.

    Any NATS client may send it: `nats req narsil.v1.tune '{"set": {"batch.linger_us": 200}}' --replies=0`.
    """

    set: dict[str, str | int | float | bool] = {}
    """By key, as in the documentation of settings."""
    reset: tuple[str, ...] = ()
    """Keys that go back to what was configured; "all"."""
    at_us: int = 0
    """When it was sent, Unix µs: later ones win. 0: now."""


class Tuned(Struct, frozen=True):
    """The answer of one process, in JSON."""

    actors: tuple[str, ...]
    values: dict[str, str | int | float | bool]
    """Of all live settings, as they are now."""
    set: dict[str, str | int | float | bool]
    """Of those that differ from what was configured, the value."""
    at_us: int
    """When the newest change that is in force was sent, Unix µs; 0: there was none."""
    fault: str = ""
    detail: str = ""


Asking = Bundle | Cancel
ToBatcher = Result | Grant
ToExecutor = Batch | Demand
ToRepository = Control | Look
