"""`narsil client-example`: a client to start from, for the addresses and the model that there are."""

import functools
import json
import os
import ssl
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import rich_click as click
import uvloop

from narsil_stream.cli import programs
from narsil_stream.cli.asking import CONNECT_S, described, say, setup_logs
from narsil_stream.cli.examples import broker_url
from narsil_stream.cli.options import config_options, fail
from narsil_stream.cli.programs import Door, Shape
from narsil_stream.core.client import Client
from narsil_stream.core.config import Config, Loaded
from narsil_stream.core.config.settings import without_login
from narsil_stream.core.ports import address
from narsil_stream.schemas.errors import Fault, Refused
from narsil_stream.schemas.model import CRITEO_SHAPE, NAME

KINDS = ("http", "grpc", "nats", "curl")
DEMO = Shape("dlrm", CRITEO_SHAPE[0], (10_000,) * CRITEO_SHAPE[1])
"""The model that `narsil serve` shows on a fresh machine."""
EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}
"""An address to listen on is none to call."""

option = functools.partial(click.option, panel="Model")


@click.command("client-example")
@click.argument("kind", type=click.Choice(KINDS))
@option("--model", default="", metavar="NAME", help="Model to ask for. Default: the only one that is served.")
@config_options("http", "grpc", "nats", "access")
def client_example(loaded: Loaded, kind: str, model: str) -> None:
    """Print a program that scores two rows, to start from: in Python with Triton's client over HTTP or gRPC, in Python
    with nats-py, or for a shell with curl.

    It calls the addresses that are configured here, with TLS and token where they are, and asks for the model that is
    served there. If nobody answers, it is for the demo model.

    Examples: narsil client-example grpc > client.py; narsil client-example curl | sh
    """
    setup_logs(loaded, "client-example")
    if model and not NAME.fullmatch(model):
        fail(f"names of models match {NAME.pattern}")
    click.echo(_program(loaded.config, kind, model), nl=False)


def _program(config: Config, kind: str, model: str) -> str:
    door = _door(config, kind)
    try:
        shape = _ask_nats(config, model) if kind == "nats" else _ask_door(kind, door, model)
    except Refused as refused:
        if refused.fault is Fault.NOT_FOUND:
            fail(f"{refused.detail}; choose one with --model")
        if refused.fault is Fault.UNAUTHENTICATED:
            door = door._replace(token=True)
            say("the server asks for a token; put one into the variable TOKEN, here too")
        where = without_login(broker_url(config)) if kind == "nats" else door.address
        say(f"{where} does not say what is served: {refused.detail}")
        say("this program is for the demo model" + (f", called {model}" if model else ""))
        shape = DEMO._replace(model=model or DEMO.model)
    if kind == "nats":
        return programs.nats(shape, config)
    return {"http": programs.http, "grpc": programs.grpc, "curl": programs.curl}[kind](shape, door)


def _door(config: Config, kind: str) -> Door:
    listens: Any = config.grpc if kind == "grpc" else config.http
    access = config.access
    where = address(EVERYWHERE.get(listens.host, listens.host), listens.port)
    return Door(where, bool(access.tls_cert), bool(access.tls_client_ca), bool(access.tokens_file))


# What is served


def _ask_nats(config: Config, model: str) -> Shape:
    """As the batchers say. Raises `Refused`."""

    async def ask() -> Shape:
        async with Client(config.nats, connect_timeout_s=CONNECT_S) as client:
            spec = (await described(client, model, "")).spec
        return Shape(spec.name, spec.n_dense, tuple(table.rows for table in spec.tables))

    shape: Shape = uvloop.run(ask())
    return shape


def _ask_door(kind: str, door: Door, model: str) -> Shape:
    """As the gateway says, which does not tell how many rows a table has. Raises `Refused`."""
    ask = _OverGrpc(door) if kind == "grpc" else _OverHttp(door)
    names = sorted(set(ask.index()))
    if not names:
        raise Refused(Fault.UNAVAILABLE, "no model is served")
    if model not in names and (model or len(names) > 1):
        raise Refused(Fault.NOT_FOUND, f"served: {', '.join(names)}")
    widths = ask.inputs(model or names[0])
    return Shape(model or names[0], widths["dense"], (1,) * widths["sparse"])


class _OverHttp:
    def __init__(self, door: Door) -> None:
        self._base = f"http{'s' * door.tls}://{door.address}/v2"
        self._tls: ssl.SSLContext | None = None
        if door.tls:
            self._tls = ssl.create_default_context()
            if cert := os.environ.get("CLIENT_CERT"):
                self._tls.load_cert_chain(cert, os.environ.get("CLIENT_KEY"))

    def index(self) -> list[str]:
        return [str(one["name"]) for one in self._get("/repository/index", b'{"ready":true}')]

    def inputs(self, model: str) -> dict[str, int]:
        return {one["name"]: one["shape"][-1] for one in self._get(f"/models/{model}")["inputs"]}

    def _get(self, path: str, body: bytes | None = None) -> Any:
        token = os.environ.get("TOKEN")
        headers = {"authorization": f"Bearer {token}"} if token else {}
        request = urllib.request.Request(self._base + path, body, headers)
        try:
            with urllib.request.urlopen(request, timeout=CONNECT_S, context=self._tls) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            fault = next((fault for fault in Fault if fault.http == error.code), Fault.UNAVAILABLE)
            raise Refused(fault, f"HTTP status {error.code}") from None
        except (OSError, ValueError) as error:
            raise Refused(Fault.UNAVAILABLE, str(getattr(error, "reason", error))) from None


class _OverGrpc:
    def __init__(self, door: Door) -> None:
        import grpc

        if door.tls:
            files = (os.environ.get(name) for name in ("SSL_CERT_FILE", "CLIENT_KEY", "CLIENT_CERT"))
            credentials = grpc.ssl_channel_credentials(*(Path(file).read_bytes() if file else None for file in files))
            self._channel = grpc.secure_channel(door.address, credentials)
        else:
            self._channel = grpc.insecure_channel(door.address)

    def index(self) -> list[str]:
        return [one.name for one in self._call("RepositoryIndex", ready=True).models]

    def inputs(self, model: str) -> dict[str, int]:
        return {one.name: one.shape[-1] for one in self._call("ModelMetadata", name=model).inputs}

    def _call(self, verb: str, **fields: Any) -> Any:
        import grpc

        from narsil_stream.schemas.protobuf import SERVICE, message_class

        token = os.environ.get("TOKEN")
        metadata = [("authorization", f"Bearer {token}")] if token else []
        decode = message_class(f"{verb}Response").FromString
        call = self._channel.unary_unary(f"/{SERVICE.full_name}/{verb}", response_deserializer=decode)
        request = message_class(f"{verb}Request")(**fields).SerializeToString()
        try:
            return call(request, timeout=CONNECT_S, metadata=metadata)
        except grpc.RpcError as error:
            fault = next((fault for fault in Fault if fault.grpc == error.code().name), Fault.UNAVAILABLE)
            raise Refused(fault, error.details()) from None
