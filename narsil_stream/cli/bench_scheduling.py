"""`narsil bench scheduling`: our policy against others, simulated."""

from pathlib import Path

import rich_click as click

from narsil_stream.cli.progress import progress

FILE = "scheduling.json"


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="FOLDER",
    help=f"Write the data ({FILE}) and the pictures (.svg) there.",
)
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="Of all arrivals.")
@click.option(
    "--requests", type=click.IntRange(500), default=6_000, show_default=True, help="Of each run; 3 s at least."
)
@click.option(
    "--jobs", type=click.IntRange(0), default=0, show_default=True, help="Processes; 0: one for each processor."
)
def scheduling(out: Path | None, seed: int, requests: int, jobs: int) -> None:
    """Compare how batches are scheduled: goodput and p99 from 10 % to 500 % load. Simulated, not measured.

    Requests arrive at random (Poisson), with heavy-tailed sizes and budgets of 20, 50 and 100 ms, at executors that
    take a known time. Our scheduler is the code that serves, with and without --slo-p99, and with batch.consolidate on
    four executors; a fixed time-out with a largest size, and Triton's preferred sizes with a delay, have the best
    setting of a sweep at each load. The same seed gives the same figures.

    Example: narsil bench scheduling --out docs/scheduling
    """
    import msgspec

    from narsil_stream.actors.simulation.comparison import Effort, compare, size
    from narsil_stream.bench.report import NoPlot
    from narsil_stream.bench.scheduling import draw, table

    effort = Effort(requests=requests, seed=seed)
    with progress(size(effort), "runs") as show:
        found = msgspec.to_builtins(compare(effort, show, jobs))
    click.echo(table(found))
    if out:
        out.mkdir(parents=True, exist_ok=True)
        (out / FILE).write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
        try:
            draw(found, out)
        except NoPlot as error:
            raise click.ClickException(str(error)) from None
