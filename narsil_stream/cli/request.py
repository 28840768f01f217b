"""`narsil request`: one request in JSON, as any NATS client would send it."""

import asyncio
import functools
import re
import sys
from typing import BinaryIO

import msgspec
import rich_click as click
import uvloop
from nats.aio.msg import Msg

from narsil_stream.cli.asking import CONNECT_S, described, say, setup_logs, told
from narsil_stream.cli.examples import example_request
from narsil_stream.cli.options import config_options, fail
from narsil_stream.core.bus import Bus
from narsil_stream.core.client import Client
from narsil_stream.core.config import Loaded, NatsConfig
from narsil_stream.schemas import codec, subjects
from narsil_stream.schemas.errors import Fault, Refused
from narsil_stream.schemas.internal import ModelCard
from narsil_stream.schemas.model import NAME

SCORED, FAILED = 0, 1
NO_RESPONDERS = "503"

option = functools.partial(click.option, panel="Request")


@click.command()
@click.argument("file", metavar="[FILE]", type=click.File("rb"), required=False)
@option("--model", default="", metavar="NAME", help="Model to ask. Default: the only one that is served.")
@option("--model-version", "version", default="", metavar="VERSION", help="Its version. Default: the newest.")
@option(
    "--timeout-ms",
    type=click.IntRange(1, 600_000),
    default=5_000,
    show_default=True,
    help="How long to wait for the answer. The request's own budget is in it: parameters.timeout, in µs.",
)
@option("--example", is_flag=True, help="Print a request that the model can answer, instead of sending one.")
@option("--raw", is_flag=True, help="Print the bytes as they came; that is also what a pipe gets.")
@config_options("nats")
def request(
    loaded: Loaded, file: BinaryIO | None, model: str, version: str, timeout_ms: int, example: bool, raw: bool
) -> None:
    """Send one request in JSON to a model and print the answer. FILE is - for standard input, also if it is missing.

    The request is the Open Inference Protocol's. It is published on narsil.v1.infer.MODEL, as any NATS client could.

    Exit status: 0 scores; 1 an error, with the reason and the next step on stderr; 2 wrong usage or configuration.

    Examples: narsil request --example | narsil request; narsil request --model dlrm rows.json
    """
    setup_logs(loaded, "request")
    if any(name and not NAME.fullmatch(name) for name in (model, version)):
        fail(f"names of models and versions match {NAME.pattern}")
    nats = loaded.config.nats
    try:
        if example:
            if file is not None:
                fail("--example sends nothing: leave FILE out")
            _show(example_request(uvloop.run(_describe(nats, model, version))).encode(), raw)
            raise SystemExit(SCORED)
        payload = _read(file)
        model = model or uvloop.run(_describe(nats, model, version)).spec.name
        answer = uvloop.run(_ask(nats, subjects.infer(model, version), payload, timeout_ms / 1e3))
        raise SystemExit(_tell(answer, raw))
    except Refused as refused:
        say(told(refused))
        raise SystemExit(FAILED) from None


def _read(file: BinaryIO | None) -> bytes:
    if file is None and sys.stdin.isatty():
        fail("give a FILE, or a request on standard input; `narsil request --example` prints one")
    return (file or sys.stdin.buffer).read()


async def _describe(nats: NatsConfig, model: str, version: str) -> ModelCard:
    async with Client(nats, connect_timeout_s=CONNECT_S) as client:
        return await described(client, model, version)


async def _ask(nats: NatsConfig, subject: str, payload: bytes, timeout_s: float) -> bytes:
    """Publish with an inbox of our own and wait for what comes there. Raises `Refused`."""
    bus = Bus(nats, "narsil-request")
    await bus.connect(CONNECT_S)
    answered: asyncio.Future[Msg] = asyncio.get_running_loop().create_future()
    inbox = bus.new_inbox()
    try:
        await bus.subscribe(inbox, lambda message: None if answered.done() else answered.set_result(message))
        bus.publish(subject, payload, reply=inbox)
        message = await asyncio.wait_for(answered, timeout_s)
    except TimeoutError:
        detail = f"no answer on {subject} within {timeout_s:g} s (--timeout-ms)"
        raise Refused(Fault.DEADLINE_EXCEEDED, detail) from None
    finally:
        await bus.close()
    if (message.headers or {}).get("Status") == NO_RESPONDERS:
        raise Refused(Fault.UNAVAILABLE, f"the broker is there, but nobody listens on {subject}")
    return bytes(message.data)


def _tell(payload: bytes, raw: bool) -> int:
    """Print the answer. Returns the exit status."""
    try:
        answer = codec.decode_answer(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise Refused(Fault.INTERNAL, f"what came is not an answer of version 1: {payload[:200]!r}") from None
    if codec.spelling_of(payload) is codec.Spelling.MSGPACK and not raw:
        payload = codec.encode_answer(answer, codec.Spelling.JSON)
    _show(payload, raw)
    if not answer.fault:
        return SCORED
    say(told(codec.refusal(answer)))
    return FAILED


def _show(payload: bytes, raw: bool) -> None:
    click.echo(payload if raw or not sys.stdout.isatty() else pretty(payload))


def pretty(payload: bytes) -> bytes:
    """JSON for people: indented, lists of numbers on one line each."""
    indented = msgspec.json.format(payload, indent=2)
    return re.sub(rb'\[\n([^]["{}]*)\]', lambda found: b"[" + b" ".join(found[1].split()) + b"]", indented)
