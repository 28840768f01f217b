"""Child processes of `narsil serve`: started, watched, started again after a crash, stopped in order."""

import asyncio
import contextlib
import logging
import os
import secrets
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from narsil_stream.core.runtime import Backoff

log = logging.getLogger(__name__)

CANNOT_SUCCEED = 78
"""Exit status (EX_CONFIG) of an actor that would fail again, e.g. for a damaged model."""


@dataclass(eq=False)
class Child:
    """One supervised process. `label` is for people, e.g. "batcher 2"."""

    label: str
    kind: str
    command: list[str]
    environ: dict[str, str]
    reports: bool = False
    """It is an actor, which takes `--parent TOKEN` and repeats the token in its reports."""
    token: str = ""
    process: asyncio.subprocess.Process | None = None
    came_up: bool = False
    """It worked since it was last started, so its next end is no sign that it cannot."""
    restarts: int = 0
    stopping: bool = False
    gave_up: bool = False
    _backoff: Backoff = field(default_factory=Backoff)
    _watch: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int:
        return self.process.pid if self.process is not None else 0

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.returncode is None

    async def start(self, ended: Callable[["Child"], None], given_up: Callable[["Child"], None]) -> None:
        """`ended` is called at each end that nobody asked for, before it is started again."""
        await self._spawn()
        self._watch = asyncio.create_task(self._keep_alive(ended, given_up), name=f"watch {self.label}")

    async def _spawn(self) -> None:
        """In a session of its own, so that Ctrl-C reaches the supervisor alone, which then drains in order.

        The child's stdin is a pipe that nobody writes to: it ends when this process dies, however it dies.
        """
        command = self.command
        if self.reports:
            self.token = secrets.token_hex(8)
            command = [*command, "--parent", self.token]
        self.process = await asyncio.create_subprocess_exec(
            *command, stdin=asyncio.subprocess.PIPE, env=self.environ, start_new_session=True
        )

    async def _keep_alive(self, ended: Callable[["Child"], None], given_up: Callable[["Child"], None]) -> None:
        while self.process is not None:
            code = await self.process.wait()
            if self.stopping:
                return
            ended(self)
            self.restarts += 1
            if self.came_up:
                self._backoff, self.came_up = Backoff(), False
            delay = None if code == CANNOT_SUCCEED else self._backoff.failed(time.monotonic())
            if delay is None:
                self.gave_up = True
                why = "cannot work" if code == CANNOT_SUCCEED else "ended too often before it worked"
                log.error("%s %s (it %s): giving up", self.label, why, how(code))
                given_up(self)
                return
            log.warning("%s %s; starting it again in %.1f s", self.label, how(code), delay)
            await asyncio.sleep(delay)
            try:
                await self._spawn()
            except OSError as error:  # no memory, too many processes: that counts as a failure too
                log.warning("%s did not start: %s", self.label, error)

    async def stop(self, timeout: float) -> None:
        """SIGTERM, and SIGKILL for the whole group after `timeout` seconds."""
        self.stopping = True
        if self._watch is not None and not self.running:
            self._watch.cancel()  # waits to start it again
        if self.process is not None and self.running:
            with contextlib.suppress(ProcessLookupError):
                self.process.terminate()
            try:
                await asyncio.wait_for(self.process.wait(), timeout)
            except TimeoutError:
                log.warning("%s did not stop within %.0f s: killing it", self.label, timeout)
                self.kill()
                await self.process.wait()
        if self._watch is not None:
            await asyncio.gather(self._watch, return_exceptions=True)

    def kill(self) -> None:
        if self.process is not None and self.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


def how(code: int) -> str:
    """How a process ended, for people."""
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
