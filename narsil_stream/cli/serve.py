"""`narsil serve`: the whole pipeline on this machine."""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import rich_click as click
import uvloop
from msgspec.structs import replace

from narsil_stream.cli.options import config_options
from narsil_stream.core import logs
from narsil_stream.core.config import Config, Loaded
from narsil_stream.core.ports import PortTaken
from narsil_stream.schemas import subjects
from narsil_stream.schemas.internal import ModelCard

if TYPE_CHECKING:
    from narsil_stream.actors.supervisor import Supervisor


@click.command()
@config_options()
def serve(loaded: Loaded) -> None:
    """Run the whole pipeline on this machine: broker, HTTP gateway, batcher, executor, each a process that is watched.

    Without `--model` a demo model called dlrm is made and served. Ctrl-C drains: what was accepted is answered first.

    Examples: narsil serve; narsil serve --model models/ctr --http-port 9000; narsil serve --mode inline
    """
    from narsil_stream.actors.supervisor import StartFailed, Supervisor
    from narsil_stream.cli.actors import demo_model
    from narsil_stream.kernels.artifact import ArtifactError, read_spec

    config = loaded.config
    logs.setup(config.log_level, config.log_format, "serve")
    try:
        config = replace(config, model=config.model or str(demo_model(config)))
        read_spec(Path(config.model))
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
    table.add_row("metrics", f"http://{config.metrics.host}:{config.metrics.port}/metrics", "health at /health")
    console.print(table)
    if cards:
        console.print("\nTry, from another terminal:\n")
        for command in examples(config, cards[0]):
            console.print(command + "\n", highlight=False, markup=False)
    console.print("Ctrl-C stops it: what was accepted is answered first.")


def examples(config: Config, card: ModelCard) -> list[str]:
    """Three ways to ask for one row's score, to copy into a shell."""
    body, name = example_request(card), card.spec.name
    url = config.nats.url or f"nats://{config.nats.host}:{config.nats.port}"
    narsil = _from_here(Path(sys.executable).parent / "narsil")
    flag = "" if url == "nats://127.0.0.1:4222" else f" --nats-url {url}"
    return [
        f"curl -s http://{config.http.host}:{config.http.port}/v2/models/{name}/infer -d '{body}'",
        f"{narsil} request{flag} --model {name} - <<< '{body}'",
        _raw_nats(url, subjects.infer(name), body),
    ]


def example_request(card: ModelCard) -> str:
    """One row as an Open Inference Protocol request."""
    spec = card.spec
    dense = [round(0.1 * i, 1) for i in range(spec.n_dense)]
    sparse = [(7 * i + 1) % table.rows for i, table in enumerate(spec.tables)]
    inputs = [
        {"name": "dense", "datatype": "FP32", "shape": [1, spec.n_dense], "data": dense},
        {"name": "sparse", "datatype": "INT64", "shape": [1, spec.n_sparse], "data": sparse},
    ]
    return json.dumps({"inputs": inputs}, separators=(",", ":"))


def _raw_nats(url: str, subject: str, body: str) -> str:
    """With NATS's own command line if it is installed, else with nats-py, which is."""
    if shutil.which("nats"):
        return f"nats --server {url} req {subject} '{body}'"
    python = _from_here(Path(sys.executable))
    return f"""{python} - <<'END'
import asyncio, nats
async def main():
    async with await nats.connect("{url}") as nc:
        answer = await nc.request("{subject}", b'{body}')
        print(answer.data.decode())
asyncio.run(main())
END"""


def _from_here(path: Path) -> str:
    """As one would type it in this folder."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
