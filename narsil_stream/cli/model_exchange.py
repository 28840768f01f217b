"""`narsil model import|export`: checkpoints of TorchRec's models, into artifacts and back."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import rich_click as click

from narsil_stream.cli.model_errors import plain_errors

if TYPE_CHECKING:
    from narsil_stream.schemas.model import Pooling

_path = click.Path(path_type=Path)


@click.command("import")
@click.argument("checkpoint", type=_path)
@click.argument("folder", type=_path)
@click.option("--name", default="dlrm", show_default=True, help="Under which it is served: letters, digits, _, -.")
@click.option("--version", default="1", show_default=True, help="Of the model, same letters.")
@click.option(
    "--pooling",
    type=click.Choice(["sum", "mean"]),
    default="sum",
    show_default=True,
    help="Of the EmbeddingBagConfigs: a state dict does not say.",
)
@click.option(
    "--tables",
    metavar="NAMES",
    default="",
    help="Order of the tables in the EmbeddingBagCollection, with commas between. Default: the checkpoint's; in "
    ".safetensors, which forgets it, by the numbers in their names.",
)
@click.option("--overwrite", is_flag=True, help="Replace an artifact that stands there.")
@plain_errors
def import_(
    checkpoint: Path, folder: Path, name: str, version: str, pooling: "Pooling", tables: str, overwrite: bool
) -> None:
    """Make an artifact in FOLDER of a TorchRec CHECKPOINT: the state dict of a DLRM or DLRM_DCN.

    A file of torch.save(model.state_dict(), ...) or a .safetensors file. Nothing in it executes. Weights keep every
    bit.

    Example: narsil model import dlrm.pt models/ctr --name ctr
    """
    from narsil_stream.kernels.artifact import need_free, write
    from narsil_stream.kernels.torch_family.checkpoint import read_checkpoint, to_artifact

    need_free(folder, overwrite)
    order = [table.strip() for table in tables.split(",")] if tables else []
    with _bar(f"reading {checkpoint.name}") as watch:
        state = read_checkpoint(checkpoint)
        made = to_artifact(state, name, version, pooling=pooling, tables=order, watch=watch)
    spec = write(folder, made, overwrite=overwrite)
    names = [table.name for table in spec.tables]
    click.echo(f"{len(names)} tables in this order: {', '.join(names)}")
    click.echo(f"Wrote {spec.name} to {folder}. Serve it: narsil serve --model {folder}")


@click.command()
@click.argument("folder", type=_path)
@click.argument("checkpoint", type=_path)
@click.option("--overwrite", is_flag=True, help="Replace a file that stands there.")
@plain_errors
def export(folder: Path, checkpoint: Path, overwrite: bool) -> None:
    """Write the artifact in FOLDER as a CHECKPOINT that TorchRec's DLRM or DLRM_DCN loads with load_state_dict.

    A name that ends in .safetensors gets that format, any other torch.save's. All weights are FP32: INT8 and FP16 rows
    are decoded.

    Example: narsil model export models/ctr dlrm.pt
    """
    from narsil_stream.kernels.artifact import ArtifactError, read
    from narsil_stream.kernels.torch_family.checkpoint import to_state, write_checkpoint

    if checkpoint.exists() and not overwrite:
        step = "choose another name, or overwrite it on purpose (--overwrite)"
        raise ArtifactError(str(checkpoint), "a file", "a free name", step)
    with _bar(f"writing {checkpoint.name}") as watch:
        state = to_state(read(folder), watch)
        write_checkpoint(checkpoint, state)
    click.echo(f"Wrote {len(state)} tensors to {checkpoint}.")


@contextmanager
def _bar(says: str) -> Iterator[Callable[[float], None]]:
    """A bar on stderr while the block runs; nothing where stderr is no terminal."""
    if not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(says, total=1.0)
        yield lambda done: bar.update(task, completed=done)
