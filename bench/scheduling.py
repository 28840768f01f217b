"""Pictures and tables of what `narsil bench scheduling` has found; its data are JSON."""

from pathlib import Path
from typing import Any

from narsil_stream.bench.report import NoPlot, figure

NAMES = {
    "ours": "narsil-stream",
    "adaptive": "narsil-stream, --slo-p99 20ms",
    "fixed": "fixed time-out and size, best setting at each load",
    "triton": "preferred sizes and delay, best setting at each load",
}
STYLES = {"ours": "o-", "adaptive": "s--", "fixed": "^-", "triton": "v-"}
LOADS = (10, 25, 50, 100, 200, 500)
"""Ticks, %."""
FILES = ("straight.svg", "knee.svg", "consolidation.svg")

Points = list[dict[str, Any]]


def table(found: dict[str, Any]) -> str:
    """For people: goodput and p99 of each policy at each load, then what consolidation saves."""
    lines = []
    for device in sorted({point["device"] for point in found["points"]}, reverse=True):
        lines += [f"device {device}: goodput (rows in time, of capacity) and p99 in ms", _head()]
        lines += [_row(found, device, load) for load in _loads(found["points"], device)]
    fleet = _of(found["points"], executors=4)
    if fleet:
        lines += ["four executors: executor-seconds a second, p99 in ms", f"{'load':>6}{'all':>16}{'consolidated':>16}"]
        for load in sorted({point["load"] for point in fleet}):
            cells = [
                f"{point['executors_busy']:8.2f}{point['p99_us'] / 1e3:8.1f}"
                for policy in ("ours", "consolidated")
                for point in _of(fleet, policy=policy, load=load)
            ]
            lines.append(f"{load:6.0%}" + "".join(cells))
    return "\n".join(lines)


def draw(found: dict[str, Any], folder: Path) -> None:
    """The pictures, as SVG in `folder`. Raises NoPlot."""
    points: Points = found["points"]
    for name, device in zip(FILES, ("straight", "knee"), strict=False):
        _compare(_of(points, device=device, executors=1), device, folder / name)
    _consolidation(_of(points, executors=4), folder / FILES[-1])


def _compare(points: Points, device: str, file: Path) -> None:
    if not points:
        raise NoPlot(f"nothing to draw: no runs on the device '{device}'")
    drawn = figure(1, "run")
    drawn.set_size_inches(9, 4.2)
    goodput, p99 = drawn.subplots(1, 2)
    for policy, name in NAMES.items():
        mine = sorted(_of(points, policy=policy), key=lambda point: float(point["load"]))
        loads = [100 * point["load"] for point in mine]
        goodput.plot(loads, [100 * point["goodput"] for point in mine], STYLES[policy], ms=4, label=name)
        p99.plot(loads, [point["p99_us"] / 1e3 for point in mine], STYLES[policy], ms=4)
    goodput.set(xscale="log", xlabel="load, % of capacity", ylabel="answered in time, % of capacity", ylim=(0, 108))
    p99.set(xscale="log", yscale="log", xlabel="load, % of capacity", ylabel="p99 of what is answered in time, ms")
    p99.axhline(20, color="grey", lw=0.8, ls=":")
    for axes in (goodput, p99):
        axes.set_xticks(LOADS, [str(load) for load in LOADS])
    _plain(goodput, p99)
    drawn.suptitle(f"Simulated: one executor, device '{device}'", fontsize=10)
    drawn.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    drawn.savefig(file, metadata={"Date": None})


def _consolidation(points: Points, file: Path) -> None:
    if not points:
        raise NoPlot("nothing to draw: no runs on four executors")
    drawn = figure(1, "run")
    drawn.set_size_inches(9, 3.6)
    used, p99, goodput = drawn.subplots(1, 3)
    for policy, name, style in (("ours", "all executors", "o-"), ("consolidated", "batch.consolidate", "s--")):
        mine = sorted(_of(points, policy=policy), key=lambda point: float(point["load"]))
        loads = [100 * point["load"] for point in mine]
        used.plot(loads, [point["executors_busy"] for point in mine], style, ms=4, label=name)
        p99.plot(loads, [point["p99_us"] / 1e3 for point in mine], style, ms=4)
        goodput.plot(loads, [100 * point["goodput"] for point in mine], style, ms=4)
    used.set(ylabel="executor-seconds a second", ylim=(0, 4.4))
    p99.set(ylabel="p99, ms", yscale="log")
    goodput.set(ylabel="answered in time, % of capacity", ylim=(0, 108))
    for axes in (used, p99, goodput):
        axes.set(xlabel="load, % of capacity")
    _plain(used, p99, goodput)
    drawn.suptitle("Simulated: four executors, device 'straight'", fontsize=10)
    drawn.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    drawn.savefig(file, metadata={"Date": None})


def _plain(*every: Any) -> None:
    """A grid, and milliseconds as plain numbers."""
    for axes in every:
        if axes.get_yscale() == "log":
            low, high = axes.get_ylim()
            ticks = [tick for tick in (2, 5, 10, 20, 50, 100) if low <= tick <= high]
            axes.set_yticks(ticks, [str(tick) for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)


def _of(points: Points, **wanted: Any) -> Points:
    return [point for point in points if all(point[key] == value for key, value in wanted.items())]


def _loads(points: Points, device: str) -> list[float]:
    return sorted({float(point["load"]) for point in _of(points, device=device, executors=1)})


def _head() -> str:
    return f"{'load':>6}" + "".join(f"{policy:>16}" for policy in NAMES)


def _row(found: dict[str, Any], device: str, load: float) -> str:
    points = _of(found["points"], device=device, executors=1, load=load)
    cells = [
        f"{point['goodput']:8.3f}{point['p99_us'] / 1e3:8.1f}"
        for policy in NAMES
        for point in _of(points, policy=policy)
    ]
    return f"{load:6.0%}" + "".join(cells)
