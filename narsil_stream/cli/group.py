"""The top group and the table of its commands."""

import importlib
from collections.abc import Iterable
from typing import Any, NamedTuple

import rich_click as click

from narsil_stream import __version__


class Entry(NamedTuple):
    """One command: what `narsil --help` says of it, and where it is defined."""

    panel: str
    name: str
    target: str
    """module:attribute"""
    help: str


COMMANDS = (
    Entry("Run", "serve", "narsil_stream.cli.serve:serve", "Run the whole pipeline on this machine."),
    Entry("Run one part", "broker", "narsil_stream.cli.broker:broker", "Run a NATS broker."),
    Entry("Run one part", "gateway", "narsil_stream.cli.actors:gateway", "Run a gateway: HTTP, gRPC, or both."),
    Entry("Run one part", "batcher", "narsil_stream.cli.actors:batcher", "Run a batcher."),
    Entry("Run one part", "executor", "narsil_stream.cli.actors:executor", "Run an executor: it holds a model."),
    Entry("Use", "model", "narsil_stream.cli.model:model", "Make, inspect and check model artifacts."),
    Entry("Use", "score", "narsil_stream.cli.score:score", "Score rows of a file."),
    Entry("Use", "request", "narsil_stream.cli.request:request", "Send one request and print the answer."),
    Entry("Use", "client-example", "narsil_stream.cli.client_example:client_example", "Print a client to start from."),
    Entry("Use", "top", "narsil_stream.cli.top:top", "Watch the actors of a running system."),
    Entry("Use", "tune", "narsil_stream.cli.tune:tune", "Change limits of a running system."),
    Entry("Use", "token", "narsil_stream.cli.token:token", "Make a bearer token for the gateways."),
    Entry("Use", "bench", "narsil_stream.cli.bench:bench", "Measure how fast this machine computes."),
    Entry("Use", "simulate", "narsil_stream.cli.simulate:simulate", "Try the scheduler against seeded faults."),
    Entry("Use", "config", "narsil_stream.cli.config:config", "Show the effective configuration."),
)


class _Unloaded(click.RichCommand):
    """Stands for a command in the group's help until that command is called."""

    def __init__(self, entry: Entry) -> None:
        super().__init__(name=entry.name, help=entry.help, panel=entry.panel)
        self.target = entry.target

    def load(self) -> click.Command:
        module, _, attribute = self.target.partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command


class LazyGroup(click.RichGroup):
    """A group whose commands are imported when they are called, and listed in the order of `entries`."""

    def __init__(self, *args: Any, entries: Iterable[Entry] = (), **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        for entry in entries:
            self.add_command(_Unloaded(entry))

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name, command, rest = super().resolve_command(ctx, args)
        return name, command.load() if isinstance(command, _Unloaded) else command, rest


@click.group(cls=LazyGroup, entries=COMMANDS, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="narsil", message="%(prog)s %(version)s")
def cli() -> None:
    """Serve recommender models over NATS: requests coalesced by deadline, scored in one fused DLRM forward."""
