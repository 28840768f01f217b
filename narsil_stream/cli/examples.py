"""Requests to try, as commands for a shell and as inputs of a model's shape. None shows a secret."""

import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from narsil_stream.core.config import Config
from narsil_stream.core.config.settings import settings, without_login
from narsil_stream.core.ports import address
from narsil_stream.schemas import subjects
from narsil_stream.schemas.internal import ModelCard

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
    url = broker_url(config)
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
    inputs = example_inputs(card.spec.n_dense, [table.rows for table in card.spec.tables], 1)
    return json.dumps({"inputs": inputs}, separators=(",", ":"))


def example_inputs(n_dense: int, tables: Sequence[int], rows: int) -> list[dict[str, Any]]:
    """Rows as an Open Inference Protocol request has them. `tables`: the number of rows of each."""
    dense = [round(0.1 * (i + row), 1) for row in range(rows) for i in range(n_dense)]
    sparse = [(7 * i + 1 + row) % size for row in range(rows) for i, size in enumerate(tables)]
    return [
        {"name": "dense", "datatype": "FP32", "shape": [rows, n_dense], "data": dense},
        {"name": "sparse", "datatype": "INT64", "shape": [rows, len(tables)], "data": sparse},
    ]


def broker_url(config: Config) -> str:
    return config.nats.url or f"nats://{address(config.nats.host, config.nats.port)}"


def _raw_nats(config: Config, url: str, subject: str, body: str) -> str:
    """With NATS's own command line if it is installed and needs no login, else with nats-py, which is."""
    variables = login_variables(config)
    if shutil.which("nats") and not variables:
        return f"nats --server {shlex.quote(url)} req {subject} '{body}'"
    lines = [
        "import asyncio, nats, os, ssl" if variables else "import asyncio, nats",
        *tls_lines(config),
        "async def main():",
        f"    async with await nats.connect({connect_arguments(config)}) as nc:",
        f"""        answer = await nc.request("{subject}", b'{body}')""",
        "        print(answer.data.decode())",
        "asyncio.run(main())",
    ]
    return "\n".join([f"{_python()} - <<'END'", *lines, "END"])


def connect_arguments(config: Config) -> str:
    """Arguments of `nats.connect`, in Python. What it takes from `tls_lines` is called tls."""
    servers = json.dumps([one.strip() for one in broker_url(config).split(",")])
    if _login_in_url(config):
        servers = 'os.environ["NARSIL_NATS_URL"].split(",")'
    return ", ".join([servers, *_login(config)])


def tls_lines(config: Config) -> list[str]:
    """Lines of Python that make the variable `tls`; none without files for TLS."""
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
    return [*login, "tls=tls"] if tls_lines(config) else login


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
