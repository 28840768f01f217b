"""Options that say how a model is built: what `narsil model init` and `narsil model train` have in common."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import rich_click as click

if TYPE_CHECKING:
    from narsil_stream.schemas.model import ModelSpec, Pooling, RowType

R = TypeVar("R")


class Shape(NamedTuple):
    """Values of these options."""

    name: str
    version: str
    rows: int
    dim: int
    bottom: tuple[int, ...]
    top: tuple[int, ...]
    architecture: Literal["dlrm-dot", "dcn-v2"]
    cross_layers: int | None
    cross_rank: int | None
    pooling: "Pooling"

    def spec(self, dense: int, tables: int, precision: "RowType" = "FP32") -> "ModelSpec":
        """Raises click.UsageError: a cross network's options without one."""
        from narsil_stream.kernels.init import Cross, plain_spec

        given = {"layers": self.cross_layers, "rank": self.cross_rank}
        chosen = {key: value for key, value in given.items() if value is not None}
        if chosen and self.architecture != "dcn-v2":
            raise click.UsageError(f"--cross-{next(iter(chosen))} needs --architecture dcn-v2")
        cross = Cross(**chosen) if self.architecture == "dcn-v2" else None
        layers = (self.dim, self.bottom, self.top)
        table_rows = [self.rows] * tables
        return plain_spec(
            self.name, dense, table_rows, *layers, precision, self.version, cross=cross, pooling=self.pooling
        )


def shape_options(command: Callable[..., R]) -> Callable[..., R]:
    """Give the command these options, as `shape`, and --seed and --overwrite."""

    @functools.wraps(command)
    def run(*args: Any, **options: Any) -> R:
        shape = Shape(**{key: options.pop(key) for key in Shape._fields})
        return command(*args, shape=shape, **options)

    for option in reversed(_OPTIONS):
        run = option(run)
    return run


def _widths(ctx: click.Context, param: click.Parameter, value: str) -> tuple[int, ...]:
    """Comma-separated layer widths; an empty text means no layer."""
    try:
        widths = tuple(int(part) for part in value.split(",")) if value else ()
    except ValueError:
        widths = (0,)
    if not all(1 <= width <= 65_536 for width in widths):
        raise click.BadParameter(f"{value!r}: expected numbers from 1 to 65536 with commas between, e.g. 64,32")
    return widths


def _option(name: str, kind: Any, default: Any, says: str) -> Callable[..., Any]:
    return click.option(name, type=kind, default=default, show_default=True, help=says)


def _layers(name: str, default: str, says: str) -> Callable[..., Any]:
    return click.option(name, callback=_widths, metavar="WIDTHS", default=default, show_default=True, help=says)


_WIDTH = click.IntRange(1, 65_536)
_OPTIONS = (
    _option("--name", str, "dlrm", "Under which it is served: letters, digits, _, -."),
    _option("--version", str, "1", "Of the model, same letters."),
    _option("--rows", click.IntRange(1, 2**31 - 1), 10_000, "Rows of each embedding table."),
    _option("--dim", _WIDTH, 16, "Width of an embedding row."),
    _layers("--bottom", "64", "Hidden layers for dense features."),
    _layers("--top", "64,32", "Hidden layers after interaction."),
    _option(
        "--architecture",
        click.Choice(["dlrm-dot", "dcn-v2"]),
        "dlrm-dot",
        "Interaction by dot products, or by a low-rank cross network.",
    ),
    click.option("--cross-layers", type=click.IntRange(1, 32), help="Of dcn-v2: 3 unless given."),
    click.option("--cross-rank", type=_WIDTH, help="Of dcn-v2: 64 unless given."),
    _option("--pooling", click.Choice(["sum", "mean"]), "sum", "What becomes of several rows of one table."),
    _option("--seed", click.IntRange(0), 0, "The same gives the same model."),
    click.option("--overwrite", is_flag=True, help="Replace an artifact that stands there."),
)
