"""The paths of the HTTP gateway: which verb is where."""

from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from granian.rsgi import HTTPProtocol, Scope

Headers = list[tuple[str, str]]


class Reply(NamedTuple):
    status: int
    body: bytes
    headers: Headers


class Call(NamedTuple):
    """One request to a verb. `model` and `version` come from the path, "" where it names none."""

    scope: Scope
    proto: HTTPProtocol
    model: str = ""
    version: str = ""
    who: str = ""
    """Whose token it came with; "" where none is needed."""


Handler = Callable[[Any, Call], Awaitable[Reply]]


class Route(NamedTuple):
    method: str
    path: str
    """{model} and {version} stand for a name each."""
    verb: str
    """As `inference.GRPCInferenceService` calls it: what a caller may do is decided by it, the same on every door."""
    handler: Handler


class _Node:
    """What may follow one beginning of a path."""

    def __init__(self) -> None:
        self.below: dict[str, _Node] = {}
        self.named: _Node | None = None
        """Where any other segment leads: it is a name."""
        self.routes: dict[str, Route] = {}
        """Of paths that end here, by method."""


class Router:
    """Finds a path's routes by its segments; what is written out wins over {model} and {version}."""

    def __init__(self, routes: tuple[Route, ...]) -> None:
        self._root = _Node()
        for route in routes:
            node = self._root
            for segment in route.path.strip("/").split("/"):
                if segment.startswith("{"):
                    node.named = node = node.named or _Node()
                else:
                    node = node.below.setdefault(segment, _Node())
            node.routes[route.method] = route

    def find(self, path: str) -> tuple[dict[str, Route], list[str]]:
        """By method, and the names in the path: model, then version. No routes: there is no such path."""
        names: list[str] = []
        node = self._root
        for segment in path.strip("/").split("/"):
            below = node.below.get(segment)
            if below is None:
                if (below := node.named) is None:
                    return {}, []
                names.append(segment)
            node = below
        return node.routes, names
