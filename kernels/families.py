"""Which compute families there are, and which one a machine should use for a model."""

import importlib.util
import logging
import shutil
from functools import partial
from pathlib import Path
from typing import NamedTuple

from narsil_stream.kernels import native, noop, torch_family
from narsil_stream.kernels.artifact import read_spec
from narsil_stream.kernels.backend import Backend, Loader, Unfit
from narsil_stream.schemas.model import DcnV2, ModelSpec

log = logging.getLogger(__name__)

FAMILIES = ("native", "torch", "reference")
NOOP = "noop"
"""Computes nothing: for benchmarks of the pipeline alone, never chosen by itself."""
PRECISIONS = ("fp32", "bf16", "fp16", "int8")
SMALL_MACS = 200_000
"""Multiply-adds for a row below which NumPy beats torch's calls at the batch sizes of a CPU: docs/decisions.md."""


class Width(NamedTuple):
    """How much at once; 0: as a family likes best."""

    lanes: int
    threads: int


class Choice(NamedTuple):
    name: str
    load: Loader
    reason: str
    """For logs: why this one."""


def choose(
    backend: str, precision: str, spec: ModelSpec, lanes: int = 0, pace: noop.Pace = noop.AT_ONCE, threads: int = 0
) -> Choice:
    """`backend`: a family's name or "auto"; `precision`: fp32, bf16, fp16, int8 or "auto"; `spec`: what will be loaded;
    `lanes`: batches at once, of a family that can; 0: as many as it likes best; `pace`: of the backend noop;
    `threads`: of a family that has its own on a CPU; 0: as many as its library would take.

    int8 asks for INT8 rows, with the fastest arithmetic of the family that stays within 2e-3 of the reference on them:
    fp16 on a GPU, fp32 on a CPU. Raises Unfit.
    """
    if backend not in ("auto", NOOP, *FAMILIES):
        raise Unfit(f"no backend is called {backend!r}; there are: auto, {', '.join(FAMILIES)}")
    if precision not in ("auto", *PRECISIONS):
        raise Unfit(f"no precision is called {precision!r}; there are: auto, {', '.join(PRECISIONS)}")
    if precision == "int8":
        _need_int8_rows(spec)
    if backend == NOOP:
        return _noop(pace)
    if backend != "auto":
        return _BUILD[backend](precision, Width(lanes, threads), "as configured")
    return _fastest(precision, Width(lanes, threads), spec)


def loader(backend: str, precision: str, lanes: int = 0, pace: noop.Pace = noop.AT_ONCE, threads: int = 0) -> Loader:
    """Loads each model with the family that is right for it, and logs which one and why."""

    def load(artifact: Path) -> Backend:
        choice = choose(backend, precision, read_spec(artifact), lanes, pace, threads)
        loaded = choice.load(artifact)
        computed = loaded.info.precision
        asked = "" if precision in ("auto", computed) else f"; {precision} was asked for"
        log.info("compute: %s backend, precision %s (%s%s)", choice.name, computed, choice.reason, asked)
        if lanes > loaded.info.lanes:
            at_once = f"{loaded.info.lanes} at a time"
            log.warning("executor.lanes is %d, but the %s backend computes %s", lanes, choice.name, at_once)
        return loaded

    return load


def macs(spec: ModelSpec) -> int:
    """Multiply-adds that one row costs."""
    shape, vectors = spec.architecture, spec.n_sparse + 1
    bottom = zip((shape.dense, *shape.bottom), shape.bottom, strict=False)
    top = zip((spec.top_input, *shape.top), shape.top, strict=False)
    layers = sum(wide * out for wide, out in (*bottom, *top))
    if isinstance(shape, DcnV2):
        return layers + 2 * shape.cross_layers * shape.cross_rank * spec.top_input
    return layers + shape.dim * vectors * (vectors - 1) // 2


def _fastest(precision: str, width: Width, spec: ModelSpec) -> Choice:
    """The first family that this machine has; the reason names what the ones before it lack."""
    lacks = []
    if importlib.util.find_spec("cupy") is None:
        here = shutil.which("nvidia-smi") is not None
        lacks.append("no CuPy for native" + (", which the extra cuda brings: a GPU is here" if here else ""))
    else:
        try:
            return _native(precision, width, "an NVIDIA GPU and CuPy are here")
        except native.Unavailable as error:
            lacks.append(_cause(error))
    try:
        unit = torch_family.require_unit()
    except torch_family.Unavailable:
        lacks.append("no locked unit of torch, FBGEMM and TorchRec for torch")
    else:
        if unit.machine != "CPU" or macs(spec) >= SMALL_MACS or precision in ("bf16", "fp16"):
            return _torch(precision, width, "; ".join([*lacks, f"the locked unit for {unit.machine} is here"]))
        lacks.append(f"for {macs(spec):,} multiply-adds a row torch is no faster")
    return _reference(precision, width, "; ".join(lacks))


def _native(precision: str, width: Width, reason: str) -> Choice:
    native.require_gpu()
    arithmetic = "fp16" if precision in ("auto", "int8") else precision
    return Choice("native", partial(native.load, precision=arithmetic, lanes=width.lanes or native.LANES), reason)


def _torch(precision: str, width: Width, reason: str) -> Choice:
    unit = torch_family.require_unit()
    if precision == "int8":
        precision = "fp32" if unit.machine == "CPU" else "fp16"
    return Choice("torch", partial(torch_family.load, precision=precision, threads=width.threads), reason)


def _reference(precision: str, _: Width, reason: str) -> Choice:
    from narsil_stream.kernels import reference

    if precision in ("bf16", "fp16"):
        raise Unfit(
            f"the reference backend computes in fp64 alone, not in {precision} ({reason}). Next: leave --precision to "
            "auto, or install what --backend native or --backend torch needs (docs/kernels.md)"
        )
    return Choice("reference", reference.load, reason)


def _noop(pace: noop.Pace) -> Choice:
    stands_in = "" if pace == noop.AT_ONCE else f"; {pace}"
    why = f"as configured: scores mean nothing, for benchmarks only{stands_in}"
    return Choice(NOOP, partial(noop.load, pace=pace), why)


_BUILD = {"native": _native, "torch": _torch, "reference": _reference}


def _cause(error: Unfit) -> str:
    """Without the next step: somebody else takes it."""
    return str(error).partition(". Next:")[0]


def _need_int8_rows(spec: ModelSpec) -> None:
    for table in spec.tables:
        if table.dtype != "INT8":
            raise Unfit(
                f"precision int8 asks for INT8 rows, but table {table.name} of {spec.name} has {table.dtype} rows. "
                "Next: narsil model quantize MODEL SMALLER --to INT8, and serve that"
            )
