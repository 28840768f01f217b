"""The one schema of the configuration. Each field says its unit, what 0 or "" means and what gets worse when it grows.

Files, variables, flags, help texts and the documentation's table are all made from these classes, so a setting is
added here and nowhere else. Constructors check nothing: `load` does, once, at start.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field

from narsil_stream.core.config.access import AccessConfig

Mode = Literal["batch", "worker", "inline"]
Placement = Literal["apart", "together"]
ModelControl = Literal["none", "explicit"]
BackendName = Literal["auto", "native", "torch", "reference", "noop"]
PrecisionName = Literal["auto", "fp32", "bf16", "fp16", "int8"]
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]

Port = Annotated[int, Meta(ge=0, le=65_535)]
Host = Annotated[str, Meta(min_length=1)]
Count = Annotated[int, Meta(ge=1, le=256)]
Processes = Annotated[int, Meta(ge=0, le=256)]

MIB = 1024 * 1024
PATH = {"path": True}
SECRET = {"secret": True}
LIVE = {"live": True}
"""May change while an actor runs: `narsil tune`."""


def default_data_dir(environ: Mapping[str, str]) -> str:
    """Where this user's data lives by the XDG base directory rules, which ignore a relative XDG_DATA_HOME."""
    xdg = Path(environ.get("XDG_DATA_HOME", ""))
    return str((xdg if xdg.is_absolute() else home(environ) / ".local/share") / "narsil-stream")


def home(environ: Mapping[str, str]) -> Path:
    """The user's home; the working directory for a user who has none, as in containers that pick a random user id."""
    if name := environ.get("HOME"):
        return Path(name)
    try:
        return Path.home()
    except RuntimeError:
        return Path.cwd()


class HttpConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """HTTP gateway"""

    host: Annotated[
        Host,
        Meta(
            description="Address that the HTTP gateway listens on. 127.0.0.1: this machine only; 0.0.0.0: every "
            "interface, which needs access.tokens_file, access.tls_client_ca or --insecure."
        ),
    ] = "127.0.0.1"
    port: Annotated[Port, Meta(description="TCP port of the HTTP gateway. 0: any free port.")] = 8000
    processes: Annotated[
        Processes,
        Meta(
            description="HTTP gateway processes that share the port. 0: none. More: more requests per second, and as "
            "many more connections to the broker and processor cores in use."
        ),
    ] = 1
    max_body_bytes: Annotated[
        int,
        Meta(
            ge=1024,
            le=1024 * MIB,
            description="Largest request body, bytes; above it the answer is 413. Larger: a few clients can fill "
            "the gateway's memory.",
        ),
    ] = 64 * MIB
    body_timeout_ms: Annotated[
        int,
        Meta(
            ge=1,
            le=600_000,
            description="How long a client may take to send its body, ms; after that the answer is 408. Larger: "
            "slow or stuck clients hold memory for longer.",
        ),
    ] = 10_000


class GrpcConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """gRPC gateway"""

    host: Annotated[
        Host,
        Meta(
            description="Address that the gRPC gateway listens on. 127.0.0.1: this machine only; 0.0.0.0: every "
            "interface, which needs access.tokens_file, access.tls_client_ca or --insecure."
        ),
    ] = "127.0.0.1"
    port: Annotated[Port, Meta(description="TCP port of the gRPC gateway. 0: any free port.")] = 8001
    processes: Annotated[
        Processes,
        Meta(
            description="gRPC gateway processes that share the port. 0: none. More: more requests per second, and as "
            "many more connections to the broker and processor cores in use."
        ),
    ] = 1
    max_message_bytes: Annotated[
        int,
        Meta(
            ge=1024,
            le=1024 * MIB,
            description="Largest request message, bytes; above it the call ends in RESOURCE_EXHAUSTED, as gRPC has "
            "it. Larger: a few clients can fill the gateway's memory.",
        ),
    ] = 64 * MIB
    max_streams: Annotated[
        int,
        Meta(
            ge=1,
            le=65_536,
            description="Most calls at a time on one connection. Larger: one client can hold up the others.",
        ),
    ] = 1_024
    keepalive_ms: Annotated[
        int,
        Meta(
            ge=1_000,
            le=7_200_000,
            description="Time without traffic after which a connection is checked by a ping, ms. Larger: clients "
            "that vanished hold memory for longer.",
        ),
    ] = 30_000


class MetricsConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """Metrics"""

    host: Annotated[
        Host,
        Meta(
            description="Address that the Prometheus metrics are served on, to whoever asks. 127.0.0.1: this machine "
            "only; others need --insecure."
        ),
    ] = "127.0.0.1"
    port: Annotated[Port, Meta(description="TCP port of the Prometheus metrics. 0: any free port.")] = 8002


class NatsConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """NATS broker"""

    url: Annotated[
        str,
        Meta(
            description="Broker to connect to, as nats://, tls://, ws:// or wss://host:port; several members of one "
            'cluster are separated by commas. "": `narsil serve` starts one, others use nats.host and nats.port.'
        ),
    ] = ""
    host: Annotated[
        Host,
        Meta(
            description="Address that our own broker listens on. 127.0.0.1: this machine only; others need a login "
            "(nats.user, nats.token, `narsil broker --init`) or --insecure."
        ),
    ] = "127.0.0.1"
    port: Annotated[Port, Meta(description="TCP port of our own broker. 0: any free port.")] = 4222
    user: Annotated[str, Meta(description='User name at the broker. "": none.')] = ""
    password: Annotated[
        str,
        Meta(
            description='Password of that user. Prefer the variable to the flag, which `ps` shows. "": none.',
            extra=SECRET,
        ),
    ] = ""
    token: Annotated[
        str,
        Meta(
            description='Token for the broker, in place of a user. Prefer the variable to the flag. "": none.',
            extra=SECRET,
        ),
    ] = ""
    nkey_seed_file: Annotated[
        str, Meta(description='File with an nkey seed, in place of a user. "": none.', extra=PATH)
    ] = ""
    creds_file: Annotated[
        str, Meta(description='Credentials file (user JWT and seed), in place of a user. "": none.', extra=PATH)
    ] = ""
    tls_ca: Annotated[
        str,
        Meta(
            description='PEM file of the authorities that signed the broker\'s certificate. "": those of the system.',
            extra=PATH,
        ),
    ] = ""
    tls_cert: Annotated[
        str, Meta(description='PEM file of the certificate shown to the broker. "": none.', extra=PATH)
    ] = ""
    tls_key: Annotated[str, Meta(description='PEM file of that certificate\'s private key. "": none.', extra=PATH)] = ""
    max_payload_bytes: Annotated[
        int,
        Meta(
            ge=64 * 1024,
            le=64 * MIB,
            description="Largest message that our own broker takes, bytes; a foreign broker says its own. Larger: "
            "one message holds up the others on its connection for longer.",
        ),
    ] = 8 * MIB

    def __rich_repr__(self) -> list[tuple[str, Any]]:
        """Without secrets, so that a logged or raised configuration gives nothing away."""
        values = {name: getattr(self, name) for name in self.__struct_fields__}
        hidden = {name: "***" for name in ("url", "password", "token") if values[name]}
        return list((values | hidden).items())

    def __repr__(self) -> str:
        return f"NatsConfig({', '.join(f'{name}={value!r}' for name, value in self.__rich_repr__())})"


class BatchConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """Batching"""

    batchers: Annotated[
        Count,
        Meta(
            description="Batcher processes. More: more requests per second taken in, but each sees fewer of them, "
            "so batches are less full."
        ),
    ] = 1
    max_rows: Annotated[
        int,
        Meta(
            ge=1,
            le=65_536,
            description="Most rows in one batch. Larger: more throughput, longer tail latency, more memory.",
            extra=LIVE,
        ),
    ] = 4096
    max_request_rows: Annotated[
        int,
        Meta(
            ge=1,
            le=1_048_576,
            description="Most rows in one request to a gateway; above it the answer is 413. What is more than a batch "
            "or a message holds is split, and its scores are joined. Larger: one caller can hold up the others.",
            extra=LIVE,
        ),
    ] = 65_536
    queue_rows: Annotated[
        int,
        Meta(
            ge=1,
            le=16_777_216,
            description="Most rows waiting in one batcher; above it requests are refused as OVERLOADED. Larger: "
            "longer waits before a refusal.",
            extra=LIVE,
        ),
    ] = 65_536
    queue_bytes: Annotated[
        int,
        Meta(
            ge=MIB,
            le=16 * 1024 * MIB,
            description="Most bytes waiting in one batcher; above it requests are refused as OVERLOADED. Larger: "
            "more memory.",
            extra=LIVE,
        ),
    ] = 64 * MIB
    linger_us: Annotated[
        int,
        Meta(
            ge=0,
            le=1_000_000,
            description="How long a request waits for company although an executor is free, µs. 0: never. Larger: "
            "fuller batches, later answers.",
            extra=LIVE,
        ),
    ] = 0
    slo_p99_ms: Annotated[
        float,
        Meta(
            ge=0,
            le=60_000,
            description="Target for the p99 from arrival in the batcher to the scores, ms (20 or 20ms): row cap and "
            "linger of batches are tuned to it, up to `max_rows` and from `linger_us` on. 0: they stay as configured. "
            "Larger: fuller batches, later answers. It refuses nobody: budgets do.",
            extra=LIVE | {"flag": "--slo-p99", "unit": "ms"},
        ),
    ] = 0.0
    consolidate: Annotated[
        bool,
        Meta(
            description="Keep batches full by using as few executors as meet the deadlines. Fewer passes, later "
            "answers; for two executors or more.",
            extra=LIVE,
        ),
    ] = False
    default_budget_us: Annotated[
        int,
        Meta(
            ge=1000,
            le=600_000_000,
            description="Time budget of a request that names none, µs. Larger: under overload, answers come late "
            "rather than as refusals.",
            extra=LIVE,
        ),
    ] = 1_000_000
    max_budget_us: Annotated[
        int,
        Meta(
            ge=1000,
            le=600_000_000,
            description="Longest time budget that a request may ask for, µs; a longer one is cut to it. Larger: "
            "requests may hold memory for longer.",
            extra=LIVE,
        ),
    ] = 60_000_000
    ageing_percent: Annotated[
        int,
        Meta(
            ge=0,
            le=100,
            description="While more urgent requests wait: the share of the rows that goes to less urgent ones which "
            "have waited for half of their budget, percent. 0: none, so that they may starve. Larger: urgent requests "
            "wait longer.",
            extra=LIVE,
        ),
    ] = 10
    tenant_weights: Annotated[
        str,
        Meta(
            description="Shares of tenants when they compete, as <name>=<weight>, separated by commas. A tenant is the "
            'name of a token, or what a request says where no token is needed. Who is not named has weight 1. "": all '
            "are equal. Larger: more for that tenant, less for each other one.",
        ),
    ] = ""
    stale_grace_us: Annotated[
        int,
        Meta(
            ge=0,
            le=600_000_000,
            description="A request older than its budget plus this, by the sender's clock, is dropped unread, µs. "
            "0: never. Larger: more work for callers who have left; smaller: clocks must agree better.",
            extra=LIVE,
        ),
    ] = 2_000_000

    @property
    def weights(self) -> dict[str, float]:
        """Of tenants, by name. Raises ValueError."""
        weights: dict[str, float] = {}
        for one in filter(None, map(str.strip, self.tenant_weights.split(","))):
            name, _, weight = one.rpartition("=")
            weights[name.strip()] = float(weight)
        return weights


class ExecutorConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """Executors"""

    executors: Annotated[
        Count, Meta(description="Executor processes, each with a copy of the model. More: more memory.")
    ] = 1
    lanes: Annotated[
        int,
        Meta(
            ge=0,
            le=16,
            description="Batches that one model computes at the same time, where its backend can (native; torch on "
            "several threads of a CPU). 0: as many "
            "as the backend does best with. More: rows a second, until the device is full; then latency, and more of "
            "the device's memory.",
        ),
    ] = 0
    slots: Annotated[
        int,
        Meta(
            ge=0,
            le=64,
            description="Batches that one executor accepts before it has answered the first. 0: those that its "
            "backend computes at once, plus one to copy meanwhile. Larger: batches wait at the executor, where "
            "nothing more can join or overtake them.",
        ),
    ] = 0
    threads: Annotated[
        int,
        Meta(
            ge=0,
            le=256,
            description="Processor threads that one executor computes with. 0: half of the cores, with torch two "
            "at least where there are two, divided by executor.executors. Larger: less left for batchers and gateways "
            "on the same host.",
        ),
    ] = 0
    noop_us: Annotated[
        int,
        Meta(
            ge=0,
            le=60_000_000,
            description="Backend noop only, for load tests: it stands in for a device that takes so long for each "
            "batch, µs ...",
        ),
    ] = 0
    noop_row_us: Annotated[
        int,
        Meta(
            ge=0,
            le=1_000_000,
            description="... and so long for each row of it, µs.",
        ),
    ] = 0


class TimingConfig(Struct, frozen=True, forbid_unknown_fields=True):
    """Liveness and failover"""

    beat_ms: Annotated[
        int,
        Meta(
            ge=5,
            le=60_000,
            description="Time between two heartbeats of an actor, ms. Larger: news of load and of deaths is older.",
        ),
    ] = 100
    lease_ms: Annotated[
        int,
        Meta(
            ge=20,
            le=600_000,
            description="An actor that was silent for this long counts as dead, ms. Larger: more requests wait for a "
            "dead one; smaller: a pause is taken for a death.",
        ),
    ] = 500
    drain_ms: Annotated[
        int,
        Meta(
            ge=0,
            le=600_000,
            description="How long a stopping actor may finish what it accepted, ms. 0: it answers UNAVAILABLE at "
            "once. Larger: slower restarts.",
        ),
    ] = 10_000
    notice_ms: Annotated[
        int,
        Meta(
            ge=0,
            le=600_000,
            description="How long a stopping gateway says that it is not ready before it takes no more, ms. At least "
            "as long as a load balancer needs to notice. Larger: slower restarts.",
        ),
    ] = 200
    failover_floor_ms: Annotated[
        int,
        Meta(
            ge=1,
            le=60_000,
            description="A batch is sent to another executor no sooner than this, ms. Larger: later answers when an "
            "executor dies; smaller: work done twice after a hiccup.",
        ),
    ] = 50
    failover_factor: Annotated[
        float,
        Meta(
            ge=1.0,
            le=100.0,
            description="... and no sooner than this many times its predicted service time. Larger and smaller: as "
            "for timing.failover_floor_ms.",
        ),
    ] = 4.0


class Config(Struct, frozen=True, forbid_unknown_fields=True):
    """General"""

    mode: Annotated[
        Mode,
        Meta(
            description="batch: batchers coalesce requests for executors; worker: executors take requests one by "
            "one; inline: gateway, batcher and executor in one process."
        ),
    ] = "batch"
    placement: Annotated[
        Placement,
        Meta(
            description="Of `narsil serve`'s batchers and executors. together: each executor's process holds a batcher "
            "too, as far as there are as many: batches need not cross the broker; apart: a process each: what takes "
            "requests in and what computes share no interpreter."
        ),
    ] = "together"
    model: Annotated[
        str,
        Meta(
            description='Folder of the model artifact to serve. "": those of model_repository, or without one a demo '
            "model, made in data_dir on first start.",
            extra=PATH,
        ),
    ] = ""
    model_repository: Annotated[
        str,
        Meta(
            description="Folder of model artifacts, as <folder>/model.json or <model>/<version>/model.json; names and "
            'versions are those of model.json. Executors read it. "": none.',
            extra=PATH,
        ),
    ] = ""
    model_control: Annotated[
        ModelControl,
        Meta(
            description="none: the newest version of each model in model_repository is served, and that of model; "
            "explicit: model and load_models at first, then whatever clients with that right load and unload."
        ),
    ] = "none"
    load_models: Annotated[
        str,
        Meta(
            description="Names of models in model_repository to load at start, separated by commas, when "
            "model_control is explicit. *: all. An executor that joins others serves what they serve."
        ),
    ] = ""
    data_dir: Annotated[
        str,
        Meta(
            min_length=1,
            description="Folder for what is kept between runs: the demo model, the broker's files.",
            extra=PATH | {"default": "$XDG_DATA_HOME/narsil-stream"},
        ),
    ] = field(default_factory=lambda: default_data_dir(os.environ))
    backend: Annotated[
        BackendName,
        Meta(
            description="What computes the scores. auto: native on a GPU with CuPy, else torch where its locked "
            "versions are installed and pay off, else reference; native: our CUDA kernels; torch: FBGEMM's "
            "operators, as TorchRec; reference: NumPy; noop: scores that mean nothing, for benchmarks only."
        ),
    ] = "auto"
    precision: Annotated[
        PrecisionName,
        Meta(
            description="Of the arithmetic. auto: the fastest that the backend and the device have; int8: INT8 rows in "
            "the tables, and auto for the rest. Smaller: faster, scores differ more from FP32 (docs/kernels.md)."
        ),
    ] = "auto"
    log_level: Annotated[LogLevel, Meta(description="Least important kind of message that is logged.")] = "info"
    log_format: Annotated[
        LogFormat, Meta(description="text: lines for people; json: one object a line, for collectors.")
    ] = "text"
    insecure: Annotated[
        bool,
        Meta(
            description="Listen beyond this machine although whoever reaches the address may call. For networks where "
            "something else decides who gets there."
        ),
    ] = False
    http: HttpConfig = HttpConfig()
    grpc: GrpcConfig = GrpcConfig()
    access: AccessConfig = AccessConfig()
    metrics: MetricsConfig = MetricsConfig()
    nats: NatsConfig = NatsConfig()
    batch: BatchConfig = BatchConfig()
    executor: ExecutorConfig = ExecutorConfig()
    timing: TimingConfig = TimingConfig()

    @property
    def loaded_names(self) -> tuple[str, ...]:
        """`load_models` as names; "*" stands for all."""
        return tuple(name.strip() for name in self.load_models.split(",") if name.strip())
