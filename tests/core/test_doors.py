"""Ports that let in whoever reaches them are not opened by accident; files that cannot be used are told at start."""

from pathlib import Path

import pytest
import trustme

from narsil_stream.core import tokens
from narsil_stream.core.config import ConfigError, check_doors, load
from narsil_stream.core.config.doors import loopback
from narsil_stream.core.config.settings import settings
from tests.support import invoke

DOORS = ("http", "grpc", "metrics", "nats")
BEYOND = {
    "http": ("access.tokens_file", "access.tls_client_ca", "--insecure", "http.host = "),
    "grpc": ("access.tokens_file", "access.tls_client_ca", "--insecure", "grpc.host = "),
    "metrics": ("--insecure", "metrics.host = "),
    "nats": ("nats.user", "narsil broker --init", "--insecure", "nats.host = "),
}


def problem(flags: dict[str, object], *doors: str) -> str:
    """Why the doors are not opened, "" if they are."""
    try:
        check_doors(load(None, {}, flags), *doors)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    """What `access` needs, by the names of its settings."""
    authority = trustme.CA()
    server = authority.issue_cert("127.0.0.1")
    server.private_key_pem.write_to_path(tmp_path / "key.pem")
    for blob in server.cert_chain_pems:
        blob.write_to_path(tmp_path / "cert.pem", append=True)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    (tmp_path / "tokens").write_text(tokens.line(tokens.make(), frozenset({"infer"})) + "\n")
    names = {"tls_cert": "cert.pem", "tls_key": "key.pem", "tls_client_ca": "ca.pem", "tokens_file": "tokens"}
    return {f"access.{name}": str(tmp_path / file) for name, file in names.items()}


@pytest.mark.parametrize(
    ("host", "here"),
    [
        ("127.0.0.1", True), ("127.8.0.1", True), ("::1", True), ("localhost", True), ("LOCALHOST", True),
        ("0.0.0.0", False), ("::", False), ("10.0.0.1", False), ("localhost.example", False), ("127.1", False),
        ("gateway", False), ("2130706433", False),
    ],
)  # fmt: skip
def test_only_loopback_addresses_count_as_this_machine(host: str, here: bool):
    """What is not surely loopback is open to others."""
    assert loopback(host) is here


@pytest.mark.parametrize("door", DOORS)
def test_a_door_to_other_machines_stays_shut_and_says_what_opens_it(door: str):
    """The rule that would have kept thousands of model servers off search engines."""
    flags: dict[str, object] = {f"{door}.host": "0.0.0.0"}
    for words in BEYOND[door]:
        assert words in problem(flags, *DOORS)
    assert problem(flags | {"insecure": "true"}, *DOORS) == ""
    assert problem(flags, *(set(DOORS) - {door})) == "", "this command does not open it"
    assert problem({f"{door}.host": "localhost"}, *DOORS) == ""


@pytest.mark.parametrize("door", ["http", "grpc"])
def test_a_gateway_s_door_opens_for_tokens_or_client_certificates(door: str, files: dict[str, str]):
    """A certificate of the server's own says nothing of who calls."""
    flags: dict[str, object] = {f"{door}.host": "0.0.0.0"}
    tls = {key: files[key] for key in ("access.tls_cert", "access.tls_key")}
    assert "whoever reaches" in problem(flags | tls, door)
    assert problem(flags | tls | {"access.tls_client_ca": files["access.tls_client_ca"]}, door) == ""
    assert problem(flags | {"access.tokens_file": files["access.tokens_file"]}, door) == ""
    both = flags | files | {"metrics.host": "0.0.0.0"}
    assert "metrics.host" in problem(both, door, "metrics"), "the metrics check nobody"


@pytest.mark.parametrize("login", [{"nats.user": "u", "nats.password": "p"}, {"nats.token": "t"}])
def test_our_own_broker_s_door_opens_with_a_login(login: dict[str, object]):
    """With a broker elsewhere the address is not listened on."""
    flags: dict[str, object] = {"nats.host": "0.0.0.0"}
    assert problem(flags | login, "nats") == ""
    assert problem(flags | {"nats.url": "nats://elsewhere"}, "nats") == ""


@pytest.mark.parametrize("name", ["tls_cert", "tls_key", "tls_client_ca", "tokens_file"])
@pytest.mark.parametrize(("broken", "told"), [(None, "No such file"), ("something else", "= ")])
def test_a_file_that_cannot_be_used_is_told_at_start_by_its_setting(
    name: str, broken: str | None, told: str, files: dict[str, str], tmp_path: Path
):
    """Otherwise every handshake fails, and the caller gets the blame."""
    path = tmp_path / "broken"
    if broken is not None:
        path.write_text(broken)
    flags = files | {f"access.{name}": str(path)}
    for door in ("http", "grpc"):
        message = problem(dict(flags), door)
        assert f'access.{name} = "{path}"' in message and told in message
    assert problem(dict(flags), "metrics", "nats") == "", "this command does not read it"


def test_a_key_that_does_not_fit_its_certificate_is_told(files: dict[str, str], tmp_path: Path):
    """One of them was renewed, the other not."""
    trustme.CA().issue_cert("127.0.0.1").private_key_pem.write_to_path(tmp_path / "key.pem")
    message = problem(dict(files), "http")
    assert "access.tls_cert" in message and "access.tls_key" in message and "KEY_VALUES_MISMATCH" in message


def test_an_empty_file_of_tokens_is_told(files: dict[str, str], tmp_path: Path):
    """Nobody could call, and everybody would look for the mistake at the caller."""
    (tmp_path / "tokens").write_text("# none yet\n")
    assert "holds no token" in problem(dict(files), "http")


@pytest.mark.parametrize("alone", ["tls_cert", "tls_key", "tls_client_ca"])
def test_half_a_pair_is_refused(alone: str, files: dict[str, str]):
    """It would be passed over, and the door open without TLS."""
    message = problem({f"access.{alone}": files[f"access.{alone}"]})
    assert "needs" in message and f"access.{alone}" in message


COMMANDS = {
    "serve": DOORS,
    "gateway": ("http", "grpc", "metrics"),
    "batcher": ("metrics",),
    "executor": ("metrics",),
    "broker": ("nats",),
}


@pytest.mark.parametrize(
    ("command", "door"), [(command, door) for command, doors in COMMANDS.items() for door in doors]
)
def test_each_command_refuses_before_it_does_anything(command: str, door: str):
    """Status 2 and one line: whatever started it need not try again."""
    done = invoke(command, f"--{door}-host", "0.0.0.0")
    assert (done.exit_code, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("narsil: beyond this machine") and f"{door}.host" in line


def test_variables_for_other_parts_do_not_stop_a_batcher():
    """One file of variables for all parts is how people deploy."""
    environ = {"NARSIL_HTTP_HOST": "0.0.0.0", "NARSIL_ACCESS_TOKENS_FILE": "/only/on/gateways"}
    loaded = load(None, environ, {})
    check_doors(loaded, "metrics")
    with pytest.raises(ConfigError):
        check_doors(loaded, "http")


def test_insecure_is_a_flag_and_a_variable():
    """Both ways, so that a flag can overrule the variable."""
    setting = settings()["insecure"]
    assert (setting.flag, setting.variable) == ("--insecure", "NARSIL_INSECURE")
    assert "insecure = true  # flag --insecure" in invoke("config", "--insecure").stdout
    assert "insecure = false  # flag" in invoke("config", "--no-insecure", NARSIL_INSECURE="true").stdout
    refused = invoke("config", NARSIL_INSECURE="yes")
    assert refused.exit_code == 2 and "expected true or false" in refused.stderr
