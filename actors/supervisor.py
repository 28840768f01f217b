"""`narsil serve`: broker, executors, batchers and gateways as processes of this machine, from start to drained stop."""

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from msgspec.structs import replace

from narsil_stream.actors.processes import Child
from narsil_stream.core import broker
from narsil_stream.core.bus import Bus
from narsil_stream.core.config import Config, child_environ
from narsil_stream.core.exposition import MetricsServer
from narsil_stream.core.ports import address, free_port
from narsil_stream.core.requester import Requester
from narsil_stream.schemas import subjects
from narsil_stream.schemas.errors import Refused
from narsil_stream.schemas.internal import BatcherBeat, ExecutorBeat, ModelCard, Report

log = logging.getLogger(__name__)

READY_TIMEOUT = 120.0
"""Seconds for all to be ready: a large model takes its time to load."""
KILL_MARGIN = 5.0
SILENT_AFTER_S = 3.0
"""Reports come every second."""
ONE_WISH_S = 0.5
"""Signals this close to the first are the same wish to stop: what signals a whole group, e.g. timeout(1) or systemd,
reaches this process and `make`, which passes it on."""

_decode_report = msgspec.msgpack.Decoder(Report).decode


class StartFailed(Exception):
    """Why the system did not come up."""


class Supervisor:
    """`run` from start to end. `on_ready` is called once with what is served, when requests would be answered."""

    def __init__(self, config: Config, on_ready: Callable[["Supervisor", list[ModelCard]], None]) -> None:
        self.config = config
        self._on_ready = on_ready
        self.children: list[Child] = []
        self.reports: dict[str, dict[str, tuple[Report, float]]] = {}
        """By the token of their process and actor, with the monotonic time when they came."""
        self._stop = asyncio.Event()
        self._stopping_s: float | None = None
        """Since when, monotonic: asked to by a signal, or for a process that was given up."""
        self._failed = ""
        self._broker_log = Path(os.devnull)

    async def run(self) -> int:
        """The exit code. Raises `PortTaken`, `StartFailed`."""
        self._listen_to_signals()
        self.config = self._with_free_ports(self.config)
        metrics = MetricsServer(
            self.config.metrics.host, self.config.metrics.port, self._all_reports, lambda: self.health()
        )
        bus = Bus(self.config.nats, "narsil-serve")
        try:
            metrics.start()
            cards = await self._unless_stopped(self._bring_up(bus))
            if cards is not None:
                self._on_ready(self, cards)
            await self._stop.wait()
            return 1 if self._failed else 0
        finally:
            await self._stop_children("gateway", "batcher", "executor")
            await bus.close()
            await self._stop_children("broker")
            metrics.stop()

    def health(self) -> dict[str, Any]:
        """Each process: what it is, whether it runs, what it says of itself."""
        rows = [row for child in self.children for row in self._rows(child)]
        return {"healthy": bool(rows) and all(row["state"] == "up" for row in rows), "actors": rows}

    def _rows(self, child: Child) -> Iterator[dict[str, Any]]:
        reports = self.reports.get(child.token, {}) if child.running else {}
        common = {"process": child.label, "pid": child.pid, "restarts": child.restarts}
        if child.kind == "broker":
            detail = f"nats://{address(self.config.nats.host, self.config.nats.port)}"
            yield {"kind": child.kind, "actor": child.label, "state": "up" if child.running else "down",
                   "detail": detail, **common}  # fmt: skip
        elif reports:
            for report, came in list(reports.values()):
                state = "silent" if time.monotonic() - came > SILENT_AFTER_S else report.state
                yield {"kind": report.kind, "actor": report.actor, "state": state,
                       "detail": report.detail, **common}  # fmt: skip
        else:
            state = "given up" if child.gave_up else "starting" if child.running else "down"
            yield {"kind": child.kind, "actor": child.label, "state": state, "detail": "", **common}

    # Start

    @staticmethod
    def _with_free_ports(config: Config) -> Config:
        """Each port checked before anything runs; 0 becomes a free one. Raises `PortTaken`."""
        http, grpc, metrics = config.http, config.grpc, config.metrics
        if http.processes:
            http = replace(http, port=free_port(http.host, http.port, "http.port"))
        if grpc.processes:
            grpc = replace(grpc, port=free_port(grpc.host, grpc.port, "grpc.port"))
        metrics = replace(metrics, port=free_port(metrics.host, metrics.port, "metrics.port"))
        nats = config.nats if config.nats.url else broker.resolve(config.nats)
        return replace(config, http=http, grpc=grpc, metrics=metrics, nats=nats)

    async def _bring_up(self, bus: Bus) -> list[ModelCard]:
        """What is served, once every process is up. Raises `StartFailed`."""
        await self._start_broker(bus)
        await self._connect(bus)
        await bus.listen(subjects.REPORT, self._on_report, _decode_report)
        await self._start_children(bus)
        return await self._all_ready(bus)

    async def _start_broker(self, bus: Bus) -> None:
        nats = self.config.nats
        if nats.url:
            return
        self._broker_log = broker.log_file(self.config.data_dir, nats)
        command = broker.tied(os.getpid(), *broker.command(self.config.data_dir, nats), "--log", str(self._broker_log))
        await self._start(Child("broker", "broker", command, broker.environment()), bus)
        if not await broker.wait_listening(nats.host, nats.port, 10.0):
            raise StartFailed(f"the broker did not start to listen on {address(nats.host, nats.port)} within 10 s")

    async def _connect(self, bus: Bus) -> None:
        try:
            await bus.connect()
        except Refused as refused:
            raise StartFailed(refused.detail) from None

    async def _start_children(self, bus: Bus) -> None:
        config, environ = self.config, child_environ(self.config, os.environ)
        executors, batchers = config.executor.executors, config.batch.batchers
        pairs = min(executors, batchers) if config.placement == "together" else 0
        parts: list[tuple[str, str, int, list[str]]] = [
            ("executor with batcher", "executor", pairs, ["--with-batcher"]),
            ("executor", "executor", executors - pairs, []),
            ("batcher", "batcher", batchers - pairs, []),
            ("http gateway", "gateway", config.http.processes, ["--door", "http"]),
            ("grpc gateway", "gateway", config.grpc.processes, ["--door", "grpc"]),
        ]
        if config.mode == "inline":
            parts = [("gateway", "gateway", 1, [])]
        for name, kind, count, options in parts:
            share = ["--share-port"] if kind == "gateway" and count > 1 else []
            for number in range(1, count + 1):
                label = name if count == 1 else f"{name} {number}"
                command = [sys.executable, "-m", "narsil_stream.cli", kind, *options, *share]
                await self._start(Child(label, kind, command, environ, reports=True), bus)

    async def _start(self, child: Child, bus: Bus) -> None:
        self.children.append(child)
        await child.start(partial(self._say_goodbye, bus), self._given_up)

    async def _all_ready(self, bus: Bus) -> list[ModelCard]:
        requester = Requester(self.config, bus)
        await requester.start()
        deadline = time.monotonic() + READY_TIMEOUT
        try:
            while not (self.health()["healthy"] and requester.ready):
                if time.monotonic() > deadline:
                    waiting = [row["actor"] for row in self.health()["actors"] if row["state"] != "up"]
                    raise StartFailed(f"not ready after {READY_TIMEOUT:.0f} s: {', '.join(waiting) or 'no model'}")
                await asyncio.sleep(0.05)
            return [await requester.card(ref.name, ref.version) for ref in requester.models()]
        finally:
            await requester.stop()

    async def _unless_stopped(self, starting: Coroutine[Any, Any, list[ModelCard]]) -> list[ModelCard] | None:
        """What `starting` returns, or None when a stop is asked for meanwhile."""
        task = asyncio.create_task(starting, name="bring up")
        stop = asyncio.create_task(self._stop.wait())
        await asyncio.wait((task, stop), return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        if task.done():
            return task.result()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        if self._failed:
            raise StartFailed(self._failed)
        return None

    # Reports

    def _on_report(self, report: Report) -> None:
        """Those of our own children: on a broker that others use too, anybody may report."""
        tokens = {child.token for child in self.children if child.reports}
        if report.token not in tokens:
            return
        self.reports = {token: of for token, of in self.reports.items() if token in tokens}
        mine = self.reports.setdefault(report.token, {})
        if report.state == "stopped":
            mine.pop(report.actor, None)
        else:
            mine[report.actor] = (report, time.monotonic())
            for child in self.children:
                child.came_up |= child.token == report.token and report.state == "up"

    def _all_reports(self) -> list[Report]:
        alive = {child.token for child in self.children if child.running}
        return [report for token, of in list(self.reports.items()) if token in alive for report, _ in list(of.values())]

    def _say_goodbye(self, bus: Bus, child: Child) -> None:
        """For actors that cannot any more: their open work goes elsewhere at once, not a lease later."""
        for report, _ in self.reports.pop(child.token, {}).values():
            if report.kind == "batcher":
                bus.broadcast(subjects.BATCHER_BEAT, BatcherBeat(report.actor, (), 0, state="gone"))
            elif report.kind == "executor":
                bus.broadcast(subjects.EXECUTOR_BEAT, ExecutorBeat(report.actor, (), 0, (), state="gone"))

    # Stop

    def _listen_to_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)

    def _on_signal(self) -> None:
        if self._stopping_s is None:
            log.info("stopping: what was accepted is answered first; once more kills what is left")
            self._begin_to_stop()
        elif time.monotonic() - self._stopping_s > ONE_WISH_S:
            log.warning("asked twice: killing what is left")
            for child in self.children:
                child.kill()

    def _begin_to_stop(self) -> None:
        self._stopping_s = time.monotonic()
        self._stop.set()

    def _given_up(self, child: Child) -> None:
        where = f"{self._broker_log}: its end says" if child.kind == "broker" else "its last messages above say"
        self._failed = f"{child.label} could not be kept running; {where} why"
        log.error("%s", self._failed)
        self._begin_to_stop()

    async def _stop_children(self, *kinds: str) -> None:
        """In this order: whoever goes can still talk to those it needs."""
        timeout = self.config.timing.drain_ms / 1e3 + KILL_MARGIN
        for kind in kinds:
            await asyncio.gather(*(child.stop(timeout) for child in self.children if child.kind == kind))
