"""How commands on models end when something is wrong."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import rich_click as click

P = ParamSpec("P")
R = TypeVar("R")


def plain_errors(command: Callable[P, R]) -> Callable[P, R]:
    """Faults of artifacts and files end in one message and exit code 1."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        from narsil_stream.kernels.artifact import ArtifactError
        from narsil_stream.kernels.train import TrainError

        try:
            return command(*args, **kwargs)
        except BrokenPipeError:
            raise  # click ends quietly when the reader of a pipe has left
        except (ArtifactError, TrainError, OSError) as error:
            raise click.ClickException(str(error)) from None

    return run
