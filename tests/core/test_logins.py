"""Every way to log in at a real nats-server: what is let in, and what is said to who is not."""

import asyncio
import os
import re
import subprocess
import time
from pathlib import Path

import nkeys
import pytest

from narsil_stream.core.bus import Bus
from narsil_stream.core.config import ConfigError, NatsConfig, load
from narsil_stream.core.config.rules import FILES
from narsil_stream.schemas.errors import Fault, Refused
from tests import logins
from tests.support import PATIENCE_S, NatsServer, invoke, narsil, plain_environ

WAYS = logins.SECRETS | logins.TLS
TIMEOUT_S = 0.5


def answer(config: NatsConfig) -> bytes:
    """Of a request that one connection sends and another one answers, both made with `config`."""

    async def scene() -> bytes:
        asked, asking = Bus(config, "asked"), Bus(config, "asking")
        await asked.connect(TIMEOUT_S * 10)
        try:
            await asking.connect(TIMEOUT_S * 10)
            await asked.respond("question", lambda: b"answer")
            await asked.flush()
            return await asking.request("question", timeout=10)
        finally:
            await asking.close()
            await asked.close()

    return asyncio.run(scene())


def refusal(config: NatsConfig) -> Refused:
    """Of a connection that is not let in."""
    with pytest.raises(Refused) as refused:
        asyncio.run(Bus(config, "refused").connect(TIMEOUT_S))
    return refused.value


@pytest.mark.parametrize("way", WAYS)
def test_a_login_is_let_in(way: str, tmp_path: Path):
    """Each is an option of its own in nats-py, and easily lost on the way there."""
    login = WAYS[way](tmp_path)
    with NatsServer(*login.options(tmp_path)) as server:
        assert answer(NatsConfig(url=server.url, **login.good)) == b"answer"


@pytest.mark.parametrize(("way", "inbox"), [("nkey", r"\.U[A-Z2-7]{55}"), ("creds", r"\.U[A-Z2-7]{55}"), ("token", "")])
def test_answers_come_below_the_public_key_of_a_login_that_has_one(way: str, inbox: str, tmp_path: Path):
    """Only then can a broker keep others from listening to them."""

    async def scene() -> list[str]:
        bus = Bus(NatsConfig(url=server.url, **login.good), "test")
        await bus.connect(TIMEOUT_S * 10)
        asked: list[str] = []
        try:
            await bus.subscribe("question", lambda message: asked.append(message.reply))
            with pytest.raises(Refused):
                await bus.request("question", timeout=0.2)
            return [bus.new_inbox(), bus.new_inbox(), *asked]
        finally:
            await bus.close()

    login = WAYS[way](tmp_path)
    with NatsServer(*login.options(tmp_path)) as server:
        inboxes = asyncio.run(scene())
    assert len(set(inboxes)) == len(inboxes)
    assert all(re.fullmatch(rf"_INBOX\.narsil{inbox}\.\w{{16,}}[.\w]*", one) for one in inboxes), inboxes


@pytest.mark.parametrize("way", logins.SECRETS)
def test_a_wrong_login_is_told_from_a_missing_broker(way: str, tmp_path: Path):
    """One is mended with another login, the other with another address; neither shows the secret."""
    login = WAYS[way](tmp_path)
    with NatsServer(*login.options(tmp_path)) as server:
        for settings in (login.wrong, {}):
            refused = refusal(NatsConfig(url=server.url, **settings))
            assert refused.fault is Fault.UNAUTHENTICATED
            assert refused.detail.startswith(f"the NATS server at {server.url} refuses this login")
            assert not any(value in refused.detail for value in login.wrong.values())


def test_a_wrong_login_is_refused_at_once(tmp_path: Path):
    """Asking again for ten seconds only keeps an operator waiting for the reason."""
    login = logins.password(tmp_path)
    with NatsServer(*login.options(tmp_path)) as server:
        started = time.monotonic()
        with pytest.raises(Refused):
            asyncio.run(Bus(NatsConfig(url=server.url, **login.wrong), "refused").connect(PATIENCE_S))
        assert time.monotonic() - started < PATIENCE_S / 2


def test_a_login_that_one_server_refuses_is_let_in_by_another(tmp_path: Path):
    """Servers of a list may learn a new login one after the other."""
    login = logins.password(tmp_path)

    with NatsServer(*login.options(tmp_path)) as server, NatsServer() as other:
        for urls in (f"{server.url},{other.url}", f"{other.url}, {server.url}"):
            assert answer(NatsConfig(url=urls, **login.wrong)) == b"answer"


@pytest.mark.parametrize("way", logins.TLS)
def test_a_server_that_cannot_be_trusted_gets_no_login(way: str, tmp_path: Path):
    """It may be somebody else: the secret would be his."""
    login = WAYS[way](tmp_path)
    with NatsServer(*login.options(tmp_path)) as server:
        for settings in ({"tls_ca": f"{tmp_path}/other.pem"}, {}):
            refused = refusal(NatsConfig(url=server.url, user="u", password="p", **settings))
            assert refused.fault in (Fault.UNAVAILABLE, Fault.UNAUTHENTICATED)
            assert "certificate verify failed" in refused.detail and server.url in refused.detail


def test_a_server_that_wants_a_certificate_says_so(tmp_path: Path):
    """It just hangs up."""
    login = WAYS["mutual tls"](tmp_path)
    with NatsServer(*login.options(tmp_path)) as server:
        refused = refusal(NatsConfig(url=server.url, **login.wrong))
        assert refused.fault is Fault.UNAUTHENTICATED
        assert "wants to see a certificate (nats.tls_cert, nats.tls_key)" in refused.detail


@pytest.mark.parametrize("key", FILES)
def test_a_missing_file_is_refused_at_start(key: str, tmp_path: Path):
    """Otherwise the broker gets the blame, seconds later."""
    name, missing = key.removeprefix("nats."), str(tmp_path / "missing")
    pair = {"nats.tls_cert": os.devnull, "nats.tls_key": os.devnull} if key in ("nats.tls_cert", "nats.tls_key") else {}
    with pytest.raises(ConfigError) as refused:
        load(None, {}, {"nats.url": "nats://127.0.0.1:1", **pair, key: missing})
    flag = f"--nats-{name.replace('_', '-')}"
    assert (
        str(refused.value) == f'this file cannot be read (No such file or directory): {key} = "{missing}" (flag {flag})'
    )
    library = refusal(NatsConfig(url="nats://127.0.0.1:1", **{name: missing}))
    assert library.fault is Fault.INVALID_ARGUMENT
    assert library.detail == f"{key} {missing} cannot be used: No such file or directory"


@pytest.mark.parametrize("key", FILES)
def test_a_file_that_holds_something_else_is_named(key: str, tmp_path: Path):
    """An exception of some library's would name neither the setting nor the file."""
    login = (logins.mutual_tls if "tls" in key else logins.creds)(tmp_path)
    name, other = key.removeprefix("nats."), tmp_path / "other"
    other.write_text("something else\n")
    with NatsServer(*login.options(tmp_path)) as server:
        refused = refusal(NatsConfig(url=server.url, **(login.good | {"creds_file": ""} | {name: str(other)})))
    assert refused.fault is Fault.INVALID_ARGUMENT
    assert key in refused.detail and str(other) in refused.detail


def test_the_seed_of_another_kind_of_key_is_refused(tmp_path: Path):
    """An account's seed looks like a user's."""
    login = logins.nkey(tmp_path)
    path = tmp_path / "account.nk"
    path.write_bytes(logins.key_pair(nkeys.PREFIX_BYTE_ACCOUNT).seed)
    with NatsServer(*login.options(tmp_path)) as server:
        assert refusal(NatsConfig(url=server.url, nkey_seed_file=str(path))).fault is Fault.UNAUTHENTICATED


def test_each_process_ends_with_one_line_when_its_login_is_wrong(tmp_path: Path, criteo_model: Path):
    """Whatever starts it sees the status, and a person the reason."""
    login = logins.password(tmp_path)
    with NatsServer(*login.options(tmp_path)) as server:
        environ = plain_environ(**logins.environ(login.wrong), NARSIL_NATS_URL=server.url, NARSIL_LOG_LEVEL="warning")
        ports = ("--http-port", "0", "--grpc-port", "0", "--metrics-port", "0")
        commands = (("executor", "--model", criteo_model), ("batcher",), ("gateway", *ports))
        processes = [narsil(*command, env=environ, stdin=subprocess.DEVNULL) for command in commands]
        for process in processes:
            out, said = process.communicate(timeout=60)
            reason = f"the NATS server at {server.url} refuses this login: nats: 'Authorization Violation'"
            assert (process.returncode, out) == (1, b"")
            assert said.decode().splitlines() == [f"narsil: {reason}"]


@pytest.mark.parametrize("command", ["executor", "batcher", "gateway"])
def test_each_command_refuses_a_missing_file(command: str, tmp_path: Path):
    """Before it loads a model or listens."""
    missing = str(tmp_path / "missing")
    done = invoke(command, "--nats-url", "nats://127.0.0.1:1", "--nats-creds-file", missing)
    assert (done.exit_code, done.stdout) == (2, "")
    assert f'nats.creds_file = "{missing}" (flag --nats-creds-file)' in done.stderr
