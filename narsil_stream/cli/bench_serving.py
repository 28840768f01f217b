"""`narsil bench shell|pipeline|peers|broker|scale`: measure serving, end to end through a broker."""

import os
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from narsil_stream.core.config.schema import default_data_dir

if TYPE_CHECKING:
    from narsil_stream.bench.report import Report
    from narsil_stream.bench.shell import Plan

_file = click.Path(path_type=Path, dir_okay=False)

WAYS = ("http", "http-binary", "grpc", "nats")
PEERS = ("mosec", "litserve", "ray", "triton")
KINDS = ("shell", "pipeline")
ENGINES = ("torchrec-eager", "torch")


class Words(click.ParamType[tuple[Any, ...]]):
    """Words of a closed list, or numbers from 1, separated by commas."""

    name = "list"

    def __init__(self, allowed: tuple[str, ...] = ()) -> None:
        self._allowed = allowed

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[Any, ...]:
        if isinstance(value, tuple):
            return value
        words = [word.strip() for word in value.split(",")]
        for word in words:
            if self._allowed and word not in self._allowed:
                self.fail(f"{word!r} is none of {', '.join(self._allowed)}", param, ctx)
            if not self._allowed and not (word.isascii() and word.isdigit() and 0 < int(word) <= 65_536):
                self.fail(f"{word!r} is no number from 1 to 65536", param, ctx)
        return tuple(words) if self._allowed else tuple(map(int, words))


def measurement(ways: tuple[str, ...], rows: str = "100,1") -> Callable[[Callable[..., "Report"]], Callable[..., None]]:
    """Options of a command that gets a `Plan` and how to say things, and gives a `Report`, which is shown."""
    options = [
        click.option("--json", "json_file", type=_file, metavar="FILE", help="Write figures there after each case."),
        click.option("--plot", "plot_file", type=_file, metavar="FILE", help="Draw them there (.svg, .png)."),
        click.option("--ways", type=Words(WAYS), default=",".join(ways), show_default=True, help="Ways to ask."),
        click.option("--rows", type=Words(), default=rows, show_default=True, help="Rows of a request."),
        click.option(
            "--connections",
            type=Words(),
            default="64,1",
            show_default=True,
            help="Requests in flight; over HTTP on a connection each.",
        ),
        click.option(
            "--seconds",
            type=click.FloatRange(0.1, 600),
            default=3.0,
            show_default=True,
            help="Of each run; wrk: whole.",
        ),
        click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Runs; medians count."),
        click.option(
            "--open-at",
            default="0.5,0.8",
            show_default=True,
            help="Open loops (Poisson) at these parts of what the closed loop reached; empty: none.",
        ),
        click.option(
            "--generators",
            type=click.IntRange(1, 64),
            default=1,
            show_default=True,
            help="Processes of our own load generator, where wrk is not used.",
        ),
        click.option("--quick", is_flag=True, help="Two runs of a second for each case, no open loops: a trial."),
    ]

    def decorate(command: Callable[..., "Report"]) -> Callable[..., None]:
        @wraps(command)
        def run(
            json_file: Path | None,
            plot_file: Path | None,
            ways: tuple[str, ...],
            rows: tuple[int, ...],
            connections: tuple[int, ...],
            seconds: float,
            rounds: int,
            open_at: str,
            generators: int,
            quick: bool,
            **others: Any,
        ) -> None:
            from narsil_stream.bench.shell import Plan

            plan = Plan(ways, rows, connections, seconds, rounds, _parts(open_at), generators, file=json_file)
            _show(lambda: command(_quick(plan) if quick else plan, _say(), quick=quick, **others), json_file, plot_file)

        for option in reversed(options):
            run = option(run)
        return run

    return decorate


def _parts(text: str) -> tuple[float, ...]:
    try:
        parts = tuple(float(word) for word in text.split(",") if word.strip())
    except ValueError:
        parts = (-1.0,)
    if not all(0 < part <= 2 for part in parts):
        raise click.BadParameter(f"{text!r} are no numbers above 0 and up to 2", param_hint="--open-at")
    return parts


def _quick(plan: "Plan") -> "Plan":
    from msgspec.structs import replace

    return replace(plan, seconds=1.0, rounds=2, open_at=())


def _say() -> Callable[[str], None]:
    started = time.monotonic()
    return lambda text: click.echo(f"[{time.monotonic() - started:5.0f} s] {text}", err=True)


def _show(measure: Callable[[], "Report"], json_file: Path | None, plot_file: Path | None) -> None:
    from narsil_stream.bench.load import LoadFailed
    from narsil_stream.bench.questions import Misbehaved
    from narsil_stream.bench.report import NoPlot, prepare, write
    from narsil_stream.bench.table import draw, markdown

    try:
        prepare(json_file, plot_file)
        report = measure()
        click.echo(markdown(report))
        if json_file:
            write(report, json_file)
        if plot_file:
            draw(report, plot_file)
    except (Misbehaved, LoadFailed, NoPlot, OSError) as error:
        raise click.ClickException(str(error)) from None


_table_rows = click.option(
    "--table-rows", type=click.IntRange(1), default=100_000, show_default=True, help="Rows of each of the 26 tables."
)


@click.command()
@click.option(
    "--inline", is_flag=True, help="Mode inline over HTTP as well, as a case of its own: no broker on the way."
)
@measurement(WAYS)
def shell(plan: "Plan", say: Callable[[str], None], *, quick: bool, inline: bool) -> "Report":
    """The whole pipeline around a model that costs nothing: what a request costs us.

    Broker, gateways, batcher and executor, each a process; beside a bare echo of the same bytes.

    Example: narsil bench shell --json shell.json; narsil bench shell --ways http --rows 100 --quick
    """
    from msgspec.structs import replace

    from narsil_stream.bench import shell as bench

    return bench.shell(replace(plan, inline=inline), say)


@click.command()
@_table_rows
@click.option("--backend", default="auto", show_default=True, help="As of `narsil serve`.")
@measurement(WAYS, rows="100")
def pipeline(plan: "Plan", say: Callable[[str], None], *, quick: bool, table_rows: int, backend: str) -> "Report":
    """The whole pipeline around the DLRM of the reference configuration, on this machine's CPU or GPU.

    Example: narsil bench pipeline --json pipeline.json; narsil bench pipeline --table-rows 1000 --quick
    """
    from narsil_stream.bench import shell as bench

    return bench.pipeline(plan, say, table_rows, backend)


@click.command()
@_table_rows
@click.option("--peers", "names", type=Words(PEERS), default=",".join(PEERS), show_default=True, help="Which.")
@click.option(
    "--kinds", type=Words(KINDS), default=",".join(KINDS), show_default=True, help="Models: none, or the DLRM."
)
@click.option(
    "--engines",
    type=Words(ENGINES),
    default=ENGINES[0],
    show_default=True,
    help="What the fastest peer runs as well: TorchRec's eager DLRM; FBGEMM's tables, on CUDA in a graph.",
)
@click.option(
    "--data-dir", type=click.Path(path_type=Path, file_okay=False), help="Where the peers' environments are kept."
)
@measurement(WAYS, rows="100,1")
def peers(
    plan: "Plan",
    say: Callable[[str], None],
    *,
    quick: bool,
    table_rows: int,
    names: tuple[str, ...],
    kinds: tuple[str, ...],
    engines: tuple[str, ...],
    data_dir: Path | None,
) -> "Report":
    """The same beside mosec, LitServe, Ray Serve and Triton, which are installed into environments of their own.

    They run the same engine on the same bytes, each in the best settings of a small grid. Who cannot be had is named.

    Example: narsil bench peers --peers mosec --json peers.json
    """
    from narsil_stream.bench.peers import peers as bench

    folder = data_dir or Path(os.environ.get("NARSIL_DATA_DIR") or default_data_dir(os.environ))
    return bench(kinds, names, plan, folder / "bench", table_rows, quick, say, engines)


@click.command()
@measurement(("nats",))
def broker(plan: "Plan", say: Callable[[str], None], *, quick: bool) -> "Report":
    """What a request costs each process of the pipeline in processor time; beside a bare echo of the same bytes.

    Example: narsil bench broker --quick; NARSIL_PLACEMENT=apart narsil bench broker --ways nats,http --rows 100
    """
    from narsil_stream.bench.broker import broker as bench

    return bench(plan, say)


@click.command()
@measurement(("http", "nats"), rows="100")
def scale(plan: "Plan", say: Callable[[str], None], *, quick: bool) -> "Report":
    """One, two, four of each actor, as far as there are cores.

    Example: narsil bench scale --quick
    """
    from narsil_stream.bench.scale import scale as bench

    return bench(plan, say)


COMMANDS = (shell, pipeline, peers, broker, scale)
