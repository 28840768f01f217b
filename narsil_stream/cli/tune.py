"""`narsil tune`: live settings of a running system."""

import asyncio
import contextlib
import functools

import msgspec
import rich_click as click
import uvloop
from nats.aio.msg import Msg
from rich.console import Console
from rich.table import Table

from narsil_stream.cli.asking import CONNECT_S, say, setup_logs, told
from narsil_stream.cli.options import config_options, fail
from narsil_stream.core.actor import unix_us
from narsil_stream.core.bus import Bus
from narsil_stream.core.config import Config, ConfigError, Loaded, NatsConfig, changed
from narsil_stream.core.tuning import SOURCE
from narsil_stream.schemas import subjects
from narsil_stream.schemas.errors import Fault, Refused
from narsil_stream.schemas.internal import Tune, Tuned

ANSWER_S = 2.0
"""For the first answer; the others come with it, or in this time after it:"""
OTHERS_S = 0.3

option = functools.partial(click.option, panel="Change")
_decode = msgspec.json.Decoder(Tuned).decode


@click.command()
@click.argument("changes", metavar="[KEY=VALUE]...", nargs=-1)
@option("--reset", multiple=True, metavar="KEY", help='Go back to what was configured; "all": for every setting.')
@option("--json", "as_json", is_flag=True, help="Print the answers of all processes as one JSON array.")
@config_options("nats")
def tune(loaded: Loaded, changes: tuple[str, ...], reset: tuple[str, ...], as_json: bool) -> None:
    """Change limits of a running system, without a restart; without KEY=VALUE show those that can be changed.

    All batchers and gateways take the change at once, and so does every one that starts later, as long as one that
    knows of it runs. To keep a change for good, put it into the configuration too. On a broker with logins this takes
    the login of an administrator.

    Exit status: 0 if all took it; 1 if one refused, or nobody was there; 2 wrong usage.

    \b
    Examples:
      narsil tune                                   what can be changed, and its values now
      narsil tune batch.queue_rows=20000 batch.linger_us=200
      narsil tune --reset all
    """
    setup_logs(loaded, "tune")
    values = _parsed(changes)
    nats = loaded.config.nats
    try:
        answers = uvloop.run(_tell(nats, Tune(values, reset, unix_us() if values or reset else 0)))
    except Refused as refused:
        say(told(refused))
        raise SystemExit(1) from None
    if as_json:
        click.echo(msgspec.json.encode(answers).decode())
    else:
        _print(answers)
    refusals = [answer for answer in answers if answer.fault]
    for answer in refusals:
        say(f"{', '.join(answer.actors)}: {answer.fault}: {answer.detail}")
    raise SystemExit(bool(refusals))


def _parsed(changes: tuple[str, ...]) -> dict[str, str | int | float | bool]:
    """Checked here as far as it goes without knowing what is configured there."""
    pairs = [change.partition("=") for change in changes]
    if wrong := [key for key, equals, _ in pairs if not equals]:
        fail(f"expected KEY=VALUE, and not {' '.join(wrong)}; Next: narsil tune shows the keys")
    values: dict[str, str | int | float | bool] = {key.strip(): value.strip() for key, _, value in pairs}
    for key, value in values.items():
        with contextlib.suppress(_RulesOnly):
            _check(key, value)
    return values


class _RulesOnly(Exception):
    """It breaks a rule between settings, which may hold with those that are configured there."""


def _check(key: str, value: object) -> None:
    try:
        changed(Config(), {key: value}, SOURCE)
    except ConfigError as error:
        if "expected" in str(error) or key in str(error).partition(" (")[0]:
            fail(str(error))
        raise _RulesOnly from None


async def _tell(nats: NatsConfig, tune: Tune) -> list[Tuned]:
    """The answers of all processes. Raises `Refused` if there is none."""
    bus, answers, heard = Bus(nats, "narsil-tune"), list[Tuned](), asyncio.Event()

    def on_answer(message: Msg) -> None:
        answers.append(_decode(message.data))
        heard.set()

    await bus.connect(CONNECT_S)
    try:
        inbox = bus.new_inbox()
        await bus.subscribe(inbox, on_answer)
        bus.publish(subjects.TUNE, msgspec.json.encode(tune), inbox)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(ANSWER_S):
                await heard.wait()
        if answers:
            await asyncio.sleep(OTHERS_S)
    finally:
        await bus.close()
    if not answers:
        detail = f"the broker at {bus.where} is there, but nobody on it answered, or this login may not tune"
        raise Refused(Fault.UNAVAILABLE, detail)
    return sorted(answers, key=lambda answer: answer.actors)


def _print(answers: list[Tuned]) -> None:
    """One row for each setting; its values, if processes differ, and whose they are."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("setting", "value", "changed"):
        table.add_column(name, justify="right" if name == "value" else "left", no_wrap=name != "changed")
    for key in answers[0].values:
        held: dict[object, list[str]] = {}
        for answer in answers:
            held.setdefault(answer.values.get(key), []).extend(answer.actors)
        live = any(key in answer.set for answer in answers)
        for value, actors in held.items():
            whose = f"only on {', '.join(actors)}" if len(held) > 1 else "live" * live
            table.add_row(key, str(value), whose)
    Console().print(table)
    who = [actor for answer in answers for actor in answer.actors]
    click.echo(f"{len(who)} actors answered: {', '.join(who)}")
