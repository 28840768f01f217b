"""The command `narsil`. Each command's module is imported when that command runs, so that help and errors are quick."""

import sys

import rich_click as click

from narsil_stream.cli.group import LazyGroup
from narsil_stream.cli.group import cli as cli

__all__ = ["LazyGroup", "cli", "main"]


def main() -> None:
    """Entry point of the console script and of `python -m narsil_stream`.

    What ends a command is one plain line: boxes break paths and hashes where people want to copy them.
    """
    try:
        code = cli.main(prog_name="narsil", standalone_mode=False)
    except click.UsageError as error:
        error.show()
        code = error.exit_code
    except click.ClickException as error:
        click.echo(f"narsil: {error.format_message()}", err=True)
        code = error.exit_code
    except click.Abort:
        code = 130
    sys.exit(code if isinstance(code, int) else 0)
