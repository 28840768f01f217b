"""`narsil model`: make, train, import, shrink, look at and check artifacts."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click

from narsil_stream.cli.model_errors import plain_errors
from narsil_stream.cli.model_exchange import export, import_
from narsil_stream.cli.model_shape import Shape, shape_options

if TYPE_CHECKING:
    from narsil_stream.kernels.train import Watch
    from narsil_stream.schemas.model import ModelSpec, RowType

_folder = click.Path(path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def model() -> None:
    """Make, import, train, shrink, inspect and check model artifacts.

    An artifact is a folder: model.json says what the model is, weights.safetensors holds its numbers. Nothing in it
    ever executes.

    Example, from nothing to a checked INT8 model:

    \b
        narsil model synthesize clicks.tsv --rows 200000
        narsil model train clicks.tsv models/ctr --name ctr
        narsil model quantize models/ctr models/ctr-int8
        narsil model verify models/ctr-int8
    """


model.add_command(import_)
model.add_command(export)


@model.command()
@click.argument("folder", type=_folder)
@shape_options
@click.option(
    "--dense", type=click.IntRange(1, 65_536), default=13, show_default=True, help="Number of dense features."
)
@click.option("--tables", type=click.IntRange(1, 4096), default=26, show_default=True, help="Number of tables.")
@click.option(
    "--precision", type=click.Choice(["FP32", "FP16", "INT8"]), default="FP32", show_default=True, help="Of table rows."
)
@plain_errors
def init(folder: Path, shape: Shape, seed: int, overwrite: bool, dense: int, tables: int, precision: "RowType") -> None:
    """Write a model with random weights: to try the pipeline or to measure it.

    Scores differ between rows and do not saturate. With 13 dense features and 26 tables it reads Criteo rows.

    Example: narsil model init models/big --rows 1000000 --dim 64 --bottom 512,256 --top 512,512,256 --precision INT8
    or, after MLPerf's DLRM-v2, with --architecture dcn-v2 --cross-rank 512 --dim 128 --top 1024,1024,512,256
    """
    from narsil_stream.kernels.artifact import need_free, write
    from narsil_stream.kernels.init import random_model

    need_free(folder, overwrite)
    spec = shape.spec(dense, tables, precision)
    write(folder, random_model(spec, seed), overwrite=overwrite)
    click.echo(f"Wrote {spec.name} to {folder}. Serve it: narsil serve --model {folder}")


@model.command()
@click.argument("data", type=click.Path(path_type=Path))
@click.argument("folder", type=_folder)
@shape_options
@click.option("--epochs", type=click.IntRange(1), default=1, show_default=True, help="Passes over the data.")
@click.option("--batch-rows", type=click.IntRange(1), default=512, show_default=True, help="Rows in one step.")
@click.option(
    "--learning-rate",
    type=click.FloatRange(0, min_open=True),
    default=0.02,
    show_default=True,
    help="Of Adagrad. Wide cross networks: 0.005.",
)
@click.option(
    "--holdout-every", type=click.IntRange(2), default=10, show_default=True, help="Measure on every so many lines."
)
@click.option("--skip-bad", is_flag=True, help="Leave out bad rows and count them, instead of ending at the first.")
@plain_errors
def train(data: Path, folder: Path, shape: Shape, seed: int, overwrite: bool, **settings: Any) -> None:
    """Train a model on labelled Criteo rows (a file: label, I1 to I13, C1 to C26, TAB between) and write it to FOLDER.

    Every tenth line is held out; AUC and log loss on these are printed, and kept in the artifact. Needs torch.

    Example: narsil model train day_0.tsv models/ctr --name ctr --rows 100000 --epochs 2
    """
    from narsil_stream.kernels import train as training
    from narsil_stream.schemas.model import CRITEO_SHAPE

    spec = shape.spec(*CRITEO_SHAPE)
    with _training_bar() as watch:
        trained = training.train(
            data, folder, spec, training.Settings(seed=seed, **settings), watch, overwrite=overwrite
        )
    click.echo(_metrics_line(trained))
    click.echo(f"Wrote {spec.name} to {folder}. Serve it: narsil serve --model {folder}")


@model.command()
@click.argument("source", type=_folder)
@click.argument("target", type=_folder)
@click.option(
    "--to", "dtype", type=click.Choice(["INT8", "FP16"]), default="INT8", show_default=True, help="Type of table rows."
)
@click.option(
    "--rows", type=click.IntRange(1), default=10_000, show_default=True, help="Random rows to compare the scores on."
)
@click.option("--overwrite", is_flag=True, help="Replace an artifact that stands at TARGET.")
@plain_errors
def quantize(source: Path, target: Path, dtype: "RowType", rows: int, overwrite: bool) -> None:
    """Write the model in SOURCE with smaller embedding rows to TARGET, and say what that does to its scores.

    FP16 rows take half the memory of FP32, INT8 rows about a quarter: 8 bits a value, and for each row a scale and an
    offset.

    Example: narsil model quantize models/ctr models/ctr-int8 --to INT8
    """
    import msgspec

    from narsil_stream.kernels.artifact import Artifact, layout, need_free, read, write
    from narsil_stream.kernels.init import random_batch
    from narsil_stream.kernels.quantize import drift
    from narsil_stream.kernels.quantize import quantize as smaller
    from narsil_stream.kernels.reference import Reference

    need_free(target, overwrite)
    before = read(source)
    after = smaller(before, dtype)
    apart = drift(Reference(before), Reference(after), random_batch(before.spec, rows, seed=0))
    metrics = after.spec.metrics | {"max_score_drift": apart.max_abs}
    spec = write(
        target, Artifact(msgspec.structs.replace(after.spec, metrics=metrics), after.tensors), overwrite=overwrite
    )
    sizes = [_size(sum(slot.nbytes for slot in layout(part).values())) for part in (before.spec, spec)]
    click.echo(f"{sizes[0]} -> {sizes[1]}; scores of {rows:,} random rows move by at most {apart.max_abs:.2g}")
    click.echo(f"(mean {apart.mean_abs:.2g}). Wrote {spec.name} to {target}.")


@model.command()
@click.argument("folder", type=_folder)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")
@plain_errors
def inspect(folder: Path, as_json: bool) -> None:
    """Show what a model is: tables, layers, sizes, precision, metrics. Reads model.json alone, so it is always quick.

    Example: narsil model inspect models/ctr --json
    """
    from narsil_stream.cli.model_view import as_table, described
    from narsil_stream.kernels.artifact import read_spec

    spec = read_spec(folder)
    if as_json:
        import msgspec

        click.echo(msgspec.json.format(msgspec.json.encode(described(spec)), indent=2))
        return
    from rich.console import Console

    Console().print(as_table(spec))


@model.command()
@click.argument("folder", type=_folder)
@plain_errors
def verify(folder: Path) -> None:
    """Check every byte of an artifact: sha256, names, types and shapes of all tensors, no NaN. Exit code 1 if unfit.

    Example: narsil model verify models/ctr && narsil serve --model models/ctr
    """
    from narsil_stream.kernels.artifact import WEIGHTS, read

    artifact = read(folder)
    size = _size(sum(tensor.nbytes for tensor in artifact.tensors.values()))
    spec = artifact.spec
    click.echo(f"OK: {spec.name} version {spec.version}, {len(artifact.tensors)} tensors, {size}")
    click.echo(f"sha256 of {WEIGHTS}: {spec.files[WEIGHTS]}")


@model.command()
@click.argument("file", type=click.File("wb", lazy=True))
@click.option("--rows", type=click.IntRange(1), default=100_000, show_default=True, help="How many.")
@click.option("--seed", type=click.IntRange(0), default=0, show_default=True, help="Another draws other rows.")
@click.option("--labels/--no-labels", default=True, show_default=True, help="Whether rows begin with their label.")
@plain_errors
def synthesize(file: Any, rows: int, seed: int, labels: bool) -> None:
    """Write synthetic click rows in Criteo's format to FILE (- for standard output).

    The labels are drawn from known probabilities: the best AUC and log loss that any model can reach on these rows are
    printed.

    Example: narsil model synthesize test.tsv --rows 50000 --seed 7
    """
    import numpy as np

    from narsil_stream.kernels.metrics import auc, log_loss
    from narsil_stream.kernels.synthetic import clicks

    pieces = []
    for piece in clicks(rows, seed, labelled=labels):
        file.write(piece.text)
        pieces.append((piece.labels, piece.probability))
    truth, chances = (np.concatenate(column) for column in zip(*pieces, strict=True))
    best = auc(truth, chances)
    told = "" if best is None else f"Best AUC {best:.4f}, "
    click.echo(f"Wrote {rows:,} rows. {told}least log loss {log_loss(truth, chances):.4f}.", err=True)


@contextmanager
def _training_bar() -> Iterator["Watch"]:
    """A bar on stderr while the block runs; nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda progress: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    bar = Progress(*columns, TextColumn("{task.fields[said]}"), console=Console(stderr=True), transient=True)
    task = bar.add_task("reading", total=1.0, said="")
    with bar:
        yield lambda now: bar.update(
            task, completed=now.done, description=now.stage, said=f"{now.rows:,} rows, log loss {now.loss:.4f}"
        )


def _metrics_line(spec: "ModelSpec") -> str:
    known = spec.metrics
    rows = f"Trained on {known['train_rows']:,.0f} rows, measured on {known['holdout_rows']:,.0f} held out"
    skipped = f", left out {known['skipped_rows']:,.0f} bad ones" if known["skipped_rows"] else ""
    quality = [f"{label} {known[key]:.4f}" for key, label in (("auc", "AUC"), ("log_loss", "log loss")) if key in known]
    return f"{rows}{skipped}: {', '.join(quality) or 'too few to measure'}"


def _size(count: int) -> str:
    from narsil_stream.cli.model_view import size

    return size(count)
