"""What happens to a request before it is queued: read, told from stale ones, checked against its model."""

from msgspec import Struct

from narsil_stream.actors.answering import Caller
from narsil_stream.actors.batcher_metrics import BatcherMetrics
from narsil_stream.actors.catalogue import Catalogue
from narsil_stream.actors.queue import Ticket
from narsil_stream.actors.scheduling import Scheduler
from narsil_stream.actors.service_time import work_of
from narsil_stream.core.actor import now_us, unix_us
from narsil_stream.core.admission import Rows
from narsil_stream.core.config import BatchConfig
from narsil_stream.schemas import codec, subjects
from narsil_stream.schemas.errors import Fault, Refused
from narsil_stream.schemas.wire import InferRequest

DEFAULT_PRIORITY = 128
JSON_BYTES = 4 << 20
"""Of one request: reading it must not hold up the event loop for as long as a failover takes."""


class Work(Struct, frozen=True):
    """What a ticket stands for."""

    rows: Rows
    caller: Caller


class Published(Struct, frozen=True):
    """A request on a public subject, as it came."""

    subject: str
    reply: str
    payload: bytes

    def caller(self) -> Caller:
        return Caller(self.reply, -1, "", codec.spelling_of(self.payload))

    def target(self) -> tuple[str, str]:
        """Model and version; "": the newest."""
        model, _, version = self.subject.removeprefix(f"{subjects.INFER}.").partition(".")
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
        self._limits = limits
        self._catalogue = catalogue
        self._policy = policy
        self._metrics = metrics
        self._tickets = 0

    def ticket(self, caller: Caller, model: str, version: str, request: InferRequest, held: int) -> Ticket:
        """`held`: bytes of the message that views of its tensors keep in memory. Raises `Refused`."""
        limits = self._limits
        now = now_us()
        budget_us = min(request.budget_us or limits.default_budget_us, limits.max_budget_us)
        self._refuse_stale(request, budget_us)
        key, admission = self._catalogue.find(model, version, self._policy.executors.values())
        rows = admission.rows(request)
        if rows.count > limits.max_rows:
            raise Refused(Fault.TOO_LARGE, f"input 'dense' has {rows.count} rows; expected at most {limits.max_rows}")
        if held > 2 * rows.nbytes + 512:
            rows = rows.copied()  # views would keep a message alive that is much larger than what is accounted for
        self._tickets += 1
        return Ticket(
            self._tickets, key, rows.count, rows.nbytes, request.priority or DEFAULT_PRIORITY, now, now + budget_us,
            Work(rows, caller), work=work_of(rows.count, rows.ids.nbytes // 4, admission.spec.n_sparse),
        )  # fmt: skip

    def _refuse_stale(self, request: InferRequest, budget_us: int) -> None:
        if not request.sent_us:
            return
        age_us = unix_us() - request.sent_us
        if age_us < 0:
            self._metrics.early.inc()
        refuse_stale(age_us, budget_us, self._limits.stale_grace_us)


def refuse_stale(age_us: int, budget_us: int, grace_us: int) -> None:
    """Raises `Refused` for what was delivered long after its budget, by wall clocks. `grace_us` 0: never."""
    if grace_us and age_us > budget_us + grace_us:
        raise Refused(Fault.DEADLINE_EXCEEDED, f"sent {age_us} us ago, which is past its budget of {budget_us} us")
