"""The one schema of the configuration. Each field says its unit, what 0 or "" means and what gets worse when it grows.

Files, variables, flags, help texts and the documentation's table are all made from these classes, so a setting is
added to one of them and nowhere else. Constructors check nothing: `load` does, once, at start.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field

from narsil_stream.core.config.access import AccessConfig
from narsil_stream.core.config.fields import MIB, PATH, SECRET, Host, Port, Processes
from narsil_stream.core.config.work import BatchConfig, ExecutorConfig, TimingConfig

Mode = Literal["batch", "worker", "inline"]
Placement = Literal["apart", "together"]
ModelControl = Literal["none", "explicit"]
BackendName = Literal["auto", "native", "torch", "reference", "noop"]
PrecisionName = Literal["auto", "fp32", "bf16", "fp16", "int8"]
LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["text", "json"]


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
