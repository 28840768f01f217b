"""What a chaos run is made of: the system, what stands in for devices, loads and how long each lasts."""

from msgspec import Struct

from narsil_stream.bench.chaos.asks import Sizes
from narsil_stream.kernels.noop import Pace

ROWS = ("80", "100", "200", "500", "spike", "kill", "kill-gateways", "freeze-batcher", "freeze-executor")


class Plan(Struct, frozen=True):
    seed: int = 1
    rows: tuple[str, ...] = ROWS
    length: float = 1.0
    """Of each row, times what stands below."""
    executors: int = 3
    batchers: int = 2
    doors: int = 2
    """HTTP gateways, and as many for gRPC."""
    pace: Pace = Pace(batch_us=5_000, row_us=1_200)
    max_rows: int = 64
    sizes: Sizes = Sizes()
    budget_s: float = 1.0
    patient_s: float = 3.0
    """Budget where the wait for a frozen process is measured: long enough not to cut it off."""
    target_s: float = 0.5
    """99th percentile that counts as recovered after a spike."""
    capacity: float = 0.0
    """Requests a second; 0: measured first."""

    @property
    def processes(self) -> int:
        return self.executors + self.batchers + 2 * self.doors

    @property
    def ceiling(self) -> float:
        """Requests a second of executors that are always busy with full batches."""
        rows = self.executors * self.max_rows / self.pace.seconds(self.max_rows)
        return rows / self.sizes.mean()

    def options(self) -> list[str]:
        """Of `narsil serve`."""
        given = {
            "backend": "noop",
            "executor-noop-us": self.pace.batch_us,
            "executor-noop-row-us": self.pace.row_us,
            "executor-executors": self.executors,
            "placement": "apart",
            "batch-batchers": self.batchers,
            "batch-max-rows": self.max_rows,
            "http-processes": self.doors,
            "grpc-processes": self.doors,
        }
        return [word for name, value in given.items() for word in (f"--{name}", str(value))]


class Row(Struct, frozen=True):
    """One line of the table."""

    what: str
    bar: str
    result: str
    kept: bool
    details: list[str]
    figures: dict[str, float] = {}


class Table(Struct, frozen=True):
    machine: dict[str, str]
    setting: list[str]
    rows: list[Row]

    @property
    def kept(self) -> bool:
        return all(row.kept for row in self.rows)

    def markdown(self) -> str:
        lines = [f"- {key}: {value}" for key, value in self.machine.items()]
        lines += [f"- {line}" for line in self.setting]
        lines += ["", "| what | bar | result | kept |", "|---|---|---|---|"]
        lines += [f"| {r.what} | {r.bar} | {r.result} | {'yes' if r.kept else '**NO**'} |" for r in self.rows]
        lines += ["", *(f"- {row.what}: {detail}" for row in self.rows for detail in row.details)]
        return "\n".join(lines)
