"""Through documents, of which more than one is tested."""

from collections.abc import Iterator
from typing import Any


def walk(value: Any) -> Iterator[dict[str, Any]]:
    """All objects in a JSON value."""
    if isinstance(value, dict):
        yield value
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from walk(item)
