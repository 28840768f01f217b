"""What every door of the system does once it has read a request: ask, count, and tell what is served.

A door (HTTP, gRPC ...) only decodes, calls one of these methods and encodes what comes back.
"""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from msgspec.structs import replace
from prometheus_client import CollectorRegistry

from narsil_stream.core.actor import now_us
from narsil_stream.core.admission import Admission
from narsil_stream.core.bus import Bus
from narsil_stream.core.config import Config
from narsil_stream.core.repository import Repository, Verb
from narsil_stream.core.requester import Requester
from narsil_stream.core.statistics import merged
from narsil_stream.core.telemetry import RequestMetrics, Spread, gauges
from narsil_stream.gateways.metadata import model_config, model_metadata
from narsil_stream.gateways.shaping import ask_all, converted, cut, fits
from narsil_stream.schemas.errors import Fault, Refused, invalid
from narsil_stream.schemas.internal import ModelRef
from narsil_stream.schemas.model import NAME
from narsil_stream.schemas.oip import (
    ModelConfig,
    ModelMetadata,
    ModelStatistics,
    RepositoryAction,
    RepositoryEntry,
    StatisticsReport,
)
from narsil_stream.schemas.wire import InferAnswer, InferRequest

QUIET_S, TURN_AWAY_S = 0.05, 1.0

REFUSAL_S = tuple(ms / 1e3 for ms in (0.1, 0.2, 0.5, 1, 2, 3, 4, 5, 6, 8, 10, 15, 20, 30, 50, 100, 200, 500, 1_000))
"""Bounds of a histogram that is fine around the 5 ms within which a refusal should come."""

TENANT = "narsil-tenant"
"""The header, or key of metadata, that names the tenant where no token does."""

Read = Callable[[], Awaitable[InferRequest]]

NOTICED_S = 2.0
"""For batchers to say what executors have done already: callers ask for a model's scores right after its load."""


class Inference:
    """One for each door. All methods belong to the bus's event loop; all but `ask` raise `Refused` and nothing else."""

    def __init__(self, config: Config, bus: Bus, registry: CollectorRegistry) -> None:
        self._config = config
        self._bus = bus
        self._requester = Requester(config, bus)
        self._repository = Repository(config, bus)
        self._metrics = RequestMetrics(registry)
        self._refusals = Spread("narsil_refusal_seconds", "From arrival to OVERLOADED", REFUSAL_S, registry)
        self._asked = 0
        self._turning_away = False
        self.closing = False
        """Set by a door that drains: it says that it is not ready, and finishes what is open."""
        gauges(
            registry,
            narsil_ready=("1 when a request would be scored", lambda: float(self.ready)),
            narsil_late_answers=("Answers that came after their request had ended", lambda: self._requester.late),
            narsil_requests_throttled=("Requests refused here as batchers would", lambda: self._requester.throttled),
            narsil_requests_resent=("Requests sent to another batcher", lambda: self._requester.resent),
        )

    async def start(self) -> None:
        await self._requester.start()

    async def wait_ready(self, timeout: float) -> bool:
        return await self._requester.wait_ready(timeout)

    async def stop(self) -> None:
        """Whoever still waits gets UNAVAILABLE."""
        await self._repository.stop()
        await self._requester.stop()

    async def turn_away(self) -> None:
        """Tell newcomers UNAVAILABLE; returns when none has come for a moment: then a server can stop and reset nobody.

        Callers who come again and again are not waited for.
        """
        self._turning_away = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TURN_AWAY_S):
                quiet = 0
                while quiet < 2:  # once is not enough: a loop that lags reads its sockets late
                    seen = self._asked
                    await asyncio.sleep(QUIET_S)
                    quiet = quiet + 1 if self._asked == seen else 0

    def tune(self, config: Config) -> None:
        self._config = config
        self._requester.tune(config)

    @property
    def default_budget_us(self) -> int:
        """Of a request that names none."""
        return self._config.batch.default_budget_us

    # Scores

    async def ask(self, model: str, version: str, read: Read, tenant: str = "") -> InferAnswer:
        """The scores, or an error of the table: nothing but CancelledError is raised, which withdraws the request.

        `read` gives the decoded request, or raises `Refused`. `tenant`: on whose behalf, in place of what the request
        says. Each request is counted as ended once.
        """
        started = now_us()
        self._metrics.offered.inc()
        self._asked += 1
        request = InferRequest("", ())
        try:
            if self._turning_away:
                raise Refused(Fault.UNAVAILABLE, "this gateway is stopping", 1_000_000)
            request = await read()
            if tenant:
                request = replace(request, tenant=tenant)
            answer = await self._answer(model, version, request)
        except Refused as refused:
            answer = InferAnswer(
                request.id, fault=refused.fault.name, detail=refused.detail, retry_after_us=refused.retry_after_us
            )
        except BaseException as error:
            gone = isinstance(error, asyncio.CancelledError)
            self._metrics.by_fault((Fault.CANCELLED if gone else Fault.INTERNAL).name)
            raise
        if answer.fault:
            self._metrics.by_fault(answer.fault)
            if answer.fault == Fault.OVERLOADED.name:
                self._refusals.observe((now_us() - started) / 1e6)
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

    async def statistics(self, model: str = "", version: str = "") -> StatisticsReport:
        """What the batchers that answer have counted since they started; "" stands for all models, or all versions."""
        found = merged(await self._requester.statistics())
        for ref in self.models():
            found.setdefault((ref.name, ref.version), ModelStatistics(ref.name, ref.version))
        wanted = [one for one in found.values() if model in ("", one.name) and version in ("", one.version)]
        if model and not wanted:
            of = f" version '{version}'" if version else ""
            raise Refused(Fault.NOT_FOUND, f"model '{model}'{of} is not served here")
        return StatisticsReport(tuple(wanted))

    # What is to be served

    async def index(self, ready: bool = False) -> tuple[RepositoryEntry, ...]:
        """What the executors' repositories hold; with `ready`, of that what is served."""
        return tuple(entry for entry in await self._repository.index() if entry.state == "READY" or not ready)

    async def load(self, model: str, action: RepositoryAction) -> None:
        """Serve the newest version in the repository; if it is loaded already, as it is there now."""
        for name in action.parameters:
            raise invalid(f"parameter '{name}' is not taken by load; a model is what its files in the repository say")
        await self._control("load", model)
        await self._requester.wait_until(lambda: self._served(model), NOTICED_S)

    async def unload(self, model: str, action: RepositoryAction) -> None:
        """Serve no version of it any more; what was accepted before is answered. Nothing depends on another model."""
        for name, value in action.parameters.items():
            if name != "unload_dependents" or not isinstance(value, bool):
                raise invalid(f"parameter '{name}' is not taken by unload; expected 'unload_dependents', true or false")
        await self._control("unload", model)
        await self._requester.wait_until(lambda: not self._served(model), NOTICED_S)

    async def _control(self, verb: Verb, model: str) -> None:
        if self._config.model_control != "explicit":
            detail = "models are neither loaded nor unloaded here; set model_control to explicit to allow it"
            raise Refused(Fault.PERMISSION_DENIED, detail)
        if not NAME.fullmatch(model):
            raise Refused(Fault.NOT_FOUND, f"model {model!r}: names match {NAME.pattern}")
        await self._repository.control(verb, model)

    def _served(self, model: str) -> bool:
        return any(ref.name == model for ref in self.models())
