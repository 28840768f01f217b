"""The Open Inference Protocol's documents with Triton's extensions: what a server says of itself and its models.

Field names are those of the protocol's JSON, and of its protobuf messages, so one value serves both doors. Durations
are nanoseconds, as Triton's.
"""

from typing import Any, Literal

from msgspec import Struct, field

EXTENSIONS = (
    "binary_tensor_data",
    "model_configuration",
    "model_repository",
    "model_repository(unload_dependents)",
    "parameters",
    "schedule_policy",
    "statistics",
)
"""Of Triton's protocol extensions, those that are here; clients read the list before they use one."""


class ServerMetadata(Struct, frozen=True):
    """The answer to `GET v2`."""

    name: str
    version: str
    extensions: tuple[str, ...] = EXTENSIONS


class ServerLive(Struct, frozen=True):
    """The answer to `GET v2/health/live`."""

    live: bool


class ServerReady(Struct, frozen=True):
    """The answer to `GET v2/health/ready`."""

    ready: bool
    """Whether a request that comes now would be scored."""


class ModelReady(Struct, frozen=True):
    """The answer to `GET v2/models/<model>/ready`."""

    name: str
    ready: bool
    """Whether a request to that model, or to that version of it, would be scored now."""


class TensorMetadata(Struct, frozen=True):
    name: str
    datatype: str
    shape: tuple[int, ...]
    """-1: as many as there are."""


class ModelMetadata(Struct, frozen=True):
    """The answer to `GET v2/models/<model>`."""

    name: str
    versions: tuple[str, ...]
    """Those that are served, the newest last."""
    platform: str
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]


class InputConfig(Struct, frozen=True, omit_defaults=True):
    name: str
    data_type: str
    """TYPE_FP32 ..."""
    dims: tuple[int, ...]
    """Without the rows; -1: as many as there are."""
    optional: bool = False
    allow_ragged_batch: bool = False


class OutputConfig(Struct, frozen=True):
    name: str
    data_type: str
    dims: tuple[int, ...]


class InstanceGroup(Struct, frozen=True):
    name: str
    kind: Literal["KIND_CPU", "KIND_GPU"]
    count: int = 1


class DynamicBatching(Struct, frozen=True):
    max_queue_delay_microseconds: int = 0


class VersionPolicyAll(Struct, frozen=True):
    """Every version that is loaded may be named."""


class VersionPolicy(Struct, frozen=True):
    all: VersionPolicyAll = VersionPolicyAll()


class ConfigParameter(Struct, frozen=True):
    string_value: str


class ModelConfig(Struct, frozen=True):
    """The answer to `GET v2/models/<model>/config`: as much of Triton's model configuration as there is here."""

    name: str
    platform: str
    backend: str
    max_batch_size: int
    """Rows that one request may hold."""
    input: tuple[InputConfig, ...]
    output: tuple[OutputConfig, ...]
    instance_group: tuple[InstanceGroup, ...]
    dynamic_batching: DynamicBatching
    version_policy: VersionPolicy = VersionPolicy()
    parameters: dict[str, ConfigParameter] = field(default_factory=dict)


class Duration(Struct):
    """How often something happened, and how long it took in total."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int, count: int = 1) -> None:
        self.count += count
        self.ns += ns


class InferStatistics(Struct):
    """Requests by how they ended, and of the successful ones where the time went. A failure is no success."""

    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    """From arrival at a batcher to the sending of the batch."""
    compute_input: Duration = field(default_factory=Duration)
    """Joining the requests' rows."""
    compute_infer: Duration = field(default_factory=Duration)
    """The forward pass, copies to and from the device included."""
    compute_output: Duration = field(default_factory=Duration)
    """Splitting the scores into answers."""
    cache_hit: Duration = field(default_factory=Duration)
    """There is no response cache: always 0."""
    cache_miss: Duration = field(default_factory=Duration)


class BatchStatistics(Struct):
    """Model runs by rows in the batch."""

    batch_size: int
    """Rows, exact up to 256 and above that rounded up to one of 32 steps for each power of two."""
    compute_input: Duration = field(default_factory=Duration)
    compute_infer: Duration = field(default_factory=Duration)
    compute_output: Duration = field(default_factory=Duration)


class ModelStatistics(Struct):
    """Of one version of a model, since its batchers started."""

    name: str
    version: str
    last_inference: int = 0
    """Unix time of the last request that was scored, milliseconds; 0: none was."""
    inference_count: int = 0
    """Rows scored."""
    execution_count: int = 0
    """Model runs."""
    inference_stats: InferStatistics = field(default_factory=InferStatistics)
    batch_stats: list[BatchStatistics] = field(default_factory=list)


class StatisticsReport(Struct, frozen=True):
    """The answer to `GET v2/models/stats`, and of batchers to gateways."""

    model_stats: tuple[ModelStatistics, ...] = ()


class RepositoryEntry(Struct, frozen=True):
    """One version of a model in the executors' repositories."""

    name: str
    version: str
    state: Literal["READY", "LOADING", "UNLOADING", "UNAVAILABLE"]
    reason: str = ""
    """Why it is not READY; "" when nobody asked for it."""


class IndexRequest(Struct, frozen=True):
    """The body of `POST v2/repository/index`, which may be empty."""

    ready: bool = False
    """Only the models that are ready."""


class RepositoryAction(Struct, frozen=True):
    """The body of a load or unload request, which may be empty.

    Triton's parameters that change a model on the way in are refused.
    """

    parameters: dict[str, Any] = field(default_factory=dict)
