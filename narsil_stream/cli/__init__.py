"""The command `narsil`. Each command's module is imported when that command runs, so that help and errors are quick."""

from narsil_stream.cli.group import LazyGroup
from narsil_stream.cli.group import cli as cli

__all__ = ["LazyGroup", "cli", "main"]


def main() -> None:
    """Entry point of the console script and of `python -m narsil_stream`."""
    cli(prog_name="narsil")
