"""What a measurement says: figures, where they come from, and how they are shown."""

import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from narsil_stream import __version__


class Row(Struct, frozen=True):
    """One figure. `ratio`: how many times better than `baseline`, more is better."""

    case: str
    """forward/family/device/precision/rows[/variant], shell[/server]/way/rows/connections ..."""
    metric: str
    value: float
    unit: str
    baseline: str | None = None
    ratio: float | None = None


class Report(Struct, frozen=True):
    machine: dict[str, str]
    """Device, versions, command and commit."""
    rows: list[Row]
    absent: dict[str, str]
    """Families, baselines and peers that this machine lacks, and why."""
    invalid: dict[str, str] = {}
    """Cases whose figures do not count, and why."""
    notes: dict[str, str] = {}
    """What a case needs to be read rightly: placement, settings, "different protocol" ..."""


class NoPlot(Exception):
    """A picture cannot be drawn; says why and what to do."""


def machine() -> dict[str, str]:
    """Where a measurement runs. Only what is installed is named; nothing is imported for it."""
    found = {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": _commit(),
        "python": platform.python_version(),
        "cpu": _cpu(),
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
    }
    for name in ("numpy", "torch", "fbgemm-gpu", "fbgemm-gpu-cpu", "torchrec", "cupy-cuda13x"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found | _gpu()


def text(report: Report) -> str:
    """For people: where it ran, a line for each figure, rows a second against batch size as bars."""
    lines = [f"{key}: {value}" for key, value in report.machine.items()]
    lines += [f"absent: {name}: {why.splitlines()[0]}" for name, why in report.absent.items()]
    lines += [f"{name}: {note}" for name, note in report.notes.items()]
    lines += ["", f"{'case':44} {'metric':22} {'value':>9} unit     baseline"]
    for row in report.rows:
        versus = f"{row.ratio:.2f}x {row.baseline}" if row.ratio is not None else ""
        lines.append(
            f"{row.case:44} {row.metric:22} {row.value:9.{1 if row.value >= 10 else 3}f} {row.unit:8} {versus}"
        )
    bars = _throughput(report)
    top = max((row.value for row in bars), default=1.0)
    lines += ["", *(f"{row.case:44} {'#' * round(40 * row.value / top)} {row.value:.3g} M rows/s" for row in bars)]
    return "\n".join(lines)


def plot(report: Report, file: Path) -> None:
    """Rows a second against batch size, a line for each way to compute, as a picture in `file` (.svg, .png ...).

    Raises NoPlot: no matplotlib, or nothing to draw.
    """
    ways: dict[str, list[tuple[int, float]]] = {}
    for row in _throughput(report):
        _, family, device, precision, rows, *variant = row.case.split("/")
        ways.setdefault(" ".join([family, device, precision, *variant]), []).append((int(rows), row.value))
    drawn = figure(len(ways), "family was measured at several batch sizes")
    axes = drawn.subplots()
    for name, points in ways.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.set(xscale="log", yscale="log", xlabel="rows in a batch", ylabel="M rows/s", title="Forward pass")
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    drawn.savefig(file)


def prepare(json_file: Path | None, plot_file: Path | None) -> None:
    """Make the folders of files that are written after a measurement, so that none is lost. Raises OSError, NoPlot."""
    for file in (json_file, plot_file):
        if file:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("ab"):
                pass
    if plot_file:
        formats = figure(1, "").canvas.get_supported_filetypes()
        if plot_file.suffix[1:] not in formats:
            raise NoPlot(
                f"{plot_file} names no kind of picture; there are: {', '.join('.' + name for name in formats)}"
            )


def write(report: Report, file: Path) -> None:
    """As JSON. A regular file holds the old report or the new one, whenever this ends. Raises OSError."""
    data = msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n"
    if file.exists() and not file.is_file():  # /dev/stdout
        file.write_bytes(data)
        return
    part = file.with_name(f"{file.name}.part")
    part.write_bytes(data)
    part.replace(file)


def figure(things: int, what: str) -> Any:
    """An empty picture for so many things. Raises NoPlot: no matplotlib, or nothing to draw."""
    try:
        import matplotlib
    except ImportError as error:
        raise NoPlot("a picture needs matplotlib. Next: pip install 'narsil-stream[bench]'") from error
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text stays text: small, searchable
    from matplotlib.figure import Figure

    if not things:
        raise NoPlot(f"nothing to draw: no {what}")
    return Figure(figsize=(8, max(5, 0.3 * things)), layout="constrained")


def _throughput(report: Report) -> list[Row]:
    return [row for row in report.rows if row.metric == "throughput"]


def _commit() -> str:
    """Of the checkout that tracks this file; of a copy, $GIT_COMMIT; else the version that is installed."""
    here = Path(__file__).resolve()
    git = ["git", "-C", str(here.parent)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=True)
        found = subprocess.run([*git, "describe", "--always", "--dirty"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("GIT_COMMIT") or f"none: narsil-stream {__version__}"
    return found.stdout.strip()


def _cpu() -> str:
    """The processor's name and the instructions that decide how fast it multiplies."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    facts = dict(line.split(":", 1) for line in lines if ":" in line)
    named = {key.strip(): value.strip() for key, value in facts.items()}
    flags = [flag for flag in named.get("flags", "").split() if flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16")]
    return f"{named.get('model name', platform.processor())} ({', '.join(flags)})"


def _gpu() -> dict[str, str]:
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        name, driver = (
            subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0].split(",")
        )
    except (OSError, subprocess.CalledProcessError, IndexError, ValueError):
        return {}
    return {"gpu": name.strip(), "driver": driver.strip()}
