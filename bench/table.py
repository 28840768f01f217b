"""How serving is reported: a Markdown table with a line for each case and baseline, and a picture."""

from pathlib import Path

from narsil_stream.bench.report import Report, Row, figure

Line = tuple[str, str | None]
"""Case and baseline."""

COLUMNS = ("case", "requests/s", "rows/s", "p50 ms", "p99 ms", "p99.9 ms", "beside", "ratio", "p50 ratio")


def markdown(report: Report) -> str:
    """Where it ran, the table, and what must be known to read it."""
    lines = [f"- {key}: {value}" for key, value in report.machine.items()]
    lines += ["", f"| {' | '.join(COLUMNS)} |", "|---" * len(COLUMNS) + "|"]
    lines += [_line(line, of, report) for line, of in _by_line(report).items()]
    lines.append("\nratio: how many times better than what stands under *beside*; ±: half of the range of the rounds.")
    remarks = [("invalid", report.invalid), ("note", report.notes), ("absent", report.absent)]
    for name, texts in remarks:
        lines += ["", *(f"- {name}: `{case}`: {text}" for case, text in texts.items())] if texts else []
    return "\n".join(lines)


def _by_line(report: Report) -> dict[Line, dict[str, Row]]:
    found: dict[Line, dict[str, Row]] = {}
    for row in report.rows:
        if row.metric in ("offered_per_s", "cpu_us"):  # a column for few
            continue
        found.setdefault((row.case, row.baseline), {})[row.metric] = row
    return found


def _line(line: Line, of: dict[str, Row], report: Report) -> str:
    case, baseline = line
    mark = " (invalid)" if case in report.invalid else ""
    spread = of["requests_per_s_spread"].value / 2 if "requests_per_s_spread" in of else 0.0
    cells = [f"`{case}`{mark}", f"{of['requests_per_s'].value:,.0f} ± {spread:.0f} %", f"{of['rows_per_s'].value:,.0f}"]
    cells += [f"{of[metric].value:.2f}" for metric in ("p50_ms", "p99_ms", "p999_ms")]
    cells += [baseline or "", _ratio(of["requests_per_s"]), _ratio(of["p50_ms"])]
    return f"| {' | '.join(cells)} |"


def _ratio(row: Row) -> str:
    return "" if row.ratio is None else f"{row.ratio:.2f}"


def draw(report: Report, file: Path) -> None:
    """Requests a second of each case as bars, in `file` (.svg, .png ...). Raises NoPlot."""
    values: dict[str, float] = {}
    for row in report.rows:
        if row.metric == "requests_per_s" and "/open" not in row.case:
            values.setdefault(row.case, row.value)
    drawn = figure(len(values), "case was measured")
    axes = drawn.subplots()
    names = list(reversed(values))
    colours = ["lightgrey" if name in report.invalid else None for name in names]
    bars = axes.barh(names, [values[name] for name in names])
    for bar, colour in zip(bars, colours, strict=True):
        if colour:
            bar.set_facecolor(colour)
    axes.bar_label(bars, fmt="{:,.0f}", padding=3, fontsize="small")
    axes.set(xscale="log", xlabel="requests a second (grey: invalid)", title="Serving")
    axes.grid(axis="x", which="both", alpha=0.3)
    drawn.savefig(file)
