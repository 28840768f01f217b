"""Who shares a batcher's queue, and how much of it each may fill. Pure."""

from collections.abc import Mapping

MOST = 64
"""Tenants that are told apart; when all of them have work waiting, those beyond share one place."""
BEYOND = "(others)"
KEPT_FREE = 8
"""One part in so many of the queue is for tenants that have less than their share, once there are several."""


class Tenants:
    """`weights`: by name; 1 for who is not named there."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.weights = weights
        self.waiting: dict[str, list[float]] = {}
        """Rows and bytes that wait, by tenant; who came last stands last."""

    def known_as(self, name: str) -> str:
        """The name that a tenant goes by here. Makes room for a new one by forgetting the one that was away longest."""
        waiting = self.waiting
        if name in waiting:
            if len(waiting) > 1:
                waiting[name] = waiting.pop(name)
            return name
        if len(waiting) >= MOST:
            idle = next((known for known, held in waiting.items() if not held[0]), None)
            if idle is None:
                waiting.setdefault(BEYOND, [0, 0])
                return BEYOND
            del waiting[idle]
        waiting[name] = [0, 0]
        return name

    def weight(self, name: str) -> float:
        return self.weights.get(name, 1.0)

    def add(self, name: str, rows: int, size: int) -> None:
        held = self.waiting.get(name)
        if held is None:
            held = self.waiting[name] = [0, 0]
        held[0] += rows
        held[1] += size

    def remove(self, name: str, rows: int, size: int) -> None:
        held = self.waiting[name]
        held[0] -= rows
        held[1] -= size

    def share(self, name: str) -> float:
        """Of the queue, from 0 to 1."""
        if len(self.waiting) <= 1:
            return 1.0
        return self.weight(name) / sum(map(self.weight, self.waiting))

    def crowds(self, name: str, filled: float, held: float) -> bool:
        """Whether a tenant that would hold the part `held` of the queue, which would then be `filled`, takes what is
        kept for the others."""
        return len(self.waiting) > 1 and filled > 1 - 1 / KEPT_FREE and held > self.share(name)
