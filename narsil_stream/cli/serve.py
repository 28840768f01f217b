"""`narsil serve`: the whole pipeline on this machine."""

import json
import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import rich_click as click
import uvloop

from narsil_stream.cli.options import config_options
from narsil_stream.core import logs
from narsil_stream.core.config import Config, Loaded
from narsil_stream.core.config.settings import settings, without_login
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
        console.print("\nTry, from another terminal:\n")
        if variables := login_variables(config):
            there = "The broker wants a login: in that terminal, first set"
            console.print(f"{there} {', '.join(variables)} to what they are here.\n", highlight=False)
        for command in examples(config, cards[0]):
            console.print(command + "\n", highlight=False, markup=False, emoji=False)
    console.print("Ctrl-C stops it: what was accepted is answered first.")


LOGIN = ("user", "password", "token", "nkey_seed_file", "creds_file", "tls_ca", "tls_cert", "tls_key")
"""Settings of `nats` that every client of the broker needs as well."""


def login_variables(config: Config) -> list[str]:
    """The variables that a client needs to be let in: no command shows what is in them."""
    keys = [f"nats.{name}" for name in LOGIN if getattr(config.nats, name)]
    if _login_in_url(config):
        keys.append("nats.url")
    return [settings()[key].variable for key in keys]


def _login_in_url(config: Config) -> bool:
    return without_login(config.nats.url) != config.nats.url


def examples(config: Config, card: ModelCard) -> list[str]:
    """Three ways to ask for one row's score (two without an HTTP gateway), to copy into any shell.

    See `login_variables`.
    """
    body, name = example_request(card), card.spec.name
    url = config.nats.url or f"nats://{address(config.nats.host, config.nats.port)}"
    known = _login_in_url(config) or url == "nats://127.0.0.1:4222"
    flag = "" if known else f" --nats-url {shlex.quote(url)}"
    scheme = "https" if config.access.tls_cert else "http"
    http = shlex.quote(f"{scheme}://{address(config.http.host, config.http.port)}/v2/models/{name}/infer")
    token = ' -H "authorization: Bearer $TOKEN"' if config.access.tokens_file else ""
    return [
        *([f"curl -s{token} {http} -d '{body}'"] if config.http.processes else []),
        f"printf '%s' '{body}' | {_narsil()} request{flag} --model {name}",
        _raw_nats(config, url, subjects.infer(name), body),
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


def _raw_nats(config: Config, url: str, subject: str, body: str) -> str:
    """With NATS's own command line if it is installed and needs no login, else with nats-py, which is."""
    variables = login_variables(config)
    if shutil.which("nats") and not variables:
        return f"nats --server {shlex.quote(url)} req {subject} '{body}'"
    servers = json.dumps([one.strip() for one in url.split(",")])
    if _login_in_url(config):
        servers = 'os.environ["NARSIL_NATS_URL"].split(",")'
    lines = [
        "import asyncio, nats, os, ssl" if variables else "import asyncio, nats",
        *_tls(config),
        "async def main():",
        f"    async with await nats.connect({', '.join([servers, *_login(config)])}) as nc:",
        f"""        answer = await nc.request("{subject}", b'{body}')""",
        "        print(answer.data.decode())",
        "asyncio.run(main())",
    ]
    return "\n".join([f"{_python()} - <<'END'", *lines, "END"])


def _tls(config: Config) -> list[str]:
    """Lines of Python that make the variable `tls`."""
    nats, lines = config.nats, []
    if nats.tls_ca or nats.tls_cert:
        authorities = 'cafile=os.environ["NARSIL_NATS_TLS_CA"]' if nats.tls_ca else ""
        lines.append(f"tls = ssl.create_default_context({authorities})")
    if nats.tls_cert:
        lines.append('tls.load_cert_chain(os.environ["NARSIL_NATS_TLS_CERT"], os.environ["NARSIL_NATS_TLS_KEY"])')
    return lines


def _login(config: Config) -> list[str]:
    """Arguments of nats-py."""
    names = {
        "user": "user",
        "password": "password",
        "token": "token",
        "nkey_seed_file": "nkeys_seed",
        "creds_file": "user_credentials",
    }
    given = {name: argument for name, argument in names.items() if getattr(config.nats, name)}
    login = [f'{argument}=os.environ["{settings()[f"nats.{name}"].variable}"]' for name, argument in given.items()]
    if seed := config.nats.nkey_seed_file:
        login.append(f'inbox_prefix="{subjects.inbox(_public(seed))}"')
    return [*login, "tls=tls"] if _tls(config) else login


def _public(seed_file: str) -> str:
    """The public nkey of a seed: a broker may keep other inboxes from this user."""
    import nkeys

    return str(nkeys.from_seed(bytearray(Path(seed_file).read_bytes().strip())).public_key.decode())


def _narsil() -> str:
    beside = Path(sys.executable).parent / "narsil"
    return _whole(beside) if beside.exists() else f"{_python()} -m narsil_stream"


def _python() -> str:
    return _whole(Path(sys.executable))


def _whole(path: Path) -> str:
    """For a shell in whatever folder. Not resolved: the virtual environment's python is a link."""
    return shlex.quote(os.path.abspath(path))  # noqa: PTH100 Path.resolve would follow the link
