"""Tunes the row cap and the linger of batches to a latency target. Pure: measurements and the time go in; times in µs.

Above the target, the row cap goes to the largest batch that passes at nearly the best rate. On a device whose time
grows in proportion beside a fixed part this is the configured maximum, and no smaller cap makes anybody faster; on one
that slows down beyond some size it is that size. Far below it, executors at work get a linger: fuller batches.
"""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from narsil_stream.actors.service_time import TRUSTED, Curve

WINDOW_US = 200_000
ENOUGH = 200
"""Answers that a p99 is taken from; a window lasts until it has so many, but no longer than this:"""
LONGEST_US = 2_000_000
ROOM = 0.7
"""Of the target: above it a linger goes down."""
SHARE = 0.5
"""Of the target: a linger grows only below it."""
STEP = 0.75
"""From one size that is considered as a cap to the next smaller one; the cap is halved or doubled at most."""
NEARLY = 1.05
"""Times the best time for a row is nearly the best."""
GRAIN = 2
"""Sizes are told apart in steps of a quarter of their power of two: a step of the cap has to show."""
RELEARN_US = 60_000_000
"""What was measured of a size that is not used any more may have changed: so often it is found out anew."""
BUSY = 0.3
"""Executors that work less of the time gain nothing from fewer, fuller batches."""
CALM, CALMEST = 2, 32
"""Windows in a row that must agree before a step; doubled whenever a step takes back the one before."""


class Spread:
    """Counts of durations in steps of a sixteenth, for quantiles that are right to 6 %."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, us: int, times: int = 1) -> None:
        shift = max(0, us.bit_length() - 5)
        self._counts[(shift << 4) + (us >> shift)] += times

    def quantile(self, share: float) -> int:
        """The upper end of the step that it lies in; 0: nothing was added."""
        total = self._counts.total()
        left = total - int(share * total)
        for step in sorted(self._counts, reverse=True):
            left -= self._counts[step]
            if left <= 0:
                shift = max(0, (step >> 4) - 1)
                return ((step - (shift << 4) + 1) << shift) - 1
        return 0


class Step(NamedTuple):
    """One change: of `cap` or `linger`, `up` or `down`."""

    knob: str
    direction: str
    why: str


class Window:
    """What was measured since the last adjustment."""

    def __init__(self, start_us: int) -> None:
        self.start_us = start_us
        self.total, self.wait, self.service = Spread(), Spread(), Spread()
        self.answers = self.batches = self.bound = self.rows = self.busy_us = 0


class Controller:
    """`cap_rows` and `linger_us` are to be used now. Without a target they stay as configured."""

    def __init__(self, slo_us: int, max_rows: int, linger_us: int) -> None:
        self.slo_us, self.max_rows, self.least_linger_us = slo_us, max_rows, linger_us
        self.cap_rows, self.linger_us = max_rows, linger_us
        self.p99_us = self.wait_p99_us = self.service_p99_us = 0
        """Of the last window."""
        self.steps: list[Step] = []
        """Taken since somebody looked; who looks clears it."""
        self._curve = Curve(GRAIN)
        self._learnt_us = 0
        self._window: Window | None = None
        self._wish = self._last = ("", "")
        self._agreed = 0
        self._calm = CALM
        self._probes = self._usual_rows = 0

    def follow(self, slo_us: int, max_rows: int, linger_us: int) -> None:
        """The configuration, which may have changed: then both knobs start from there."""
        if (slo_us, max_rows, linger_us) != (self.slo_us, self.max_rows, self.least_linger_us):
            self.slo_us, self.max_rows, self.least_linger_us = slo_us, max_rows, linger_us
            self.cap_rows, self.linger_us = max_rows, linger_us
            self._window, self._probes = None, 0

    def cut(self, more_waits: bool) -> None:
        """A batch was cut; whether it left work behind."""
        if self._probes:
            self._probes -= 1
            if not self._probes:
                self.cap_rows = self._usual_rows
        if self._window is not None:
            self._window.bound += more_waits

    def answered(self, arrivals: Iterable[int], rows: int, cut_us: int, service_us: int, now_us: int) -> None:
        """A batch came back with the scores of requests that arrived at these times."""
        if not self.slo_us:
            return
        window = self._window
        if window is None:
            window = self._window = Window(now_us)
        took_us = max(0, now_us - cut_us)
        count = 0
        for arrived_us in arrivals:
            window.total.add(max(0, now_us - arrived_us))
            window.wait.add(max(0, cut_us - arrived_us))
            count += 1
        window.service.add(took_us, count)
        window.answers += count
        window.batches += 1
        window.rows += rows
        window.busy_us += service_us
        if now_us - self._learnt_us > RELEARN_US:
            self._curve, self._learnt_us = Curve(GRAIN), now_us
        self._curve.observe(max(1, rows), service_us, now_us)

    def adjust(self, executors: int, now_us: int) -> None:
        """At most one step, once a window is over."""
        window = self._window
        if window is None or not self.slo_us:
            return
        lasted_us = now_us - window.start_us
        if lasted_us < WINDOW_US or (window.answers < ENOUGH and lasted_us < LONGEST_US):
            return
        self._window = Window(now_us)
        if not window.answers:
            return
        self.p99_us, self.wait_p99_us, self.service_p99_us = (
            spread.quantile(0.99) for spread in (window.total, window.wait, window.service)
        )
        if self._probes:
            return
        wish = self._wished(window, lasted_us * max(1, executors))
        self._agreed = self._agreed + 1 if wish == self._wish else 1
        self._wish = wish
        if wish[0] and (self._agreed >= self._calm or self._swamped(window)):
            self._take(wish)
        elif self._swamped(window):
            self._probe()

    # What to do

    def _swamped(self, window: Window) -> bool:
        """The wait alone is above the target, and batches are as large as they may be: that cannot wait."""
        return self.wait_p99_us > self.slo_us and _bound(window)

    def _wished(self, window: Window, executors_us: int) -> tuple[str, str]:
        """The knob and the direction; empty: leave all as it is."""
        target_us, p99_us = self.slo_us, self.p99_us
        idle = window.busy_us < BUSY * executors_us
        if self.linger_us > self.least_linger_us and (idle or p99_us > ROOM * target_us):
            return "linger", "down"
        if _bound(window) and STEP * self._efficient_rows() >= self.cap_rows:
            return "cap", "up"
        if p99_us > target_us and self._lower() <= STEP * self.cap_rows:
            return "cap", "down"
        small = 4 * window.rows < self.cap_rows * window.batches
        if small and not idle and p99_us < SHARE * target_us and self.linger_us < self._most_linger_us():
            return "linger", "up"
        return "", ""

    def _efficient_rows(self) -> int:
        """The most, up to twice the cap, that still pass at nearly the best rate that was measured."""
        curve = self._curve
        most = rows = min(self.max_rows, 2 * self.cap_rows)
        while rows > curve.best_work and curve.predict(rows) > NEARLY * curve.us_per_row * rows:
            rows = int(STEP * rows)
        return min(most, max(rows, curve.best_work))

    def _lower(self) -> int:
        """A cap that is known to pass faster; half of the present one at least."""
        return max(1, self.cap_rows // 2, min(self.cap_rows, self._efficient_rows()))

    def _probe(self) -> None:
        """A few batches of half the size: who has never tried does not know whether they pass faster."""
        half = max(1, self.cap_rows // 2)
        if not self._curve.measured(int(STEP * half), half + half // 8):
            self._usual_rows, self.cap_rows = self.cap_rows, half
            self._probes = TRUSTED

    def _most_linger_us(self) -> int:
        return max(self.least_linger_us, self.slo_us // 8)

    def _take(self, wish: tuple[str, str]) -> None:
        knob, direction = wish
        before = (self.cap_rows, self.linger_us)
        if wish == ("cap", "down"):
            self.cap_rows = self._lower()
        elif wish == ("cap", "up"):
            self.cap_rows = self._efficient_rows()
        elif wish == ("linger", "up"):
            self.linger_us = min(self._most_linger_us(), max(2 * self.linger_us, self.slo_us // 32))
        else:
            halved_us = self.linger_us // 2
            self.linger_us = max(self.least_linger_us, halved_us if halved_us >= self.slo_us // 32 else 0)
        took_back = self._last[0] == knob and self._last[1] != direction
        self._calm = min(CALMEST, 2 * self._calm) if took_back else max(CALM, self._calm // 2)
        self._last, self._agreed = wish, 0
        why = (
            f"rows {before[0]} -> {self.cap_rows}, linger {before[1]} -> {self.linger_us} us: p99 {self.p99_us} us"
            f" (waiting {self.wait_p99_us}, service {self.service_p99_us}), target {self.slo_us} us"
        )
        self.steps.append(Step(*wish, why))


def _bound(window: Window) -> bool:
    """Whether most batches left work behind."""
    return 2 * window.bound > window.batches
