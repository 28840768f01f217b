"""What `narsil serve` prints to try: each command works when pasted into a plain shell, and none shows a secret."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import logins
from tests.faults.serving import Serve
from tests.support import PATIENCE_S, NatsServer, plain_environ

OWN = {
    "no login": {},
    "password": {"user": "bob", "password": "$h'u\"nter2é"},
    "token": {"token": "hunter2"},
}


def printed(serve: Serve) -> tuple[str, list[str]]:
    """What stands above the commands, and the commands."""
    text = serve.log.read_text().partition("Try, from another terminal")[2].partition("\nCtrl-C stops it")[0]
    first = text.index("curl ")
    return text[:first], text[first:].strip().split("\n\n")


def score(command: str, **variables: str) -> list[float]:
    """Of the answer that a command prints."""
    done = subprocess.run(
        ["sh", "-c", command], env=plain_environ(**variables), capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, (command, done.stderr)
    scores: list[float] = json.loads(done.stdout)["outputs"][0]["data"]
    return scores


def check(serve: Serve, settings: dict[str, str], variables: dict[str, str]) -> None:
    """All commands give the same score, where `variables` are set; `settings` hold what must not be shown."""
    above, commands = printed(serve)
    shown = serve.log.read_text()
    assert all(name in above for name in variables) and ("login" in above) == bool(variables)
    assert not any(value in shown for name, value in settings.items() if name in ("password", "token"))
    curl, *others = commands
    assert len(others) == 2
    scores = [score(command, **variables) for command in others]
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed: the other two commands work")
    assert [score(curl), *scores] == [scores[0]] * 3 and len(scores[0]) == 1


@pytest.mark.parametrize("kind", OWN)
def test_the_commands_work_on_our_own_broker(kind: str, tmp_path: Path, criteo_model: Path):
    """They are the first that a new user tries."""
    with Serve(criteo_model, tmp_path, "--grpc-processes", "1", *flags(OWN[kind])) as serve:
        check(serve, OWN[kind], logins.environ(OWN[kind]))


@pytest.mark.parametrize("kind", ["nkey", "creds", "tls", "mutual tls", "role"])
def test_the_commands_work_on_a_broker_with_a_login(kind: str, tmp_path: Path, criteo_model: Path):
    """Each way to log in is an option of its own for nats-py."""
    login = (logins.SECRETS | logins.TLS | {"role": logins.role})[kind](tmp_path)
    with (
        NatsServer(*login.options(tmp_path)) as server,
        Serve(criteo_model, tmp_path, "--nats-url", server.url, *flags(login.good)) as serve,
    ):
        check(serve, {}, logins.environ(login.good))


def test_a_login_in_the_address_is_not_shown(tmp_path: Path, criteo_model: Path):
    """Terminals are recorded, pasted into tickets and looked at over shoulders."""
    with NatsServer(*logins.password(tmp_path).options(tmp_path)) as server:
        url = server.url.replace("//", "//bob:hunter2@")
        with Serve(criteo_model, tmp_path, "--nats-url", f"{url}, {url}") as serve:
            check(serve, {"password": "hunter2"}, {"NARSIL_NATS_URL": f"{url}, {url}"})


def flags(settings: dict[str, str]) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--nats-{name.replace('_', '-')}", value)]
