"""What must hold between settings. Each rule gives the sentence that was broken and the keys that it is about."""

import math
import re
from collections.abc import Iterator
from pathlib import Path

from narsil_stream.core.config.access import AccessConfig
from narsil_stream.core.config.schema import Config, NatsConfig
from narsil_stream.schemas.model import NAME

Broken = tuple[str, tuple[str, ...]]
ADDRESS = re.compile(r"(nats|tls|wss?)://\S+")
HASH = re.compile(r"\$2[abxy]\$\d\d\$")
"""What nats-server takes for the bcrypt hash of a password in its configuration."""
FILES = ("nats.nkey_seed_file", "nats.creds_file", "nats.tls_ca", "nats.tls_cert", "nats.tls_key")
"""Settings that name a file which must be there."""


def broken(config: Config) -> Iterator[Broken]:
    """The rules that `config` breaks."""
    yield from _timing(config)
    yield from _batching(config)
    yield from _ports(config)
    yield from _inline(config)
    yield from _models(config)
    yield from _login(config.nats)
    yield from _address(config.nats)
    yield from _hash(config.nats)
    yield from _files(config.nats)
    yield from _pair(config.access)


def _timing(config: Config) -> Iterator[Broken]:
    if config.timing.lease_ms < 4 * config.timing.beat_ms:
        keys = ("timing.lease_ms", "timing.beat_ms")
        yield "a lease must be at least four heartbeats long, or one that is late is taken for a death", keys


def _batching(config: Config) -> Iterator[Broken]:
    batch = config.batch
    if batch.max_rows > batch.queue_rows:
        yield "a batcher's queue must hold at least one full batch", ("batch.max_rows", "batch.queue_rows")
    if batch.default_budget_us > batch.max_budget_us:
        keys = ("batch.default_budget_us", "batch.max_budget_us")
        yield "the default budget must not be above the largest", keys
    try:
        sound = all(name and 0 < weight < math.inf for name, weight in batch.weights.items())
    except ValueError:
        sound = False
    if not sound:
        yield "weights of tenants are given as <name>=<number above 0>, separated by commas", ("batch.tenant_weights",)
    if batch.linger_us >= batch.default_budget_us:
        keys = ("batch.linger_us", "batch.default_budget_us")
        yield "a linger must be shorter than the default budget, or every lone request expires", keys


def _ports(config: Config) -> Iterator[Broken]:
    taken = {"http.port": config.http.port, "grpc.port": config.grpc.port, "metrics.port": config.metrics.port}
    if not config.nats.url:
        taken["nats.port"] = config.nats.port
    for port in sorted({port for port in taken.values() if port}):
        keys = tuple(key for key, value in taken.items() if value == port)
        if len(keys) > 1:
            yield "each server needs a port of its own", keys
    for door, of in (("http", config.http), ("grpc", config.grpc)):
        if of.port == 0 and of.processes > 1:
            yield "processes can share only a port that is named", (f"{door}.port", f"{door}.processes")


def _inline(config: Config) -> Iterator[Broken]:
    counts = {
        "http.processes": config.http.processes,
        "grpc.processes": config.grpc.processes,
        "batch.batchers": config.batch.batchers,
        "executor.executors": config.executor.executors,
    }
    many = tuple(key for key, count in counts.items() if count > 1)
    if config.mode == "inline" and many:
        yield "inline runs one gateway, one batcher and one executor in one process", ("mode", *many)


def _models(config: Config) -> Iterator[Broken]:
    if config.load_models and config.model_control != "explicit":
        yield "without explicit control every model is loaded at start", ("load_models", "model_control")
    if config.load_models and not config.model_repository:
        yield "models that are loaded by name need a repository that holds them", ("load_models", "model_repository")
    for name in config.loaded_names:
        if not NAME.fullmatch(name) and name != "*":
            yield f"a model's name matches {NAME.pattern}", ("load_models",)
            return


def _login(nats: NatsConfig) -> Iterator[Broken]:
    names = ("user", "token", "nkey_seed_file", "creds_file")
    ways = tuple(f"nats.{name}" for name in names if getattr(nats, name))
    if len(ways) > 1:
        yield "log in at the broker in one way only", ways
    if bool(nats.user) != bool(nats.password):
        yield "a user needs a password, and a password a user", ("nats.user", "nats.password")
    if bool(nats.tls_cert) != bool(nats.tls_key):
        yield "a certificate needs its private key, and a key its certificate", ("nats.tls_cert", "nats.tls_key")


def _address(nats: NatsConfig) -> Iterator[Broken]:
    given = tuple(key for key in FILES if getattr(nats, key.removeprefix("nats.")))
    if given and not nats.url:
        yield "our own broker takes a user or a token, no more; name another broker", ("nats.url", *given)
    if nats.url and not all(ADDRESS.fullmatch(url.strip()) for url in nats.url.split(",")):
        yield "a broker's address is nats://, tls://, ws:// or wss:// and a host", ("nats.url",)


def _hash(nats: NatsConfig) -> Iterator[Broken]:
    for name in ("password", "token"):
        if not nats.url and HASH.match(getattr(nats, name)):
            yield "our own broker takes what begins like this for a bcrypt hash, and refuses it", (f"nats.{name}",)


def _files(nats: NatsConfig) -> Iterator[Broken]:
    for key in FILES:
        path = getattr(nats, key.removeprefix("nats."))
        if path and (reason := unreadable(path)):
            yield f"this file cannot be read ({reason})", (key,)


def _pair(access: AccessConfig) -> Iterator[Broken]:
    if bool(access.tls_cert) != bool(access.tls_key):
        yield "a certificate needs its private key, and a key its certificate", ("access.tls_cert", "access.tls_key")
    if access.tls_client_ca and not access.tls_cert:
        keys = ("access.tls_client_ca", "access.tls_cert")
        yield "client certificates are asked for in TLS, which needs a certificate of the server's own", keys


def unreadable(path: str) -> str:
    """Why a file cannot be read, "" if it can."""
    try:
        with Path(path).open("rb") as file:
            file.read(1)
    except (OSError, ValueError) as error:
        return getattr(error, "strerror", None) or str(error)
    return ""
