"""`narsil token`: a bearer token for the gateways, and the line that lets it in."""

import os
from pathlib import Path

import rich_click as click

from narsil_stream.core import tokens
from narsil_stream.core.tokens import SCOPES, Scope


@click.command()
@click.option(
    "--scope",
    "scopes",
    type=click.Choice(SCOPES),
    multiple=True,
    default=("infer",),
    show_default=True,
    help="What it allows; may be given twice. infer: requests; admin: to load and unload models.",
)
@click.option("--name", "who", default="", metavar="WHO", help="Whose it is, for who reads the file.")
@click.option(
    "--file",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Add the line to this file, which access.tokens_file names; made for its owner alone if it is not there.",
)
def token(scopes: tuple[Scope, ...], who: str, file: Path | None) -> None:
    """Make a bearer token. It is printed once and kept nowhere: the file holds its SHA-256 digest.

    A caller sends it as the header `authorization: Bearer TOKEN`. To take it back, delete its line: gateways read the
    file again within a second.

    Examples: narsil token --file tokens; narsil token --scope admin --name ops --file tokens
    """
    new = tokens.make()
    try:
        line = tokens.line(new, frozenset(scopes), who)
        if file is not None:
            _append(file, line)
    except (OSError, ValueError) as error:
        raise click.ClickException(str(error)) from None
    click.echo(new)
    if file is None:
        click.echo(f"A line for the file that access.tokens_file names:\n{line}", err=True)


def _append(file: Path, line: str) -> None:
    """One write, so that no gateway reads half of it. Raises ValueError if the file is none of tokens."""
    with open(file, "ab+", opener=lambda path, flags: os.open(path, flags, 0o600)) as end:
        end.seek(0)
        before = end.read()
        try:
            tokens.parse(before)
        except ValueError as error:
            raise ValueError(f"{file} is no file of tokens: {error}") from None
        end.write(b"\n" * (before[-1:] not in (b"", b"\n")) + line.encode() + b"\n")
