"""How long gateways took to refuse, by their own metrics: without the callers, who share the processors here."""

import math
import time
import urllib.request
from collections import Counter

from prometheus_client.parser import text_string_to_metric_families

from narsil_stream.bench.load import LoadFailed
from narsil_stream.bench.serving import HOST, READY_S

AIM_S = 0.005
REPORTED_S = 5.0
"""Gateways report each second; one that has not by then does not report at all."""


class Refusing:
    """Refusals of all gateways of a `narsil serve` from now on, by its metrics port."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._before, self._door_before = self._read()
        self._within: list[tuple[float, int]] = []
        """Seconds, and how many took no longer; the last one is infinite."""
        self.at_door = 0
        """Of them, those refused without asking a batcher."""

    def wait(self, refused: int) -> None:
        """Until gateways have reported as many as callers have seen. Raises LoadFailed."""
        end_s = time.monotonic() + REPORTED_S
        while True:
            now, door = self._read()
            self._within = sorted((within_s, count - self._before[within_s]) for within_s, count in now.items())
            self.at_door = door - self._door_before
            if self.count >= refused:
                return
            if time.monotonic() > end_s:
                raise LoadFailed(f"gateways report {self.count} refusals; callers saw {refused}")
            time.sleep(0.1)

    @property
    def count(self) -> int:
        return self._within[-1][1] if self._within else 0

    def share(self, within_s: float) -> float:
        """The part that took no longer than this, which is one of the histogram's bounds."""
        return dict(self._within)[within_s] / self.count if self.count else 1.0

    def percentile_ms(self, part: float) -> float:
        """The lowest bound of the histogram that so many per cent keep."""
        return 1e3 * next((within_s for within_s, count in self._within if count >= part / 100 * self.count), math.inf)

    def __str__(self) -> str:
        if not self.count:
            return "gateways refused nothing"
        return (
            f"{self.count:,} from a request's arrival at a gateway: half of them within {self.percentile_ms(50):g} ms, "
            f"99 % within {self.percentile_ms(99):g} ms; {100 * self.share(AIM_S):.1f} % within {1e3 * AIM_S:g} ms; "
            f"{100 * self.at_door / self.count:.0f} % were refused at the door"
        )

    def _read(self) -> tuple[Counter[float], int]:
        """Refusals by the bounds of the histogram, cumulative, and those at the door, since gateways started."""
        with urllib.request.urlopen(f"http://{HOST}:{self._port}/metrics", timeout=READY_S) as response:
            text = response.read().decode()
        within: Counter[float] = Counter()
        door = 0
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == "narsil_refusal_seconds_bucket":
                    within[float(sample.labels["le"])] += int(sample.value)
                elif sample.name == "narsil_requests_throttled":
                    door += int(sample.value)
        return within, door
