"""One process of actors: connection, supervision, signals, and the order in which all of it ends."""

import asyncio
import contextlib
import logging
import os
import random
import signal
import sys
from collections import deque
from collections.abc import Awaitable, Callable
from itertools import groupby
from typing import Any, Self

from narsil_stream.core.actor import Actor
from narsil_stream.core.bus import Bus
from narsil_stream.core.config import Config
from narsil_stream.core.service import ServiceApi
from narsil_stream.core.telemetry import Telemetry, gauges, settle_gc, text
from narsil_stream.core.tuning import Tuning
from narsil_stream.schemas import subjects
from narsil_stream.schemas.internal import Report

log = logging.getLogger(__name__)

REPORT_EVERY = 1.0
BACKOFF = (0.1, 5.0)
GIVE_UP = (5, 60.0)
"""An actor that failed this often within this many seconds is given up, and its process with it."""


class Backoff:
    """Delays between restarts, growing and jittered; and when to give up."""

    def __init__(self) -> None:
        self._failures: deque[float] = deque(maxlen=GIVE_UP[0])

    def failed(self, now: float) -> float | None:
        """Seconds to wait before the next try; None: give up."""
        self._failures.append(now)
        if len(self._failures) == GIVE_UP[0] and now - self._failures[0] < GIVE_UP[1]:
            return None
        return float(min(BACKOFF[1], BACKOFF[0] * 2 ** len(self._failures)) * random.uniform(0.5, 1.0))


class Runtime:
    """Use as `async with Runtime(config, "batcher") as runtime`, `start` actors, then `until_stopped`."""

    def __init__(self, config: Config, role: str, token: str = "") -> None:
        self.config = config
        self.role = role
        self.token = token
        """Repeated in reports; see `Report.token`."""
        self.reports: list[Report] = []
        """The newest of each actor; replaced as a whole, so that other threads may read it."""
        self.bus = Bus(config.nats, f"narsil-{role}")
        self.telemetry = Telemetry()
        gauges(self.telemetry.registry, narsil_bus_dropped=("Messages lost at this end", lambda: self.bus.dropped))
        self.actors: list[Actor[Any]] = []
        self.tuning = Tuning(self.bus, config, lambda: self.actors)
        self._tasks: asyncio.TaskGroup = asyncio.TaskGroup()
        self._running: dict[str, asyncio.Task[None]] = {}
        self._stop = asyncio.Event()
        self._failure: str = ""
        self._gone: list[Report] = []
        """The last of each actor that was replaced, until the broker takes it."""

    async def __aenter__(self) -> Self:
        await self.bus.connect()
        self.telemetry.start()
        await self._tasks.__aenter__()
        self._tasks.create_task(self._report_forever(), name="report")
        self._tasks.create_task(self._watch_bus(), name="bus watch")
        return self

    async def __aexit__(self, *error: Any) -> None:
        self._stop.set()
        for task in self._running.values():
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._tasks.__aexit__(None, None, None)
        self.telemetry.stop()
        await self.tuning.stop()
        await self.bus.flush()
        await self.bus.close()

    async def start(self, build: Callable[[], Actor[Any]]) -> Actor[Any]:
        """Start an actor and keep it alive; `build` makes a new one after a crash. Raises what its start raises."""
        actor = build()
        await actor.start()
        actor.state = "up"
        actor.tune(self.tuning.config)
        self.actors.append(actor)
        self._running[actor.name] = self._tasks.create_task(self._supervise(actor, build), name=actor.name)
        await asyncio.sleep(0)  # a task that is cancelled before its first step would not stop its actor
        if actor.tunable:
            await self.tuning.start()
        log.info("%s is ready", actor.name)
        return actor

    async def until_stopped(self, watch_stdin: bool = False) -> int:
        """Run until SIGTERM, SIGINT, the end of the parent (`watch_stdin`) or a failure; then drain. The exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.request_stop)
        if watch_stdin:
            loop.add_reader(sys.stdin.fileno(), self._on_stdin)
        settle_gc()
        self._report()
        await self._stop.wait()
        await self.drain()
        if self._failure:
            log.error("%s", self._failure)
            return 1
        return 0

    def request_stop(self) -> None:
        self._stop.set()

    async def drain(self) -> None:
        """The last started go first: gateways before batchers before executors; those of a kind at the same time.

        One time for all of them.
        """
        deadline = asyncio.get_running_loop().time() + self.config.timing.drain_ms / 1e3
        places = reversed(range(len(self.actors)))
        for _, together in groupby(places, key=lambda place: self.actors[place].kind):
            await asyncio.gather(*(self._drain_and_stop(place, deadline) for place in together))
        self.actors.clear()

    async def _drain_and_stop(self, place: int, deadline: float) -> None:
        actor = self.actors[place]  # only now: it may have been replaced while others drained
        running = self._running.pop(actor.name)
        if actor.state != "down":
            actor.state = "draining"
            self._report()
            await self._drain(actor, running, deadline)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        actor.state = "stopped"

    async def _drain(self, actor: Actor[Any], running: asyncio.Task[None], deadline: float) -> None:
        """Ends also when the actor fails meanwhile: then nobody works for it any more."""
        draining = asyncio.create_task(actor.drain(), name=f"{actor.name} drains")
        try:
            left = max(0.0, deadline - asyncio.get_running_loop().time())
            await asyncio.wait((draining, running), timeout=left, return_when=asyncio.FIRST_COMPLETED)
            if not draining.done() and not running.done():
                log.warning("%s still had work when the time to drain was over", actor.name)
        finally:
            draining.cancel()
            (result,) = await asyncio.gather(draining, return_exceptions=True)
            if isinstance(result, Exception):
                log.error("%s did not drain", actor.name, exc_info=result)

    async def _supervise(self, actor: Actor[Any], build: Callable[[], Actor[Any]]) -> None:
        backoff = Backoff()
        while True:
            await self._live(actor)
            if actor.state == "draining":
                return
            replacement = await self._again(actor, build, backoff)
            if replacement is None:
                self._failure = f"{actor.name} failed {GIVE_UP[0]} times within {GIVE_UP[1]:.0f} s: giving up"
                self._stop.set()
                return
            self._replace(actor, replacement)
            actor = replacement

    async def _live(self, actor: Actor[Any]) -> None:
        """Until it fails."""
        service = ServiceApi(self.bus, actor.kind, actor.name, actor.endpoints)
        try:
            await service.start()
            await actor.run()
        except Exception:
            log.exception("%s failed", actor.name)
            if actor.state != "draining":
                actor.state = "down"
                self._report()
        finally:
            await _shielded(actor.stop())
            await _shielded(service.stop())

    async def _again(self, failed: Actor[Any], build: Callable[[], Actor[Any]], backoff: Backoff) -> Actor[Any] | None:
        """Another one, started; None: given up."""
        while (delay := backoff.failed(asyncio.get_running_loop().time())) is not None:
            await asyncio.sleep(delay)
            replacement = None
            try:
                replacement = build()
                await replacement.start()
                return replacement
            except BaseException as error:
                if replacement is not None:
                    await _shielded(replacement.stop())
                if not isinstance(error, Exception):
                    raise
                log.exception("%s did not start again", failed.name)
        return None

    def _replace(self, old: Actor[Any], new: Actor[Any]) -> None:
        old.state, new.state = "stopped", "up"
        new.tune(self.tuning.config)
        self.actors[self.actors.index(old)] = new
        self._running[new.name] = self._running.pop(old.name)
        self._gone.append(Report(old.kind, old.name, os.getpid(), old.state, "", "", self.token))
        self._report()
        log.info("%s replaces %s", new.name, old.name)

    async def _watch_bus(self) -> None:
        """A connection that is closed for good ends the process: the one who started it decides what next."""
        closed = asyncio.create_task(self.bus.closed.wait())
        stopped = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait((closed, stopped), return_when=asyncio.FIRST_COMPLETED)
            if closed.done() and not stopped.done():
                self._failure = f"the broker at {self.bus.where} refused this connection for good"
                self._stop.set()
        finally:
            closed.cancel()
            stopped.cancel()

    async def _report_forever(self) -> None:
        while not self._stop.is_set():
            self._report()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), REPORT_EVERY)

    def health(self) -> dict[str, Any]:
        """As `narsil serve` says it of all processes, for this one."""
        rows = [{"kind": r.kind, "actor": r.actor, "state": r.state, "detail": r.detail} for r in self.reports]
        return {"healthy": bool(rows) and all(row["state"] == "up" for row in rows), "actors": rows}

    def _report(self) -> None:
        process = text(self.telemetry.registry)
        reports = []
        for actor in self.actors:
            metrics = text(actor.registry) + process
            process = ""  # once for each process
            reports.append(
                Report(actor.kind, actor.name, os.getpid(), actor.state, actor.detail(), metrics, self.token)
            )
        self.reports = reports
        if self.bus.connected:
            reports, self._gone = self._gone + reports, []
        for report in reports:
            self.bus.broadcast(subjects.REPORT, report)

    def _on_stdin(self) -> None:
        if not os.read(sys.stdin.fileno(), 4096):
            asyncio.get_running_loop().remove_reader(sys.stdin.fileno())
            log.warning("the process that started this one is gone: stopping")
            self.request_stop()


async def _shielded(ending: Awaitable[None]) -> None:
    """Runs an ending to its end even when the task around it is being cancelled."""
    task = asyncio.ensure_future(ending)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.gather(task, return_exceptions=True)
        raise
    except Exception:
        log.exception("an actor did not end cleanly")
