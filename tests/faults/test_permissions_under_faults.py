"""Processes that each have a key of their own: permissions must not stand in the way when one of them dies."""

import os
import signal
import subprocess
from contextlib import ExitStack
from pathlib import Path

from narsil_stream.core.broker_init import CONFIG, init
from narsil_stream.core.config import NatsConfig
from narsil_stream.core.permissions import ROLES
from tests.faults.serving import Serve
from tests.faults.traffic import Traffic
from tests.support import PATIENCE_S, NatsServer, narsil, plain_environ, until

MANY = 300
ERRORS = {"UNAVAILABLE", "DEADLINE_EXCEEDED", "OVERLOADED"}


def test_parts_with_their_own_keys_take_over_from_each_other(tmp_path: Path, criteo_model: Path, free_port: int):
    """Failover uses subjects that nothing else does; under permissions their loss would show only here."""
    users = {user.name: user for user in init(tmp_path / "nats", NatsConfig(), {role: role for role in ROLES})}
    with NatsServer("-c", str(tmp_path / "nats" / CONFIG)) as server, ExitStack() as stack:

        def start(role: str, label: str, *options: str) -> "subprocess.Popen[bytes]":
            log = tmp_path / f"{label}.log"
            environ = plain_environ(NARSIL_NATS_NKEY_SEED_FILE=str(users[role].seed_file), NARSIL_NATS_URL=server.url)
            with log.open("wb") as out:
                process = narsil(role, *options, env=environ, stdout=out, stderr=out, stdin=subprocess.DEVNULL)
            stack.callback(process.wait)
            stack.callback(process.kill)
            until(lambda: "is ready" in log.read_text(), f"{label} is ready")
            return process

        model = ("--model", str(criteo_model))
        executors = [start("executor", f"executor {i}", *model) for i in range(2)]
        batchers = [start("batcher", f"batcher {i}") for i in range(2)]
        gateway = start("gateway", "gateway", "--http-port", str(free_port))
        client = NatsConfig(url=server.url, nkey_seed_file=str(users["client"].seed_file))
        with Traffic(criteo_model, http=free_port, nats=client, callers=4) as traffic:
            for victim in (executors[0], batchers[0]):
                traffic.answered(MANY)
                victim.kill()
            traffic.answered(MANY)
            executors.append(start("executor", "executor 3", *model))
            executors[1].send_signal(signal.SIGTERM)
            assert executors[1].wait(PATIENCE_S) == 0
            traffic.answered(MANY)
        assert set(traffic.bad) <= ERRORS, traffic.ended
        gateway.send_signal(signal.SIGTERM)
        assert gateway.wait(PATIENCE_S) == 0
        assert "iolation" not in server.log, server.log


def test_the_supervisor_and_its_parts_share_a_key(tmp_path: Path, criteo_model: Path):
    """`narsil serve` beside a broker of somebody else's, and with all in one process."""
    users = {user.name: user for user in init(tmp_path / "nats", NatsConfig(), {role: role for role in ROLES})}
    with NatsServer("-c", str(tmp_path / "nats" / CONFIG)) as server:
        login = ("--nats-url", server.url, "--nats-nkey-seed-file", str(users["serve"].seed_file))
        with Serve(criteo_model, tmp_path, *login) as serve:
            with Traffic(criteo_model, http=serve.http_port, callers=4) as traffic:
                traffic.answered(MANY)
                (pid,) = serve.pids("batcher")
                os.kill(pid, signal.SIGKILL)
                with traffic.gentle():
                    until(lambda: serve.pids("batcher") not in ([], [pid]) and serve.health()["healthy"], "it is back")
                traffic.answered(MANY)
            assert "wrong" not in traffic.bad
            assert serve.interrupt() == 0
        with Serve(criteo_model, tmp_path, *login, "--mode", "inline") as serve:
            with Traffic(criteo_model, http=serve.http_port, callers=4) as traffic:
                traffic.answered(MANY)
            assert not traffic.bad
            assert serve.interrupt() == 0
        assert "iolation" not in server.log, server.log
