"""narsil-stream: recommender requests over NATS, coalesced by deadline, scored in one forward pass."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["BlockingClient", "Client", "Fault", "Refused", "__version__"]

if TYPE_CHECKING:
    from narsil_stream.core.client import BlockingClient, Client
    from narsil_stream.schemas.errors import Fault, Refused

_HOMES = {
    "Client": "narsil_stream.core.client",
    "BlockingClient": "narsil_stream.core.client",
    "Fault": "narsil_stream.schemas.errors",
    "Refused": "narsil_stream.schemas.errors",
}


def __getattr__(name: str) -> Any:
    """Loaded on first use, so that `narsil --help` does not wait for NumPy."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
