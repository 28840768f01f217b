"""What every door of the system does once it has read a request: ask, count, and tell what is served.

A door (HTTP, gRPC ...) only decodes, calls one of these methods and encodes what comes back.
"""

from collections.abc import Awaitable, Callable

from prometheus_client import CollectorRegistry

from narsil_stream.core.actor import now_us
from narsil_stream.core.admission import Admission
from narsil_stream.core.bus import Bus
from narsil_stream.core.config import Config
from narsil_stream.core.requester import Requester
from narsil_stream.core.telemetry import RequestMetrics, gauges
from narsil_stream.gateways.metadata import model_config, model_metadata
from narsil_stream.gateways.shaping import ask_all, converted, cut, fits
from narsil_stream.schemas.errors import Fault, Refused
from narsil_stream.schemas.internal import ModelRef
from narsil_stream.schemas.oip import ModelConfig, ModelMetadata
from narsil_stream.schemas.wire import InferAnswer, InferRequest

Read = Callable[[], Awaitable[InferRequest]]


class Inference:
    """One for each door. All methods belong to the bus's event loop; all but `ask` raise `Refused` and nothing else."""

    def __init__(self, config: Config, bus: Bus, registry: CollectorRegistry) -> None:
        self._config = config
        self._bus = bus
        self._requester = Requester(config, bus)
        self._metrics = RequestMetrics(registry)
        self.closing = False
        """Set by a door that drains: it says that it is not ready, and finishes what is open."""
        gauges(
            registry,
            narsil_ready=("1 when a request would be scored", lambda: float(self.ready)),
            narsil_late_answers=("Answers that came after their request had ended", lambda: self._requester.late),
            narsil_requests_resent=("Requests sent to another batcher", lambda: self._requester.resent),
        )

    async def start(self) -> None:
        await self._requester.start()

    async def wait_ready(self, timeout: float) -> bool:
        return await self._requester.wait_ready(timeout)

    async def stop(self) -> None:
        """Whoever still waits gets UNAVAILABLE."""
        await self._requester.stop()

    # Scores

    async def ask(self, model: str, version: str, read: Read) -> InferAnswer:
        """The scores, or an error of the table: nothing but CancelledError is raised, which withdraws the request.

        `read` gives the decoded request, or raises `Refused`. Each request is counted as ended once.
        """
        started = now_us()
        self._metrics.offered.inc()
        request = InferRequest("", ())
        try:
            request = await read()
            answer = await self._answer(model, version, request)
        except Refused as refused:
            answer = InferAnswer(
                request.id, fault=refused.fault.name, detail=refused.detail, retry_after_us=refused.retry_after_us
            )
        except BaseException:
            self._metrics.by_fault(Fault.CANCELLED.name)
            raise
        if answer.fault:
            self._metrics.by_fault(answer.fault)
        else:
            self._metrics.answered(answer.outputs[0].shape[0], (now_us() - started) / 1e6)
        return answer

    async def _answer(self, model: str, version: str, request: InferRequest) -> InferAnswer:
        request = converted(request)
        limits = self._config.batch
        if fits(request, limits.max_rows, self._bus.max_payload):
            return await self._requester.ask(model, version, request)
        return await self._answer_in_parts(model, version, request)

    async def _answer_in_parts(self, model: str, version: str, request: InferRequest) -> InferAnswer:
        """Checked as a whole first, so that errors name the caller's rows; all parts by one version's weights."""
        spec = (await self._requester.card(model, version)).spec
        rows = Admission(spec).rows(request)
        if rows.count > (limit := self._config.batch.max_request_rows):
            raise Refused(Fault.TOO_LARGE, f"input 'dense' has {rows.count} rows; expected at most {limit}")
        parts = cut(request, rows, spec, self._config.batch.max_rows, self._bus.max_payload)
        return await ask_all(lambda part: self._requester.ask(model, spec.version, part), parts)

    # What is served

    @property
    def ready(self) -> bool:
        return not self.closing and self._requester.ready

    def models(self) -> tuple[ModelRef, ...]:
        return self._requester.models()

    def model_ready(self, model: str, version: str = "") -> bool:
        served = [ref for ref in self.models() if ref.name == model and version in ("", ref.version)]
        return bool(served) and not self.closing

    async def metadata(self, model: str, version: str = "") -> ModelMetadata:
        return model_metadata(await self._requester.card(model, version), self.models())

    async def config(self, model: str, version: str = "") -> ModelConfig:
        return model_config(await self._requester.card(model, version), self._config)
