"""A progress bar on stderr, for people only."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Show = Callable[[int, int], None]
"""How far it is, and how many of what is counted are done."""


@contextmanager
def progress(total: int, counted: str = "rows") -> Iterator[Show]:
    """A bar while the block runs, if stderr is a terminal. `total` 0: not known, so it only says rows and rows/s."""
    if not sys.stderr.isatty():
        yield lambda position, rows: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

    size = (BarColumn(), TaskProgressColumn(), TimeRemainingColumn()) if total else (SpinnerColumn(),)
    bar = Progress(*size, TextColumn("{task.fields[said]}"), console=Console(stderr=True), transient=True)
    task = bar.add_task("score", total=total or None, said="")
    started = time.monotonic()

    def show(position: int, rows: int) -> None:
        rate = rows / max(time.monotonic() - started, 1e-3)
        bar.update(task, completed=position, said=f"{rows:,} {counted}, {rate:,.0f} {counted}/s")

    with bar:
        yield show
