"""`narsil top`: the actors of a running system, live."""

import asyncio
import contextlib
import json
import sys
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from math import isnan
from typing import NamedTuple

import msgspec
import rich_click as click
import uvloop
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from narsil_stream.cli.asking import CONNECT_S, say, setup_logs, told
from narsil_stream.cli.options import config_options
from narsil_stream.core.actor import now_us
from narsil_stream.core.bus import Bus
from narsil_stream.core.config import Loaded, NatsConfig
from narsil_stream.core.watching import Row, Watch, reading, total
from narsil_stream.schemas import subjects
from narsil_stream.schemas.errors import Fault, Refused
from narsil_stream.schemas.internal import Report

EVERY_S = 1.0
TWICE_S = 5.0
"""Everybody has reported twice by then."""
REMEMBERED = 60
WIDE = 112
"""Columns of a terminal that shows everything."""
BARS = " ▁▂▃▄▅▆▇█"
STATES = {"up": "green", "draining": "yellow", "starting": "yellow", "silent": "bold red", "down": "bold red"}

_decode = msgspec.msgpack.Decoder(Report).decode


@click.command()
@click.option("--once", is_flag=True, help="Print one table, as soon as there are rates, and end.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a second, a line each, for scripts.")
@config_options("nats")
def top(loaded: Loaded, once: bool, as_json: bool) -> None:
    """Show gateways, batchers and executors at work: queues, slots, rates and times, each second. Ctrl-C ends it.

    Numbers are what the actors themselves reported over the last second. p50 and p99 are from arrival to answer, for
    executors of one forward pass; they are interpolated between the bounds of a histogram. Slots are batches that an
    executor takes at once, and how many it has; for batchers, those that they may send now or have sent. CPU is of one
    core. Whoever has not reported for 3.5 s is silent.

    It needs nothing but the broker, on a broker with logins that of an administrator.

    Exit status: 0; 1 if the broker or the actors are not there, with the next step on stderr.

    Examples: narsil top; narsil top --once; narsil top --json --nats-url nats://broker:4222
    """
    setup_logs(loaded, "top")
    try:
        with contextlib.suppress(KeyboardInterrupt):
            uvloop.run(_watch(loaded.config.nats, once, as_json))
    except Refused as refused:
        say(told(refused))
        raise SystemExit(1) from None
    except BrokenPipeError:  # `narsil top --json | head -3`
        sys.stderr.close()


class _System:
    """What is heard of the actors on one broker."""

    def __init__(self, nats: NatsConfig) -> None:
        self.bus = Bus(nats, "narsil-top")
        self._watch = Watch()
        self._heard = asyncio.Event()

    @contextlib.asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        await self.bus.connect(CONNECT_S)
        try:
            await self.bus.listen(subjects.REPORT, self._take, _decode)
            yield
        finally:
            await self.bus.close()

    def _take(self, report: Report) -> None:
        with contextlib.suppress(ValueError):  # one bad process must not hide the others
            self._watch.add(reading(report, now_us()))
            self._heard.set()

    async def until(self, condition: Callable[[Watch], bool], seconds: float) -> bool:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not condition(self._watch):
                    await self._heard.wait()
                    self._heard.clear()
        return condition(self._watch)

    def rows(self) -> list[Row]:
        return self._watch.rows(now_us())

    def front(self) -> tuple[float, float]:
        return self._watch.front(now_us())


async def _watch(nats: NatsConfig, once: bool, as_json: bool) -> None:
    system = _System(nats)
    async with system.listening():
        if not await system.until(lambda watch: bool(watch.rows(now_us())), CONNECT_S):
            detail = f"the broker at {system.bus.where} is there, but no actor reports on it"
            raise Refused(Fault.UNAVAILABLE, detail)
        if once:
            await system.until(Watch.ready, TWICE_S)
        if as_json:
            await _print_json(system, once)
        elif once:
            console = Console()
            console.print(_screen(system, deque(), console.width))
        else:
            await _show(system)


async def _print_json(system: _System, once: bool) -> None:
    while True:
        print(json.dumps(_as_json(system.rows())), flush=True)
        if once:
            return
        await asyncio.sleep(EVERY_S)


async def _show(system: _System) -> None:
    history: deque[float] = deque(maxlen=REMEMBERED)
    console = Console()
    with Live(console=console, screen=console.is_terminal, auto_refresh=False) as live:
        while True:
            history.append(_front_total(system.rows(), "rows_per_s"))
            live.update(_screen(system, history, console.width), refresh=True)
            await asyncio.sleep(EVERY_S)


def _screen(system: _System, history: deque[float], width: int) -> RenderableType:
    return Group(_summary(system, history), _table(system.rows(), width))


def _summary(system: _System, history: deque[float]) -> Text:
    """What the callers get."""
    rows, (p50, p99), bus = system.rows(), system.front(), system.bus
    up = sum(row.state == "up" for row in rows)
    line = Text.assemble(("narsil top", "bold"), f"  {bus.where}  {time.strftime('%H:%M:%S')}  ")
    line.append(f"{up} of {len(rows)} up", style="green" if up == len(rows) else "bold red")
    if not bus.connected:
        line.append("  the broker is not connected", style="bold red")
    line.append(
        f"\n{_sum(rows, 'requests_per_s')} requests/s   {_sum(rows, 'rows_per_s')} rows/s   "
        f"p50 {_number(p50) or '-'} ms   p99 {_number(p99) or '-'} ms   "
        f"refused {_sum(rows, 'refused_per_s')}/s   failed {_sum(rows, 'failed_per_s')}/s"
    )
    if len(history) > 1:
        line.append(f"\nrows/s {_sparkline(history)}", style="cyan")
    return line


def _front_total(rows: list[Row], name: str) -> float:
    """Over gateways and producers alike: whatever comes, batchers see it."""
    return total(getattr(row, name) for row in rows if row.kind == "batcher")


def _sum(rows: list[Row], name: str) -> str:
    return _number(_front_total(rows, name)) or "-"


def _sparkline(history: deque[float]) -> str:
    known = [0.0 if isnan(value) else value for value in history]
    most = max(known) or 1.0
    return "".join(BARS[round(value / most * (len(BARS) - 1))] for value in known)


def _table(rows: list[Row], width: int) -> Table:
    """On a narrow terminal without what can wait for a wide one."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1))
    columns = [column for column in COLUMNS if width >= WIDE or column.always]
    for column in columns:
        table.add_column(column.title, justify="right" if column.number else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(column.cell(row) for column in columns))
    return table


class Column(NamedTuple):
    title: str
    cell: Callable[[Row], str | Text]
    always: bool = True
    number: bool = True


def _slots(row: Row) -> str:
    return "" if isnan(row.slots) else f"{row.slots_busy:.0f} of {row.slots:.0f}"


def _number(value: float) -> str:
    """Three digits that matter; nothing for what is not known."""
    if isnan(value):
        return ""
    if value >= 100 or value == round(value):
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _as_json(rows: list[Row]) -> list[dict[str, object]]:
    """What is not known is null: JSON has no NaN."""
    return [
        {name: None if isinstance(value, float) and isnan(value) else value
         for name, value in msgspec.structs.asdict(row).items()}
        for row in rows
    ]  # fmt: skip


COLUMNS = (
    Column("actor", lambda row: row.actor, number=False),
    Column("state", lambda row: Text(row.state, style=STATES.get(row.state, "")), number=False),
    Column("req/s", lambda row: _number(row.requests_per_s)),
    Column("rows/s", lambda row: _number(row.rows_per_s)),
    Column("p50 ms", lambda row: _number(row.p50_ms)),
    Column("p99 ms", lambda row: _number(row.p99_ms)),
    Column("queue", lambda row: _number(row.queue_rows)),
    Column("wait p99", lambda row: _number(row.queue_p99_ms), always=False),
    Column("slots", _slots),
    Column("refused/s", lambda row: _number(row.refused_per_s), always=False),
    Column("failed/s", lambda row: _number(row.failed_per_s), always=False),
    Column("CPU %", lambda row: _number(row.cpu_percent)),
    Column("MiB", lambda row: _number(row.memory_mib), always=False),
)
