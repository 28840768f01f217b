"""What happens to a request before it is queued: read, told from stale ones, checked against its model."""

from msgspec import Struct

from narsil_stream.actors.answering import Caller
from narsil_stream.actors.batcher_metrics import BatcherMetrics
from narsil_stream.actors.catalogue import Catalogue
from narsil_stream.actors.queue import ModelKey, Ticket
from narsil_stream.actors.scheduling import Scheduler
from narsil_stream.actors.service_time import work_of
from narsil_stream.core.actor import now_us, unix_us
from narsil_stream.core.admission import Rows
from narsil_stream.core.config import BatchConfig
from narsil_stream.schemas import codec, subjects
from narsil_stream.schemas.errors import Fault, Refused
from narsil_stream.schemas.wire import InferRequest

DEFAULT_PRIORITY = 128
PREFIX = len(f"{subjects.INFER}.")
JSON_BYTES = 4 << 20
"""Of one request: reading it must not hold up the event loop for as long as a failover takes."""


class Work(Struct, frozen=True, gc=False):
    """What a ticket stands for."""

    rows: Rows
    caller: Caller


class Published(Struct, frozen=True, gc=False):
    """A request on a public subject, as it came."""

    subject: str
    reply: str
    payload: bytes

    def caller(self, request: str = "") -> Caller:
        """`request`: its id, once it is read."""
        return Caller(self.reply, -1, request, codec.spelling_of(self.payload))

    def target(self) -> tuple[str, str]:
        """Model and version; "": the newest."""
        model, _, version = self.subject[PREFIX:].partition(".")
        return model, version

    def read(self) -> InferRequest:
        """Raises `Refused`."""
        size = len(self.payload)
        if size > JSON_BYTES and codec.spelling_of(self.payload) is codec.Spelling.JSON:
            raise Refused(Fault.TOO_LARGE, f"{size} bytes of JSON; expected at most {JSON_BYTES}, or msgpack")
        return codec.decode_request(self.payload)


class Reception:
    """Makes tickets of requests."""

    def __init__(self, limits: BatchConfig, catalogue: Catalogue, policy: Scheduler, metrics: BatcherMetrics) -> None:
        self.limits = limits
        self._catalogue = catalogue
        self._policy = policy
        self._metrics = metrics
        self._tickets = 0

    def ticket(self, caller: Caller, model: str, version: str, request: InferRequest, held: int) -> Ticket:
        """`held`: bytes of the message that views of its tensors keep in memory. Raises `Refused`."""
        limits, now = self.limits, now_us()
        budget_us = min(request.budget_us or limits.default_budget_us, limits.max_budget_us)
        if request.sent_us:
            self._refuse_stale(unix_us() - request.sent_us, budget_us)
        key, admission = self._catalogue.find(model, version, self._policy.executors.values())
        if self._policy.overloaded(now):
            self._refuse_early(key, request, now, budget_us)
        rows = admission.shaped(request)
        if rows.count > limits.max_rows:
            raise Refused(Fault.TOO_LARGE, f"input 'dense' has {rows.count} rows; expected at most {limits.max_rows}")
        size = rows.nbytes
        if held > 2 * size + 512:
            rows = rows.copied()  # views would keep a message alive that is much larger than what is accounted for
        self._tickets += 1
        return Ticket(
            self._tickets, key, rows.count, size, request.priority or DEFAULT_PRIORITY, now, now + budget_us,
            Work(rows, caller), tenant=request.tenant,
            work=work_of(rows.count, rows.ids.nbytes // 4, admission.spec.n_sparse),
        )  # fmt: skip

    def _refuse_early(self, model: ModelKey, request: InferRequest, now: int, budget_us: int) -> None:
        """Raises OVERLOADED by what the request says of itself: under overload most need not be looked at closer."""
        said = next((tensor.shape[0] for tensor in request.inputs if tensor.name == "dense" and tensor.shape), 1)
        size = sum(tensor.data.nbytes for tensor in request.inputs)
        priority = request.priority or DEFAULT_PRIORITY
        ticket = Ticket(0, model, said, size, priority, now, now + budget_us, tenant=request.tenant)
        try:
            self._policy.check(ticket, now)
        except Refused as refused:
            if refused.fault is Fault.OVERLOADED:
                raise

    def _refuse_stale(self, age_us: int, budget_us: int) -> None:
        if age_us < 0:
            self._metrics.early.inc()
        refuse_stale(age_us, budget_us, self.limits.stale_grace_us)


def refuse_stale(age_us: int, budget_us: int, grace_us: int) -> None:
    """Raises `Refused` for what was delivered long after its budget, by wall clocks. `grace_us` 0: never."""
    if grace_us and age_us > budget_us + grace_us:
        raise Refused(Fault.DEADLINE_EXCEEDED, f"sent {age_us} us ago, which is past its budget of {budget_us} us")
