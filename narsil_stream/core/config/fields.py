"""Types and marks that settings share."""

from typing import Annotated

from msgspec import Meta

Port = Annotated[int, Meta(ge=0, le=65_535)]
Host = Annotated[str, Meta(min_length=1)]
Count = Annotated[int, Meta(ge=1, le=256)]
Processes = Annotated[int, Meta(ge=0, le=256)]

MIB = 1024 * 1024
PATH = {"path": True}
SECRET = {"secret": True}
LIVE = {"live": True}
"""May change while an actor runs: `narsil tune`."""
