"""`narsil bench chaos`: does the scheduler keep its promises?"""

from pathlib import Path

import rich_click as click

from narsil_stream.cli.bench_serving import Words
from narsil_stream.cli.progress import progress

NAMES = ("80", "100", "200", "500", "spike", "kill", "kill-gateways", "freeze-batcher", "freeze-executor")
SHORT = 0.2


@click.command()
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the table there as well.",
)
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="Of arrivals, sizes and victims.")
@click.option("--rows", type=Words(NAMES), default=",".join(NAMES), show_default=True, help="Which rows of the table.")
@click.option(
    "--capacity",
    type=click.FloatRange(0),
    default=0.0,
    show_default=True,
    help="Requests a second that count as 100 %. 0: measured first.",
)
@click.option("--short", is_flag=True, help="A fifth of the time for each row: a trial.")
@click.pass_context
def chaos(
    ctx: click.Context, json_file: Path | None, seed: int, rows: tuple[str, ...], capacity: float, short: bool
) -> None:
    """Load up to five times what the system carries, and kill and freeze its processes under load.

    All real processes: broker, gateways, batchers, executors. Only the GPU is not: each executor takes a fixed, known
    time for a batch instead, so that what is seen is the scheduler. Requests of heavy-tailed sizes arrive at random
    over HTTP, gRPC and the Python client; each has its own answer, and a referee counts those that come late, twice,
    wrong or never. Prints bar and result for each row of the table in docs/scheduling.md; about five minutes.

    Exits 1 when a bar is missed.

    Example: narsil bench chaos --json chaos.json; narsil bench chaos --rows kill,freeze-batcher --short
    """
    import msgspec

    from narsil_stream.bench.chaos.plan import Plan
    from narsil_stream.bench.chaos.run import chaos as run
    from narsil_stream.bench.chaos.run import seconds
    from narsil_stream.bench.load import LoadFailed
    from narsil_stream.bench.questions import Misbehaved

    plan = Plan(seed, rows, SHORT if short else 1.0, capacity=capacity)
    done = 0.0
    with progress(round(seconds(plan)), "seconds of load") as bar:

        def show(more_s: float, what: str) -> None:
            nonlocal done
            done += more_s
            bar(round(done), round(done))

        try:
            table = run(plan, show, lambda text: click.echo(text, err=True))
        except (Misbehaved, LoadFailed, TimeoutError) as error:
            raise click.ClickException(str(error)) from None
    click.echo(table.markdown())
    if json_file:
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode(table), indent=2) + b"\n")
    ctx.exit(0 if table.kept else 1)
