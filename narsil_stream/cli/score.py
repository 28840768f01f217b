"""`narsil score`: rows of a file or pipe in, one score a line out."""

import functools
import time
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import NoReturn

import rich_click as click
import uvloop
from msgspec import Struct

from narsil_stream.cli.asking import CONNECT_S, NEXT, described, say, setup_logs, told
from narsil_stream.cli.options import config_options
from narsil_stream.cli.progress import progress
from narsil_stream.cli.rows import Arrays, CriteoText, InputError, Inputs, Source
from narsil_stream.cli.scoring import Scores, Scoring, Stopped, Tally
from narsil_stream.cli.streams import STANDARD, Output, Worker, open_input
from narsil_stream.core.client import Client, make_request
from narsil_stream.core.config import Loaded, NatsConfig
from narsil_stream.schemas import codec
from narsil_stream.schemas.errors import Fault, Refused
from narsil_stream.schemas.model import ModelSpec

SCORED, STOPPED, USAGE, SKIPPED, INTERRUPTED, BROKEN_PIPE = 0, 1, 2, 3, 130, 141


option = functools.partial(click.option, panel="Scoring")


class Unfit(Exception):
    """What was asked cannot be done. The message says why."""


class Job(Struct, frozen=True):
    """What was asked."""

    nats: NatsConfig
    source: str
    target: str
    model: str
    version: str
    window: int
    rows_per_request: int
    budget_s: float
    skip: bool
    labelled: bool | None


class Run(Struct):
    """What there is to report of a run, however it ends."""

    scoring: Scoring | None = None
    output: Output | None = None
    model: str = ""
    started: float = 0.0


@click.command()
@click.argument("source", metavar="IN")
@click.argument("target", metavar="OUT")
@option("--model", default="", metavar="NAME", help="Model to score with. Default: the only one that is served.")
@option("--model-version", "version", default="", metavar="VERSION", help="Its version. Default: the newest.")
@option(
    "--on-error",
    type=click.Choice(["stop", "skip"]),
    default="stop",
    show_default=True,
    help="At a row that cannot be scored: stop before it, or leave its line of OUT empty and go on.",
)
@option(
    "--labelled/--unlabelled",
    default=None,
    help="Whether TSV rows begin with a label, which is not used. Default: as the first row does.",
)
@option(
    "--window",
    type=click.IntRange(1, 4096),
    default=32,
    show_default=True,
    help="Requests in flight. More: busier executors, longer waits, more memory.",
)
@option(
    "--rows-per-request",
    type=click.IntRange(1, 65_536),
    default=512,
    show_default=True,
    help="Most rows in one request. Larger: less overhead, until the broker's max_payload is reached.",
)
@option(
    "--budget-ms",
    type=click.IntRange(1, 600_000),
    default=10_000,
    show_default=True,
    help="Time for each request, all tries together. Larger: waits longer for a system that is busy or restarting.",
)
@config_options("nats")
def score(
    loaded: Loaded,
    source: str,
    target: str,
    model: str,
    version: str,
    on_error: str,
    labelled: bool | None,
    window: int,
    rows_per_request: int,
    budget_ms: int,
) -> None:
    """Score the rows of IN with a running system: line i of OUT is the score of line i of IN. - is a pipe.

    IN is text in Criteo's format, of any size: [label,] 13 integers, 26 hashes, separated by TAB, empty where missing;
    a blank line gives a blank line. Or, if its name ends in .npz, arrays as numpy.savez writes them: dense
    [rows, n] with sparse [rows, tables], or with values [N] and lengths [rows, tables].

    OUT appears when it is whole. After an error or Ctrl-C the scores so far are in OUT.part. A report goes to stderr.

    Exit status: 0 all scored; 1 stopped at an error; 2 wrong usage, configuration, model or IN; 3 finished, with rows
    skipped; 130 interrupted; 141 nobody reads OUT any more.

    Examples: narsil score rows.tsv scores.txt; zcat day_0.gz | narsil score --on-error skip - - | paste - labels
    """
    setup_logs(loaded, "score")
    skip = on_error == "skip"
    job = Job(
        loaded.config.nats, source, target, model, version, window, rows_per_request, budget_ms / 1e3, skip, labelled
    )
    run = Run()
    try:
        uvloop.run(_score(job, run))
    except (Unfit, InputError, Refused, Stopped, OSError, KeyboardInterrupt) as error:
        _end_badly(run, error)
    _end_well(run)


async def _score(job: Job, run: Run) -> None:
    """Raises what `score` turns into an exit status."""
    file = _opened(job)
    async with Client(job.nats, connect_timeout_s=CONNECT_S) as client:
        card = await described(client, job.model, job.version)
        spec = card.spec
        run.model = f"{spec.name} version {spec.version}"
        source = _source(job, file, spec)
        reader, writer = Worker("reader"), Worker("writer")
        run.output = output = await writer.run(lambda: _output(job.target))

        async def ask(inputs: Inputs) -> Scores:
            request = make_request(inputs.dense, inputs.sparse, inputs.values, inputs.lengths)
            answer = await client.infer(spec.name, request, version=spec.version, budget_s=job.budget_s)
            scores: Scores = codec.array(answer.outputs[0])
            return scores

        with progress(source.total) as show:

            async def write(text: bytes) -> None:
                await writer.run(lambda: output.write(text))
                show(source.position, scoring.tally.rows)

            run.scoring = scoring = Scoring(
                ask,
                write,
                window=job.window,
                rows_per_request=job.rows_per_request,
                skip=job.skip,
                tell=say,
            )
            run.started = time.monotonic()
            await scoring.run(reader.iterate(source.parts()))
        await writer.run(output.finish)


def _opened(job: Job) -> FileIO:
    if job.source != STANDARD and job.target != STANDARD:
        with suppress(OSError):
            if Path(job.source).samefile(job.target):
                raise Unfit(f"IN and OUT are both {job.source}")
    try:
        return open_input(job.source)
    except OSError as error:
        raise Unfit(f"{job.source}: {error.strerror}") from None


def _output(target: str) -> Output:
    try:
        return Output(target)
    except OSError as error:
        raise Unfit(f"{target}: {error.strerror}") from None


def _source(job: Job, file: FileIO, spec: ModelSpec) -> Source:
    """The rows of IN, as the model wants them."""
    if job.source.endswith(".npz"):
        try:
            return Arrays(file, spec)
        except InputError as error:
            raise Unfit(f"{job.source}: {error}") from None
    if spec.preprocessing is None:
        raise Unfit(
            f"model '{spec.name}' says no preprocessing, so rows of text cannot become its inputs;\ngive an .npz file"
            f" with dense [rows, {spec.n_dense}] and sparse [rows, {spec.n_sparse}], or values and lengths"
        )
    return CriteoText(file, spec, job.labelled)


def _end_well(run: Run) -> None:
    assert run.scoring is not None
    tally, seconds = run.scoring.tally, time.monotonic() - run.started
    skipped = f", skipped {tally.skipped:,}" if tally.skipped else ""
    rate = f"{tally.rows / max(seconds, 1e-3):,.0f} rows/s"
    say(f"scored {tally.rows:,} rows{skipped} in {seconds:.1f} s ({rate}) with {run.model}")
    raise SystemExit(SKIPPED if tally.skipped else SCORED)


def _end_badly(run: Run, error: BaseException) -> NoReturn:
    """Say why, and what there is of the output."""
    status, reason = _meaning(error)
    tally = run.scoring.tally if run.scoring else Tally()
    if run.output and not tally.lines:
        run.output.discard()
    elif run.output:
        skipped = f", {tally.skipped:,} of them skipped" if tally.skipped else ""
        reason += f"\n{tally.lines:,} lines were written to {run.output.shown}{skipped}"
    if status != BROKEN_PIPE:
        say(reason)
    raise SystemExit(status)


def _meaning(error: BaseException) -> tuple[int, str]:
    """Exit status and message."""
    match error:
        case KeyboardInterrupt():
            return INTERRUPTED, "interrupted"
        case BrokenPipeError():
            return BROKEN_PIPE, ""
        case OSError():
            return STOPPED, f"{error.filename or 'reading IN'}: {error.strerror}"
        case Refused():
            return USAGE if error.fault is Fault.NOT_FOUND else STOPPED, told(error)
        case Stopped(refused=Refused() as refused):
            return STOPPED, f"{error}\n{NEXT[refused.fault]}"
        case InputError():
            return STOPPED, f"IN: {error}"
        case Unfit():
            return USAGE, str(error)
    return STOPPED, str(error)
