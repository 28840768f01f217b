"""TCP ports: free ones found, taken ones named together with the setting that chose them."""

import contextlib
import errno
import socket
from collections.abc import Iterator

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
    """`port` if nobody uses it, or a free one for 0. Raises `PortTaken`."""
    with reserve(host, port, key) as found:
        return found


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
