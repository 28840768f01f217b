"""`narsil serve`: the whole pipeline on this machine."""

import sys
from typing import TYPE_CHECKING

import rich_click as click
import uvloop

from narsil_stream.cli.examples import examples, login_variables
from narsil_stream.cli.options import config_options
from narsil_stream.core import logs
from narsil_stream.core.config import Loaded
from narsil_stream.core.ports import PortTaken, address
from narsil_stream.schemas import subjects
from narsil_stream.schemas.internal import ModelCard

if TYPE_CHECKING:
    from narsil_stream.actors.supervisor import Supervisor


@click.command()
@config_options(doors=("http", "grpc", "metrics", "nats"))
def serve(loaded: Loaded) -> None:
    """Run the whole pipeline on this machine: broker, HTTP and gRPC gateway, batcher, executor, each a process.

    Without a model or a repository of models a demo model called dlrm is made and served. Ctrl-C drains: what was
    accepted is answered first.

    Examples: narsil serve; narsil serve --model models/ctr --http-port 9000; narsil serve --mode inline
    """
    from narsil_stream.actors.supervisor import StartFailed, Supervisor
    from narsil_stream.cli.actors import repository, with_demo_model
    from narsil_stream.kernels.artifact import ArtifactError

    config = loaded.config
    logs.setup(config.log_level, config.log_format, "serve")
    try:
        config = with_demo_model(config)
        repository(config).at_start(config.loaded_names if config.model_control == "explicit" else None)
        code = uvloop.run(Supervisor(config, show).run())
    except (ArtifactError, PortTaken, StartFailed, OSError) as error:
        raise click.ClickException(str(error)) from None
    sys.exit(code)


def show(supervisor: "Supervisor", cards: list[ModelCard]) -> None:
    """The table of what runs, and what to try."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    config = supervisor.config
    console = Console(stderr=False, soft_wrap=True)
    table = Table(title="narsil-stream is ready", title_justify="left", title_style="bold green")
    for column in ("what", "where", "process"):
        table.add_column(column)
    for row in supervisor.health()["actors"]:
        where = f"{subjects.INFER}.> in NATS" if row["kind"] == "batcher" else row["detail"]
        table.add_row(row["kind"], escape(where), f"{row['process']}, pid {row['pid']}")
    for card in cards:
        spec = card.spec
        inputs = f"dense [rows, {spec.n_dense}], sparse [rows, {spec.n_sparse}]"
        compute = f"{card.backend} backend, {card.precision}, on {card.device}"
        table.add_row("model", escape(f"{spec.name} version {spec.version}: {inputs}"), escape(compute))
        table.add_row("subject", subjects.infer(spec.name), "any NATS client may publish here")
    table.add_row(
        "metrics", escape(f"http://{address(config.metrics.host, config.metrics.port)}/metrics"), "health at /health"
    )
    console.print(table)
    if cards:
        console.print("\nTry, from another terminal; `narsil client-example http` prints a whole program:\n")
        if variables := login_variables(config):
            there = "The broker wants a login: in that terminal, first set"
            console.print(f"{there} {', '.join(variables)} to what they are here.\n", highlight=False)
        for command in examples(config, cards[0]):
            console.print(command + "\n", highlight=False, markup=False, emoji=False)
    console.print("Ctrl-C stops it: what was accepted is answered first.")
