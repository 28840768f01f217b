"""The verbs of the gRPC gateway: each takes its message, makes one call, and gives the answer's message."""

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from grpc import StatusCode
from msgspec.structs import replace

from narsil_stream.core.config import Config
from narsil_stream.gateways.grpc_codec import InferRequestMessage, parsed, to_request
from narsil_stream.gateways.grpc_stream import Context
from narsil_stream.gateways.inference import Inference
from narsil_stream.gateways.metadata import SERVER
from narsil_stream.schemas.errors import Fault, Refused, invalid
from narsil_stream.schemas.oip import RepositoryAction
from narsil_stream.schemas.protobuf import Message, filled
from narsil_stream.schemas.wire import MAX_ID, InferAnswer, InferRequest

OPEN_BYTES = 512 << 20
"""Bytes of infer requests that one gateway process works on at the same time."""


class Verbs:
    """One for each gateway. Verbs raise `Refused`; only `infer` gives errors as answers."""

    def __init__(self, config: Config, inference: Inference) -> None:
        self._inference = inference
        self._most_bytes = max(OPEN_BYTES, config.grpc.max_message_bytes)
        self._open_bytes = 0
        self.open = 0
        """Infer requests being worked on."""

    async def infer(self, data: bytes, left_s: float | None, tenant: str) -> InferAnswer:
        """`data`: a ModelInferRequest. `left_s`: until the call's own deadline, in seconds. `tenant`: in place of what
        the request says; "": nothing."""
        self.open += 1
        self._open_bytes += len(data)
        try:
            call = self._opened(data)
            if isinstance(call, Refused):
                return await self._inference.ask("", "", lambda: _refuse(call))

            async def read() -> InferRequest:
                return to_request(call, left_s, self._inference.default_budget_us)

            answer = await self._inference.ask(call.model_name, call.model_version, read, tenant)
            if answer.fault and not answer.id:  # it was refused before it had been decoded
                answer = replace(answer, id=call.id[:MAX_ID])
            return answer
        finally:
            self.open -= 1
            self._open_bytes -= len(data)

    def _opened(self, data: bytes) -> Any:
        """The message, or why there is none."""
        if self._open_bytes > self._most_bytes:
            return Refused(Fault.OVERLOADED, "too many large requests are being worked on", 100_000)
        try:
            return parsed(InferRequestMessage, data)
        except Refused as refused:
            return refused

    async def server_live(self, _: Any) -> Message:
        return filled("ServerLiveResponse", {"live": True})

    async def server_ready(self, _: Any) -> Message:
        return filled("ServerReadyResponse", {"ready": self._inference.ready})

    async def model_ready(self, call: Any) -> Message:
        return filled("ModelReadyResponse", {"ready": self._inference.model_ready(call.name, call.version)})

    async def server_metadata(self, _: Any) -> Message:
        return filled("ServerMetadataResponse", msgspec.to_builtins(SERVER))

    async def model_metadata(self, call: Any) -> Message:
        metadata = await self._inference.metadata(call.name, call.version)
        return filled("ModelMetadataResponse", msgspec.to_builtins(metadata))

    async def model_config(self, call: Any) -> Message:
        config = await self._inference.config(call.name, call.version)
        return filled("ModelConfigResponse", {"config": msgspec.to_builtins(config)})

    async def statistics(self, call: Any) -> Message:
        report = await self._inference.statistics(call.name, call.version)
        return filled("ModelStatisticsResponse", msgspec.to_builtins(report))

    async def index(self, call: Any) -> Message:
        _only_repository(call)
        return filled(
            "RepositoryIndexResponse", {"models": msgspec.to_builtins(await self._inference.index(call.ready))}
        )

    async def load(self, call: Any) -> Message:
        await self._inference.load(*_action(call))
        return filled("RepositoryModelLoadResponse", {})

    async def unload(self, call: Any) -> Message:
        await self._inference.unload(*_action(call))
        return filled("RepositoryModelUnloadResponse", {})

    async def no_shared_memory(self, _: Any) -> Message:
        raise Refused(Fault.UNIMPLEMENTED, "shared memory is not offered; send tensors in raw_input_contents")

    async def no_tracing(self, _: Any) -> Message:
        raise Refused(Fault.UNIMPLEMENTED, "trace settings are not offered; what happens to requests is in the metrics")

    async def no_log_settings(self, _: Any) -> Message:
        raise Refused(Fault.UNIMPLEMENTED, "log settings are not offered; start with --log-level and --log-format")


async def _refuse(refused: Refused) -> InferRequest:
    raise refused


def _only_repository(call: Any) -> None:
    if call.repository_name:
        found = f"repository {call.repository_name!r} is named"
        raise Refused(Fault.UNIMPLEMENTED, f"{found}; there is one repository, leave repository_name empty")


def _action(call: Any) -> tuple[str, RepositoryAction]:
    """The model, and what is asked for it."""
    _only_repository(call)
    if not call.model_name:
        raise invalid("model_name is empty; expected the name of a model")
    parameters = {name: _value(given) for name, given in call.parameters.items()}
    return call.model_name, RepositoryAction(parameters)


def _value(parameter: Any) -> Any:
    kind = parameter.WhichOneof("parameter_choice")
    return getattr(parameter, kind) if kind else None


Run = Callable[[Verbs, Any], Awaitable[Message]]

VERBS: dict[str, Run] = {
    "ServerLive": Verbs.server_live,
    "ServerReady": Verbs.server_ready,
    "ModelReady": Verbs.model_ready,
    "ServerMetadata": Verbs.server_metadata,
    "ModelMetadata": Verbs.model_metadata,
    "ModelConfig": Verbs.model_config,
    "ModelStatistics": Verbs.statistics,
    "RepositoryIndex": Verbs.index,
    "RepositoryModelLoad": Verbs.load,
    "RepositoryModelUnload": Verbs.unload,
    "SystemSharedMemoryStatus": Verbs.no_shared_memory,
    "SystemSharedMemoryRegister": Verbs.no_shared_memory,
    "SystemSharedMemoryUnregister": Verbs.no_shared_memory,
    "CudaSharedMemoryStatus": Verbs.no_shared_memory,
    "CudaSharedMemoryRegister": Verbs.no_shared_memory,
    "CudaSharedMemoryUnregister": Verbs.no_shared_memory,
    "TraceSetting": Verbs.no_tracing,
    "LogSettings": Verbs.no_log_settings,
}
"""Every rpc of the service but ModelInfer and ModelStreamInfer, which take bytes."""

STATUS = {fault: StatusCode[fault.grpc] for fault in Fault}


async def abort(context: Context, refused: Refused) -> None:
    """Ends the call with a row of the error table. When to try again is in the trailing metadata.

    gRPC's own retry policies read `grpc-retry-pushback-ms`, people and other clients `retry-after-ms`.
    """
    wait_ms = str(-(-refused.retry_after_us // 1_000))
    trailing = (("retry-after-ms", wait_ms), ("grpc-retry-pushback-ms", wait_ms)) if refused.retry_after_us else ()
    await context.abort(STATUS[refused.fault], refused.detail, trailing)
