"""Our own broker, a real nats-server: any login reaches it, any address works, its configuration does not linger."""

import asyncio
import os
import re
import signal
import socket
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from msgspec.structs import replace

from narsil_stream.core import broker
from narsil_stream.core.bus import Bus
from narsil_stream.core.config import ConfigError, NatsConfig, load
from narsil_stream.schemas.errors import Fault, Refused
from tests.faults.serving import Serve
from tests.support import PATIENCE_S, narsil, plain_environ, until

CONTROL = "".join(map(chr, [*range(1, 32), 127]))
AWKWARD = [
    "pässwörd €🔑",
    "q\"u'o`te",
    r"a\x41\u0041\n\\",
    "$PATH",
    "$2y$",
    CONTROL,
    "# {x}, ;",
    "123",
    "true",
    " x\u2028",
]


def ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6) as sock:
            sock.bind(("::1", 0))
    except OSError:
        return False
    return True


needs_ipv6 = pytest.mark.skipif(not ipv6(), reason="this machine has no IPv6 loopback")


@contextmanager
def own_broker(folder: Path, config: NatsConfig) -> Iterator[NatsConfig]:
    """It runs inside the block; gives where."""
    config = broker.resolve(replace(config, port=0))
    with subprocess.Popen(broker.command(str(folder), config), stderr=subprocess.PIPE) as process:
        try:
            up = asyncio.run(broker.wait_listening(config.host, config.port, PATIENCE_S))
            assert up, process.stderr and process.stderr.read()
            yield config
        finally:
            process.kill()


def connect(config: NatsConfig) -> None:
    async def scene() -> None:
        bus = Bus(config, "test")
        await bus.connect(0.5)
        await bus.close()

    asyncio.run(scene())


@pytest.mark.parametrize("secret", AWKWARD)
def test_a_login_arrives_as_it_was_given(secret: str, tmp_path: Path):
    """A generated password holds anything, and its owner would look for the mistake elsewhere."""
    for login in (NatsConfig(user=f"ü{secret}", password=secret), NatsConfig(token=secret)):
        with own_broker(tmp_path, login) as config:
            connect(config)
            with pytest.raises(Refused) as refused:
                connect(replace(config, user="", password="", token=""))
            assert refused.value.fault is Fault.UNAUTHENTICATED


@needs_ipv6
def test_an_ipv6_address_stands_in_brackets(tmp_path: Path):
    """nats-server dies of one without."""
    with own_broker(tmp_path, NatsConfig(host="::1")) as config:
        assert Bus(config, "test").where == f"nats://[::1]:{config.port}"
        connect(config)


def test_a_password_that_the_broker_takes_for_a_hash_is_refused():
    """Nobody could log in, and the message would be about a wrong password."""
    for flags in ({"nats.token": "$2a$11$x"}, {"nats.user": "u", "nats.password": "$2b$04$"}):
        with pytest.raises(ConfigError, match="bcrypt"):
            load(None, {}, flags)
        load(None, {}, flags | {"nats.url": "nats://elsewhere"})


def configurations(folder: Path) -> list[Path]:
    return [path for path in (folder / "broker").glob("*") if path.suffix != ".log"]


def test_a_broker_s_configuration_is_deleted_by_the_next_one(tmp_path: Path):
    """`narsil broker` becomes nats-server, which deletes nothing; files with passwords would pile up."""

    def start() -> subprocess.Popen[bytes]:
        environ = plain_environ(NARSIL_NATS_USER="u", NARSIL_NATS_PASSWORD="secret")
        return narsil("broker", "--nats-port", "0", "--data-dir", tmp_path, env=environ, stderr=subprocess.DEVNULL)

    def new(known: list[Path]) -> Path:
        def ready() -> Path | None:
            found = [path for path in configurations(tmp_path) if path not in known and path.suffix == ".conf"]
            return found[0] if found and listens(found[0]) else None

        return Path(until(ready, "the broker listens"))

    def listens(path: Path) -> bool:
        with socket.socket() as sock:
            return sock.connect_ex(("127.0.0.1", int(re.findall(r"\d+", path.name)[0]))) == 0

    with start() as first, start() as second:
        try:
            one = new([])
            two = new([one])
            assert "secret" in one.read_text()
            assert stat.S_IMODE(one.stat().st_mode) == 0o600
        finally:
            first.kill()
            second.kill()
    with start() as third:
        try:
            three = new([one, two])
            assert configurations(tmp_path) == [three]
            with start() as fourth:
                try:
                    four = new([three])
                    assert sorted(configurations(tmp_path)) == sorted([three, four]), "the third still runs"
                finally:
                    fourth.kill()
        finally:
            third.kill()


@pytest.mark.parametrize("host", ["127.0.0.1", pytest.param("::1", marks=needs_ipv6)])
def test_serve_keeps_the_configuration_for_restarts_and_no_longer(host: str, tmp_path: Path, criteo_model: Path):
    """A broker that crashed is started with it again; afterwards a file with the password is of no use to anybody."""
    with Serve(criteo_model, tmp_path, "--nats-host", host, "--nats-user", "u", "--nats-password", "$é") as serve:
        (path,) = configurations(tmp_path)
        port = int(re.findall(r"\d+", path.name)[0])
        assert serve.nats_url == (f"nats://{host}:{port}" if host == "127.0.0.1" else f"nats://[{host}]:{port}")
        login = NatsConfig(url=serve.nats_url, user="u", password="$é")
        connect(login)
        (pid,) = serve.pids("broker")
        os.kill(pid, signal.SIGKILL)
        until(lambda: serve.pids("broker") not in ([], [pid]) and serve.health()["healthy"], "the broker is back")
        connect(login)
        assert serve.interrupt() == 0
    assert configurations(tmp_path) == []


def test_what_the_broker_of_narsil_serve_says_is_kept_beside_its_models(criteo_model: Path, tmp_path: Path) -> None:
    """Nobody reads its messages on a terminal; without a file, nothing tells why a broker ended."""
    with Serve(criteo_model, tmp_path) as serve:
        port = serve.nats_url.rpartition(":")[2]
        assert "Server is ready" in (tmp_path / "broker" / f"nats-server-{port}.log").read_text()
