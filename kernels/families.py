"""Which compute families there are, and which one a machine should use."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from narsil_stream.kernels.backend import Backend


class Choice(NamedTuple):
    name: str
    load: Callable[[Path], Backend]
    reason: str
    """For logs: why this one."""


def choose(wanted: str) -> Choice:
    """`wanted` is a family's name or "auto". Raises ValueError for a name that does not exist."""
    if wanted not in ("auto", "reference"):
        raise ValueError(f"no backend is called {wanted!r}; there are: auto, reference")
    from narsil_stream.kernels import reference

    reason = "as configured" if wanted == "reference" else "the only family here"
    return Choice("reference", reference.load, reason)
