"""What commands share that ask a running system: which model is meant, what an error means for the person who asked."""

import asyncio

import rich_click as click

from narsil_stream.core import logs
from narsil_stream.core.client import Client
from narsil_stream.core.config import Loaded
from narsil_stream.core.config.sources import DEFAULT
from narsil_stream.schemas.errors import Fault, Refused
from narsil_stream.schemas.internal import ModelCard

CONNECT_S = 3.0
"""How long a command waits for a broker, and then for somebody who serves a model."""
SETTLE_S = 0.5
"""How long a model may take to be heard of: a system of many parts does not answer at once."""

NEXT: dict[Fault, str] = {
    Fault.INVALID_ARGUMENT: "compare the request with the output of `narsil request --example`",
    Fault.UNAUTHENTICATED: "check the login: --nats-user, --nats-token, --nats-nkey-seed-file or --nats-creds-file",
    Fault.PERMISSION_DENIED: "this login may not do that; ask who runs the broker",
    Fault.NOT_FOUND: "choose a served model with --model and --model-version",
    Fault.TOO_LARGE: "send fewer rows in one request",
    Fault.OVERLOADED: "try again later, send less at a time, or add executors",
    Fault.CANCELLED: "send the request again",
    Fault.INTERNAL: "the executor's log says more",
    Fault.UNIMPLEMENTED: "the serving side is older than this command; update it",
    Fault.UNAVAILABLE: "start the pipeline with `narsil serve`, or name its broker with --nats-url",
    Fault.DEADLINE_EXCEEDED: "give the request a larger time budget, or the system less work",
}
"""What to do about each error."""


def say(text: str) -> None:
    """To the person, on stderr."""
    for line in text.splitlines():
        click.echo(f"narsil: {line}", err=True)


def told(refused: Refused) -> str:
    """The error and the next step, in two lines."""
    when = f" (retry after {refused.retry_after_us / 1e3:g} ms)" if refused.retry_after_us else ""
    return f"{refused.fault.name}: {refused.detail}{when}\n{NEXT[refused.fault]}"


def setup_logs(loaded: Loaded, command: str) -> None:
    """Unless somebody asks for more, a command that is used by hand logs only what went wrong."""
    level = "warning" if loaded.source("log_level") == DEFAULT else loaded.config.log_level
    logs.setup(level, loaded.config.log_format, command)


async def described(client: Client, model: str, version: str) -> ModelCard:
    """The description of a served model; without a name that of the only one. Raises `Refused`."""
    names = await _served(client, model)
    if not names:
        raise Refused(Fault.UNAVAILABLE, "the broker is there, but nothing serves a model on it")
    if not model and len(names) > 1:
        raise Refused(Fault.NOT_FOUND, f"several models are served, which one is meant? {', '.join(names)}")
    if model and model not in names:
        raise Refused(Fault.NOT_FOUND, f"model '{model}' is not served here; served: {', '.join(names)}")
    return await client.describe(model or names[0], version)


async def _served(client: Client, model: str) -> list[str]:
    """The names of what is served, once `model` is among them or has had its time."""
    names: set[str] = set()
    try:
        async with asyncio.timeout(SETTLE_S):
            while not names or (model and model not in names):
                names = {ref.name for ref in client.models()}
                await asyncio.sleep(0.01)
    except TimeoutError:
        pass
    return sorted(names)
