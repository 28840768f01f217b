"""`make fuzz`: every target for FUZZ_SECONDS each, 60 by default. Words on the command line choose among them.

What is found is made as small as possible, shown, and kept in .hypothesis, so that `make test` tries it again.
"""

import os
import secrets
import sys
import time
import traceback

from hypothesis import HealthCheck, Phase, given, seed, settings

from tests.fuzz.attack import attack
from tests.fuzz.targets import TARGETS, Target

ROUND = 500
"""Inputs that are made of one seed."""


class Progress:
    """A target's line."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._started = self._shown = time.monotonic()
        self.inputs = self.read = 0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._started

    def count(self, read: bool) -> None:
        self.inputs += 1
        self.read += read
        if sys.stderr.isatty() and time.monotonic() - self._shown > 0.5:
            self._shown = time.monotonic()
            print(f"\r{self}", end="", file=sys.stderr, flush=True)

    def end(self, found: bool) -> None:
        if sys.stderr.isatty():
            print("\r", end="", file=sys.stderr)
        print(f"{self}, {'FOUND SOMETHING' if found else 'nothing found'}", flush=True)

    def __str__(self) -> str:
        rate = self.inputs / max(self.seconds, 1e-9)
        counts = f"{self.inputs:>9,} inputs ({rate:,.0f}/s), {self.read:,} of them read"
        return f"{self._name:<24} {self.seconds:5.0f} s {counts}"


def fuzz(name: str, target: Target, seconds: float) -> bool:
    """Whether nothing was found."""
    progress = Progress(name)
    every = settings(
        max_examples=ROUND, deadline=None, suppress_health_check=list(HealthCheck), print_blob=True,
        phases=[Phase.reuse, Phase.generate, Phase.target, Phase.shrink],
    )  # fmt: skip

    def whatever_comes(given: object) -> None:
        progress.count(attack(target, given))

    def what_is_valid(value: object) -> None:
        assert target.again(value) == value
        progress.count(True)

    while progress.seconds < seconds:
        for strategy, test in ((target.hostile, whatever_comes), (target.valid, what_is_valid)):
            test.__qualname__ = f"{test.__name__} at {name}"
            try:
                seed(secrets.randbits(64))(every(given(strategy)(test)))()
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                progress.end(found=True)
                traceback.print_exception(error)
                return False
    progress.end(found=False)
    return True


def main(words: list[str]) -> int:
    chosen = [name for name in TARGETS if not words or any(word.lower() in name.lower() for word in words)]
    if not chosen:
        print(f"no target is called so; there are: {', '.join(TARGETS)}", file=sys.stderr)
        return 2
    seconds = float(os.environ.get("FUZZ_SECONDS") or 60)
    print(f"{len(chosen)} targets, {seconds:g} s each", flush=True)
    clean = [fuzz(name, TARGETS[name], seconds) for name in chosen]
    return 0 if all(clean) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
