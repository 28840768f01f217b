"""`narsil bench`: measure this machine."""

from pathlib import Path

import rich_click as click

from narsil_stream.cli import bench_chaos, bench_gate, bench_serving
from narsil_stream.cli.bench_scheduling import scheduling

_file = click.Path(path_type=Path, dir_okay=False)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def bench() -> None:
    """Measure how fast this machine computes and serves, and compare.

    Example: narsil bench forward --json forward.json; narsil bench shell --quick
    """


for _command in (*bench_serving.COMMANDS, bench_chaos.chaos, bench_gate.gate):
    bench.add_command(_command)
bench.add_command(scheduling)


@bench.command()
@click.option("--json", "json_file", type=_file, metavar="FILE", help="Write the figures there as well.")
@click.option(
    "--plot", "plot_file", type=_file, metavar="FILE", help="Draw rows a second against batch size there (.svg, .png)."
)
@click.option(
    "--table-rows", type=click.IntRange(1), default=100_000, show_default=True, help="Rows of each of the 26 tables."
)
@click.option(
    "--repeats", type=click.IntRange(1), default=15, show_default=True, help="Repetitions; their median counts."
)
@click.option(
    "--device", type=click.Choice(["all", "cpu", "cuda"]), default="all", show_default=True, help="What to measure."
)
def forward(json_file: Path | None, plot_file: Path | None, table_rows: int, repeats: int, device: str) -> None:
    """How fast each family computes a forward pass here, against TorchRec and FBGEMM on the same weights.

    Scores are compared with the reference before anything is timed; families that this machine lacks are named.

    On a CPU both sides take as many threads as the process may use cores: `taskset -c 0,1 narsil bench forward` two.

    Example: narsil bench forward --json forward.json --plot forward.svg
    """
    from narsil_stream.bench.forward import WrongScores, reference_model
    from narsil_stream.bench.forward import forward as measure
    from narsil_stream.bench.report import NoPlot, plot, prepare, text, write

    try:
        prepare(json_file, plot_file)
        report = measure(reference_model(table_rows), repeats, device)  # type: ignore[arg-type]
        click.echo(text(report))
        if json_file:
            write(report, json_file)
        if plot_file:
            plot(report, plot_file)
    except (NoPlot, WrongScores, OSError) as error:
        raise click.ClickException(str(error)) from None
