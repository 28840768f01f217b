"""What keeps less urgent work from starving: of the rows that are cut, a share goes to work that has aged. Pure."""


class Ageing:
    """Keeps account of that share in rows, over all models of a batcher; debts are one batch at most, savings two."""

    def __init__(self, share: float) -> None:
        self.share = share
        """From 0, which is strict priorities, to 1."""
        self._credit = 0.0

    @property
    def rows(self) -> float:
        """That aged work may take first now; the last of its tickets may exceed them."""
        return self._credit

    def earn(self, rows: int, aged_waits: bool) -> None:
        """A batch was cut. Nothing is saved up while nothing aged waits."""
        self._credit += self.share * rows
        if not aged_waits:
            self._credit = min(self._credit, 0.0)

    def spend(self, rows: float) -> None:
        """Aged work has gone before more urgent work."""
        self._credit -= rows
