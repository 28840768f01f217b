"""`narsil broker`: the nats-server of this package, or a configuration for it."""

import os
import shlex
from pathlib import Path

import rich_click as click

from narsil_stream.cli.options import config_options, fail
from narsil_stream.core.config import ConfigError, Loaded, NatsConfig, check_doors
from narsil_stream.core.ports import PortTaken, address

FOLDER = click.Path(file_okay=False, path_type=Path)


@click.command()
@click.option(
    "--init",
    "new",
    type=FOLDER,
    metavar="FOLDER",
    help="Write a configuration of nats-server into FOLDER: an nkey for each role, which may do its part alone.",
)
@click.option(
    "--user",
    "more",
    multiple=True,
    metavar="NAME=ROLE",
    help="With --init: one more user with that role, e.g. billing=producer. Users cannot read each other's answers.",
)
@click.option("--from", "ready", type=FOLDER, metavar="FOLDER", help="Run with the configuration that --init wrote.")
@config_options(
    "nats.host",
    "nats.port",
    "nats.user",
    "nats.password",
    "nats.token",
    "nats.max_payload_bytes",
    "data_dir",
    "insecure",
)
def broker(loaded: Loaded, new: Path | None, more: tuple[str, ...], ready: Path | None) -> None:
    """Run a NATS broker: the nats-server binary that is installed with this package, with fitting limits.

    Examples: narsil broker; narsil broker --init nats --nats-host 0.0.0.0; narsil broker --from nats
    """
    if new is not None and ready is not None:
        fail("--init writes a configuration, --from runs one: give one of them")
    if more and new is None:
        fail("--user goes with --init")
    if new is not None:
        _init(new, loaded.config.nats, more)
    else:
        _run(_configured(ready) if ready is not None else _command(loaded))


def _command(loaded: Loaded) -> list[str]:
    from narsil_stream.core import broker as own

    try:
        check_doors(loaded, "nats")
        return own.command(loaded.config.data_dir, own.resolve(loaded.config.nats))
    except ConfigError as error:
        fail(str(error))
    except (PortTaken, OSError) as error:
        raise click.ClickException(str(error)) from None


def _configured(folder: Path) -> list[str]:
    from narsil_stream.core.broker import binary
    from narsil_stream.core.broker_init import CONFIG

    path = folder / CONFIG
    if not path.exists():
        fail(f"there is no {path}: `narsil broker --init {shlex.quote(str(folder))}` writes one")
    try:
        return [binary(), "--config", str(path)]
    except OSError as error:
        raise click.ClickException(str(error)) from None


def _run(command: list[str]) -> None:
    from narsil_stream.core import broker as own

    os.execve(command[0], command, own.environment())  # signals, logs and the exit status are nats-server's own


def _init(folder: Path, nats: NatsConfig, more: tuple[str, ...]) -> None:
    from narsil_stream.core.broker_init import CONFIG, init
    from narsil_stream.core.permissions import ROLES

    if not nats.port:
        fail("nats.port = 0: a configuration needs a port that is named")
    users = {role: role for role in ROLES}
    for given in more:
        name, _, role = given.partition("=")
        if name in users:
            fail(f"--user {given}: there is a user {name} already")
        users[name] = role
    try:
        made = init(folder, nats, users)
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from None
    where = shlex.quote(f"nats://{address(nats.host, nats.port)}")
    seeds = {user.name: f"NARSIL_NATS_NKEY_SEED_FILE={shlex.quote(str(user.seed_file))}" for user in made}
    producer = next(user for user in made if user.name == "producer")
    lines = [
        f"Wrote {folder / CONFIG}, and a seed for each user. A seed is a secret: give it to nobody but its user.",
        "",
        f"narsil broker --from {shlex.quote(str(folder))}",
        *(f"{seeds[part]} narsil {part} --nats-url {where}" for part in ("executor", "batcher", "gateway")),
        "",
        "or all three, watched:",
        f"{seeds['serve']} narsil serve --nats-url {where}",
        "",
        "Callers:",
        f"{seeds['client']} narsil request --example --nats-url {where} > one-row.json",
        f"{seeds['producer']} narsil request one-row.json --model dlrm --nats-url {where}",
        f"nats --server {where} --nkey {shlex.quote(str(producer.seed_file))} --inbox-prefix {producer.inbox}"
        ' req narsil.v1.infer.dlrm "$(cat one-row.json)"',
    ]
    click.echo("\n".join(lines))
