"""`narsil gateway|batcher|executor`: one part of the system, against any NATS server."""

import contextlib
import os
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import rich_click as click
import uvloop
from msgspec.structs import replace

from narsil_stream.actors.processes import CANNOT_SUCCEED
from narsil_stream.cli.options import config_options
from narsil_stream.core import logs
from narsil_stream.core.config import Config, ExecutorConfig, Loaded
from narsil_stream.core.exposition import MetricsServer
from narsil_stream.core.memory import keep_freed_memory
from narsil_stream.core.ports import PortTaken, free_port
from narsil_stream.core.runtime import Runtime
from narsil_stream.schemas.errors import Refused

if TYPE_CHECKING:
    from narsil_stream.actors.repository import Repository

Start = Callable[[Runtime], Awaitable[Any]]

MODELS = ("model", "model_repository", "model_control", "load_models")
"""Settings that say what is served."""

parent = click.option(
    "--parent",
    "token",
    default="",
    hidden=True,
    help="Set by `narsil serve`: repeat this in reports, and stop when stdin ends, because the parent is gone.",
)


@click.command()
@config_options(doors=("http", "grpc", "metrics"))
@click.option(
    "--door",
    type=click.Choice(("http", "grpc", "both")),
    default="both",
    show_default=True,
    help="Ports to open. both: those of which there is to be a process, by `--http-processes` and `--grpc-processes`.",
)
@click.option("--share-port", is_flag=True, help="Let several gateway processes listen on one port (SO_REUSEPORT).")
@parent
def gateway(loaded: Loaded, door: str, share_port: bool, token: str) -> None:
    """Run a gateway: Open Inference Protocol over HTTP and gRPC in, NATS behind.

    With `--mode inline` a batcher and an executor run in the same process.

    Example: narsil gateway --nats-url nats://broker:4222 --http-host 0.0.0.0 --access-tokens-file tokens
    """
    inline = loaded.config.mode == "inline"
    threads = _limit_threads(loaded.config.executor) if inline else 0
    doors = doors_of(loaded.config) if door == "both" else (door,)
    if not doors and not inline:
        raise click.UsageError("with neither --http-processes nor --grpc-processes there is no port to open")

    async def start(runtime: Runtime) -> None:
        if inline:
            await _start_executor(runtime, threads)
            await _start_batcher(runtime)
        for name in doors:
            await _start_door(runtime, name, share_port)

    _run(loaded, "inline" if inline else "gateway", start, token)


@click.command()
@config_options("mode", "nats", "batch", "timing", "metrics", "insecure", doors=("metrics",))
@parent
def batcher(loaded: Loaded, token: str) -> None:
    """Run a batcher: it coalesces requests into batches, by deadline, for the executors.

    Example: narsil batcher --nats-url nats://broker:4222
    """
    _run(loaded, "batcher", _start_batcher, token)


@click.command()
@config_options(
    *MODELS,
    "mode",
    "backend",
    "precision",
    "nats",
    "batch",
    "executor",
    "timing",
    "metrics",
    "data_dir",
    "insecure",
    doors=("metrics",),
)
@click.option("--with-batcher", is_flag=True, help="Run a batcher in the same process: it hands over its batches.")
@parent
def executor(loaded: Loaded, with_batcher: bool, token: str) -> None:
    """Run an executor: it loads models and computes batches.

    Example: narsil executor --nats-url nats://broker:4222 --model models/ctr --with-batcher
    """
    threads = _limit_threads(loaded.config.executor)

    async def start(runtime: Runtime) -> None:
        await _start_executor(runtime, threads)
        if with_batcher:
            await _start_batcher(runtime)

    _run(loaded, "executor", start, token)


def doors_of(config: Config) -> tuple[str, ...]:
    """Those that have a process."""
    counts = {"http": config.http.processes, "grpc": config.grpc.processes}
    return tuple(door for door, count in counts.items() if count)


async def _start_door(runtime: Runtime, door: str, share_port: bool) -> None:
    if door == "http":
        from narsil_stream.gateways.http import HttpGateway

        await runtime.start(lambda: HttpGateway(runtime.config, runtime.bus, share_port))
    else:
        from narsil_stream.gateways.grpc import GrpcGateway

        await runtime.start(lambda: GrpcGateway(runtime.config, runtime.bus, share_port))


async def _start_batcher(runtime: Runtime) -> None:
    from narsil_stream.actors.batcher import Batcher

    await runtime.start(lambda: Batcher(runtime.config, runtime.bus))


async def _start_executor(runtime: Runtime, threads: int) -> None:
    from narsil_stream.actors.executor import Executor
    from narsil_stream.kernels import families
    from narsil_stream.kernels.noop import Pace

    config = runtime.config
    pace = Pace(config.executor.noop_us, config.executor.noop_row_us)
    loader = families.loader(config.backend, config.precision, config.executor.lanes, pace, threads)
    artifacts = repository(config)
    await runtime.start(lambda: Executor(config, runtime.bus, artifacts, loader))


def repository(config: Config) -> "Repository":
    """What an executor may serve. Raises ArtifactError when the demo model is wanted and cannot be made."""
    from narsil_stream.actors.repository import Repository

    config = with_demo_model(config)
    models = [Path(config.model)] if config.model else []
    return Repository(models, Path(config.model_repository) if config.model_repository else None)


def with_demo_model(config: Config) -> Config:
    """The demo model is for who has nothing else."""
    return config if config.model or config.model_repository else replace(config, model=str(demo_model(config)))


def demo_model(config: Config) -> Path:
    """The demo model's folder, made if it is not there."""
    folder = Path(config.data_dir) / "models" / "dlrm"
    if not (folder / "model.json").exists():
        from narsil_stream.kernels.init import demo_model as make

        folder.parent.mkdir(parents=True, exist_ok=True)
        make(folder)
    return folder


def _limit_threads(executor: ExecutorConfig) -> int:
    """Must come before NumPy is imported: its libraries read these once. What the environment has already stays.

    Returns the threads of a family that has its own, each of which computes by itself: two on two cores cost the others
    there nothing but time. Those inside a library spin while they wait. 0: as the environment says.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    own = executor.threads or max(1, max(min(cores, 2), cores // 2) // executor.executors)
    inside = executor.threads or max(1, cores // 2 // executor.executors)
    if "OMP_NUM_THREADS" in os.environ and not executor.threads:
        own = 0
    for variable, count in (("OMP", 1), ("MKL", 1), ("OPENBLAS", inside)):
        name = f"{variable}_NUM_THREADS"
        if executor.threads or name not in os.environ:
            os.environ[name] = str(count)
    return own


class Hopeless(click.ClickException):
    """It would fail again: the supervisor need not try."""

    exit_code = CANNOT_SUCCEED


@contextlib.contextmanager
def metrics_of(runtime: Runtime) -> Iterator[None]:
    """The metrics port of a part that somebody started by itself and gave `--metrics-port`."""
    metrics = runtime.config.metrics
    port = free_port(metrics.host, metrics.port, "metrics.port")
    server = MetricsServer(metrics.host, port, lambda: runtime.reports, runtime.health)
    server.start()
    try:
        yield
    finally:
        server.stop()


def _run(loaded: Loaded, role: str, start: Start, token: str) -> None:
    """Run actors until they are told to stop. What keeps them from starting is one message and an exit status."""
    config = loaded.config
    logs.setup(config.log_level, config.log_format, role)
    keep_freed_memory()
    own_metrics = not token and loaded.source("metrics.port") != "default"

    async def life() -> int:
        async with Runtime(config, role, token) as runtime:
            await start(runtime)
            with metrics_of(runtime) if own_metrics else contextlib.nullcontext():
                return await runtime.until_stopped(watch_stdin=bool(token))

    from narsil_stream.kernels.artifact import ArtifactError
    from narsil_stream.kernels.backend import Unfit

    try:
        code = uvloop.run(life())
    except (ArtifactError, Unfit) as error:
        raise Hopeless(str(error)) from None
    except PortTaken as error:
        raise click.ClickException(str(error)) from None
    except Refused as refused:
        raise click.ClickException(refused.detail) from None
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)
