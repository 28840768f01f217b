"""What the records of a load say: how requests ended, how late, how much was served."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from narsil_stream.bench.chaos.generator import End, Outcome

SCORED = End.RIGHT
NO_ANSWER = (End.UNANSWERED, End.BROKEN)


class Seen:
    """An outcome under a budget. Counts are of requests; a plain producer's are apart: it was promised less."""

    def __init__(self, outcome: Outcome, budget_s: float) -> None:
        records = outcome.records
        producer = outcome.ways.index("producer") if "producer" in outcome.ways else -1
        self.ways = [way for way in outcome.ways if way != "producer"]
        self._number = {way: number for number, way in enumerate(outcome.ways)}
        self.start_s = outcome.start_s
        self.records = records[records["way"] != producer]
        self.producers = records[records["way"] == producer]
        self.double = outcome.surplus
        self._budget_s = budget_s

    def within(self, first_s: float, last_s: float) -> NDArray[Any]:
        """Records due in this part of the load, in seconds of it."""
        due = self.records["due_s"] - self.start_s
        part: NDArray[Any] = self.records[(due >= first_s) & (due < last_s)]
        return part

    def count(self, *ends: End) -> int:
        return int(np.isin(self.records["end"], ends).sum())

    @property
    def in_time(self) -> int:
        return int(self._good(self.records).sum())

    @property
    def admitted(self) -> int:
        """All but those that were refused for load."""
        return len(self.records) - self.count(End.OVERLOADED)

    @property
    def missed(self) -> float:
        """Of those admitted, the part that was not answered rightly inside its budget."""
        return 1 - self.in_time / max(1, self.admitted)

    @property
    def wrong(self) -> int:
        return self.count(End.WRONG) + int((self.producers["end"] == End.WRONG).sum())

    @property
    def broken(self) -> int:
        """Connections that broke under a request."""
        return int(self.records["broken"].sum())

    def goodput(self, length_s: float) -> tuple[float, float]:
        """Requests and rows a second that were answered rightly inside their budget, once queues had time to fill and
        until the load of this length ended: what is left in them then is no goodput."""
        done_s = self.records["due_s"] + self.records["took_s"] - self.start_s
        first_s = min(self._budget_s, length_s / 2)
        good = self.records[self._good(self.records) & (done_s > first_s) & (done_s <= length_s)]
        return len(good) / (length_s - first_s), float(good["rows"].sum()) / (length_s - first_s)

    def refusals_ms(self, way: str = "") -> NDArray[np.float64]:
        """How long callers waited for being refused, from when the request left the generator. `way`: of these."""
        refused = self.records[self.records["end"] == End.OVERLOADED]
        if way:
            refused = refused[refused["way"] == self._number[way]]
        return np.asarray((refused["took_s"] - refused["late_s"]) * 1e3, np.float64)

    @property
    def refused_without_time(self) -> int:
        """Refusals that do not say when to come back."""
        refused = self.records[self.records["end"] == End.OVERLOADED]
        return int((refused["retry_after_us"] == 0).sum())

    @property
    def late_ms(self) -> float:
        """How late the generator itself was, 99th percentile."""
        return percentile(self.records["late_s"] * 1e3, 99)

    @property
    def slowest_s(self) -> float:
        return float(self.records["took_s"].max(initial=0.0))

    def tail_s(self, first_s: float, last_s: float) -> float:
        """99th percentile of those admitted that were due in this part; whatever was not scored counts as endless."""
        part = self.within(first_s, last_s)
        part = part[part["end"] != End.OVERLOADED]
        took = np.where(part["end"] == SCORED, part["took_s"], np.inf)
        return percentile(took, 99)

    def figures(self) -> dict[str, float]:
        """Counts of requests, for machines."""
        counts: dict[str, float] = {end.name.lower(): self.count(end) for end in End}
        return counts | {
            "wrong": self.wrong,
            "double": self.double,
            "admitted": self.admitted,
            "in_time": self.in_time,
            "broken_connections": self.broken,
            "slowest_s": self.slowest_s,
            "generator_late_p99_ms": self.late_ms,
        }

    def ends(self) -> str:
        """For people: what is not right and in time, by how it ended."""
        counts = {end.name: self.count(end) for end in End if end is not SCORED}
        counts["LATE"] = self.count(SCORED) - self.in_time
        return ", ".join(f"{name} {count:,}" for name, count in counts.items() if count) or "none"

    def _good(self, records: NDArray[Any]) -> NDArray[np.bool_]:
        return np.asarray((records["end"] == SCORED) & (records["took_s"] <= self._budget_s))


def percentile(values: NDArray[Any], part: float) -> float:
    return float(np.percentile(values, part, method="higher")) if len(values) else 0.0


class Processors:
    """How busy this machine's processors are from now on, by everybody, and how much of them others took."""

    def __init__(self) -> None:
        self._before = _ticks()

    def __str__(self) -> str:
        used = _ticks() - self._before
        total = max(1, int(used.sum()))
        return f"processors {100 - 100 * (used[3] + used[4]) / total:.0f} % busy, {100 * used[7] / total:.1f} % stolen"


def _ticks() -> NDArray[np.int64]:
    """user, nice, system, idle, iowait, irq, softirq, steal"""
    try:
        return np.array(Path("/proc/stat").read_text().split("\n")[0].split()[1:9], np.int64)
    except OSError:
        return np.zeros(8, np.int64)
