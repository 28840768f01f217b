"""TCP ports: free ones found, taken ones named together with the setting that chose them."""

import contextlib
import errno
import random
import socket
from collections.abc import Iterator
from pathlib import Path

from narsil_stream.core.config.settings import settings


class PortTaken(Exception):
    """Says which port, which setting chose it, and how to choose another."""

    def __init__(self, host: str, port: int, key: str, reason: str) -> None:
        setting = settings()[key]
        super().__init__(
            f"port {port} on {host} cannot be used for {key}: {reason}."
            f" Choose another one with {setting.flag} PORT or {setting.variable}=PORT, or stop what uses it."
        )


@contextlib.contextmanager
def reserve(host: str, port: int, key: str, *, share: bool = False) -> Iterator[int]:
    """A port that is kept from others inside the block, while a server is started on it with SO_REUSEPORT; 0 finds one.

    `share`: it may be in use already, by processes that share it. Raises `PortTaken`.
    """
    family = _family(host, port, key)
    if port and not share:
        with socket.socket(family, socket.SOCK_STREAM) as alone:
            alone.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            _bind(alone, host, port, key)
    with socket.socket(family, socket.SOCK_STREAM) as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        _bind(held, host, port, key)
        yield held.getsockname()[1]


def address(host: str, port: int) -> str:
    """host:port, as it stands in a URL."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def free_port(host: str, port: int, key: str) -> int:
    """`port` if nobody uses it, or a free one for 0. Raises `PortTaken`.

    For a server that starts later, or again: a free one is sought where the system takes none for outgoing
    connections, or any connection made meanwhile could get it.
    """
    ports = [port] if port else random.sample(_quiet_ports(), 50)
    for candidate in ports[:-1]:
        with contextlib.suppress(PortTaken), reserve(host, candidate, key) as found:
            return found
    with reserve(host, ports[-1], key) as found:
        return found


def _quiet_ports() -> range:
    """Ports that an ordinary user may listen on, and that the system does not give to outgoing connections."""
    try:
        low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except (OSError, ValueError, IndexError):
        low = 32_768
    return range(10_000, low) if low > 11_000 else range(1_024, 65_536)


def _family(host: str, port: int, key: str) -> int:
    try:
        return socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    except (OSError, UnicodeError) as error:  # UnicodeError: a label that is too long
        raise PortTaken(host, port, key, str(getattr(error, "strerror", None) or error)) from None


def _bind(sock: socket.socket, host: str, port: int, key: str) -> None:
    try:
        sock.bind((host, port))
    except OSError as error:
        reason = "something listens there already" if error.errno == errno.EADDRINUSE else str(error.strerror or error)
        raise PortTaken(host, port, key, reason) from None
