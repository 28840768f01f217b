"""What `narsil client-example` prints is run as it is, as a process, against a real system."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from narsil_stream.cli.client_example import DEMO, KINDS
from narsil_stream.core import tokens
from narsil_stream.core.config import Config, NatsConfig
from narsil_stream.kernels.artifact import read_spec
from tests import logins
from tests.certificates import Files
from tests.support import PATIENCE_S, NatsServer, System, expected, invoke, plain_environ

DOORS = tuple(kind for kind in KINDS if kind != "nats")


def addresses(system: System) -> list[str]:
    ports = {"--http-port": system.http_port, "--grpc-port": system.grpc_port, "--nats-url": system.url}
    return [str(word) for flag, port in ports.items() for word in (flag, port)]


def printed(kind: str, *options: str, **variables: str) -> tuple[str, str]:
    """The program, and what is told beside it."""
    done = invoke("client-example", kind, *options, **variables)
    assert done.exit_code == 0, done.output
    return done.stdout, done.stderr


def run(kind: str, program: str, **variables: str) -> subprocess.CompletedProcess[str]:
    if kind == "curl" and shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    command = ["sh"] if kind == "curl" else [sys.executable, "-"]
    return subprocess.run(
        command, input=program, env=plain_environ(**variables), capture_output=True, text=True, timeout=PATIENCE_S
    )


def scores(kind: str, program: str, **variables: str) -> list[float]:
    done = run(kind, program, **variables)
    assert done.returncode == 0, done.stderr
    if kind == "curl":
        found: list[float] = json.loads(done.stdout)["outputs"][0]["data"]
        return found
    return [float(score) for score in re.findall(r"^row \d: ([0-9.]+)$", done.stdout, re.MULTILINE)]


def right(model: Path, ids_known: bool) -> list[float]:
    """Scores of the two rows that the programs ask for. Ids are 0 where the server does not tell what a table holds."""
    spec = read_spec(model)
    row = np.arange(2)[:, None]
    dense = np.round(0.1 * (np.arange(spec.n_dense) + row), 1).astype(np.float32)
    ids = (7 * np.arange(spec.n_sparse) + 1 + row) % [table.rows for table in spec.tables]
    return pytest.approx(expected(model, dense, (ids * ids_known).astype(np.int32)).tolist(), abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_program_scores_rows_of_the_model_that_is_served(kind: str, demo_system: System, demo_model: Path):
    """It is the first program that a team runs, and the one that it builds on."""
    program, told = printed(kind, *addresses(demo_system))
    assert told == ""
    assert scores(kind, program) == right(demo_model, ids_known=kind == "nats")


@pytest.fixture(scope="module")
def two_models(demo_model: Path, criteo_model: Path) -> Iterator[System]:
    with NatsServer() as server, System(server.url, demo_model, criteo_model, gateways=1, grpc_gateways=1) as system:
        yield system


@pytest.mark.parametrize("kind", KINDS)
def test_of_several_models_one_is_named(kind: str, two_models: System, criteo_model: Path):
    """A program for whichever came first would be for the wrong one half of the time."""
    refused = invoke("client-example", kind, *addresses(two_models))
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert "ctr, dlrm" in refused.stderr and "--model" in refused.stderr
    program, _ = printed(kind, *addresses(two_models), "--model", "ctr")
    assert scores(kind, program) == right(criteo_model, ids_known=kind == "nats")


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_server_the_program_is_for_the_demo_model(
    kind: str, free_port: int, demo_system: System, demo_model: Path
):
    """People write the client first, and start the server then."""
    nowhere = {"grpc": "--grpc-port", "nats": "--nats-port"}.get(kind, "--http-port")
    program, told = printed(kind, nowhere, str(free_port))
    assert "demo model" in told
    there = {"grpc": demo_system.grpc_port, "nats": demo_system.url.rpartition(":")[2]}.get(kind, demo_system.http_port)
    assert scores(kind, program.replace(str(free_port), str(there))) == right(demo_model, ids_known=True)


def test_the_demo_model_is_the_one_that_is_made(demo_model: Path):
    """Its shape is written down in the command, which must not load what makes models."""
    spec = read_spec(demo_model)
    assert (spec.name, spec.n_dense, tuple(table.rows for table in spec.tables)) == DEMO


@pytest.fixture(scope="module", params=[False, True], ids=["tls", "mutual tls"])
def guarded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, demo_model: Path
) -> Iterator[tuple[System, dict[str, str], list[str]]]:
    """A system that asks for a token, in TLS; the variables that a caller sets, and the flags of who serves it."""
    folder = tmp_path_factory.mktemp("guarded")
    files, token = Files(folder), tokens.make()
    (folder / "tokens").write_text(tokens.line(token, frozenset({"infer"})) + "\n")
    (folder / "tokens").chmod(0o600)
    access = replace(files.settings(mutual=request.param), tokens_file=str(folder / "tokens"))
    variables = {"TOKEN": token, "SSL_CERT_FILE": str(folder / "ca.pem")}
    if request.param:
        variables |= dict.fromkeys(("CLIENT_CERT", "CLIENT_KEY"), str(folder / "client.pem"))
    with (
        NatsServer() as server,
        System(server.url, demo_model, config=Config(access=access), gateways=1, grpc_gateways=1) as system,
    ):
        settings = {f"--access-{name.replace('_', '-')}": getattr(access, name) for name in access.__struct_fields__}
        flags = [word for flag, value in settings.items() if value for word in (flag, value)]
        yield system, variables, [*addresses(system), *flags]


@pytest.mark.parametrize("kind", DOORS)
def test_tls_and_tokens_are_in_the_program_and_secrets_are_not(
    kind: str, guarded: tuple[System, dict[str, str], list[str]], demo_model: Path
):
    """The first 401 must not be how people learn of tokens; and programs end up in repositories."""
    _, variables, flags = guarded
    program, told = printed(kind, *flags, **variables)
    assert told == ""
    assert not any(value in program for value in variables.values())
    assert scores(kind, program, **variables) == right(demo_model, ids_known=False)
    wrong = run(kind, program, **variables | {"TOKEN": "narsil_wrong"})
    assert "this token is not known" in wrong.stdout + wrong.stderr


@pytest.mark.parametrize("kind", DOORS)
def test_a_token_that_only_the_server_knows_of_is_told(
    kind: str, tmp_path: Path, nats_server: NatsServer, demo_model: Path
):
    """Who calls from elsewhere has none of the server's settings."""
    token = tokens.make()
    (tmp_path / "tokens").write_text(tokens.line(token, frozenset({"infer"})) + "\n")
    access = replace(Config().access, tokens_file=str(tmp_path / "tokens"))
    config = Config(access=access)
    with System(nats_server.url, demo_model, config=config, gateways=1, grpc_gateways=1) as system:
        program, told = printed(kind, *addresses(system))
        assert "asks for a token" in told
        assert scores(kind, program, TOKEN=token) == right(demo_model, ids_known=True)


@pytest.mark.parametrize("kind", ["password", "nkey", "mutual tls", "role"])
def test_the_program_for_nats_logs_in(kind: str, tmp_path: Path, demo_model: Path):
    """With what `narsil` itself logs in with, from the same variables."""
    ways = logins.SECRETS | logins.TLS | {"password": logins.password, "role": logins.role}
    login = ways[kind](tmp_path)
    variables = logins.environ(login.good)
    with (
        NatsServer(*login.options(tmp_path)) as server,
        System(server.url, demo_model, config=Config(nats=NatsConfig(**login.good))),
    ):
        program, told = printed("nats", "--nats-url", server.url, **variables)
        assert "demo model" not in told and ("password" not in login.good or login.good["password"] not in program)
        assert scores("nats", program, **variables) == right(demo_model, ids_known=True)


def test_names_that_are_none_are_refused():
    """They would become code, and a path."""
    done = invoke("client-example", "curl", "--model", "'; rm -rf /; '")
    assert (done.exit_code, done.stdout) == (2, "")
