"""`narsil bench gate`: did a change make the hot path slower?"""

import time

import rich_click as click

from narsil_stream.cli.bench_serving import Words

PARTS = ("scheduler", "batcher", "serving")


@click.command()
@click.option("--only", type=Words(PARTS), default=",".join(PARTS), show_default=True, help="Which parts to measure.")
@click.pass_context
def gate(ctx: click.Context, only: tuple[str, ...]) -> None:
    """Hold the hot path to limits, in half a minute: ratios inside this run, so that any machine can judge.

    A scheduler and a batcher by themselves against a fixed loop of Python; the pipeline around a model that costs
    nothing, over NATS and HTTP, against a bare echo of the same bytes over NATS. What misses is measured once more.
    Limits, and why each is where it is: bench/gate.py.

    Exits 1 when a limit is missed twice, and says which and by how much.

    Example: narsil bench gate; narsil bench gate --only scheduler
    """
    from functools import partial

    from narsil_stream.bench import gate as bench
    from narsil_stream.bench.load import LoadFailed
    from narsil_stream.bench.questions import Misbehaved
    from narsil_stream.cli import bench_policy

    started = time.monotonic()

    def say(text: str) -> None:
        click.echo(f"[{time.monotonic() - started:5.1f} s] {text}", err=True)

    parts: dict[str, tuple[tuple[str, ...], bench.Measure]] = {
        "scheduler": (("scheduler",), bench_policy.scheduler),
        "batcher": (("batcher",), bench_policy.batcher),
        "serving": (bench.SERVED, partial(bench.served, say)),
    }
    try:
        verdicts = bench.judge({name: parts[name] for name in only}, say)
    except (Misbehaved, LoadFailed) as error:
        raise click.ClickException(str(error)) from None
    click.echo(bench.table(verdicts))
    if wrong := bench.complaint(verdicts):
        click.echo(wrong, err=True)
    ctx.exit(1 if wrong else 0)
