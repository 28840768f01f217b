"""Which versions of torch, FBGEMM and TorchRec fit together, and whether those installed here do. Imports none of them.

fbgemm_gpu 1.X is built for the binary interface of torch 2.(X+5) alone: another one fails on an undefined symbol, or
worse. So only trios that were tested together are taken.
"""

from contextlib import AbstractContextManager
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from narsil_stream.kernels.backend import Unfit, unfit


class Unit(NamedTuple):
    """Versions that were tested together."""

    machine: str
    python: str
    """Tested with."""
    torch: str
    fbgemm: str
    """Distribution and version, as `name version`."""
    torchrec: str
    install: str
    """The command, in a checkout."""


UNITS = (
    Unit(
        "CPU",
        "3.11",
        "2.13.0",
        "fbgemm-gpu-cpu 1.8.0",
        "1.8.0",
        "pip install -r requirements/torch-cpu.txt && pip install --no-deps -r requirements/torchrec-cpu.txt",
    ),
    Unit(
        "CUDA 13",
        "3.12",
        "2.11.0",
        "fbgemm-gpu 1.6.0",
        "1.6.1",
        "pip install -r requirements/torch-cuda.txt",
    ),
)


class Unavailable(Unfit):
    """The torch family cannot be used here; says why and what to do."""


def require_unit() -> Unit:
    """The locked unit that is installed here. Raises Unavailable, with the table of units, when there is none."""
    torch, torchrec = _public("torch"), _public("torchrec")
    fbgemm = [f"{name} {found}" for name in ("fbgemm-gpu-cpu", "fbgemm-gpu") if (found := _public(name))]
    for unit in UNITS:
        if (torch, fbgemm, torchrec) == (unit.torch, [unit.fbgemm], unit.torchrec):
            return unit
    found = (
        f"torch {torch or 'missing'}, {' and '.join(fbgemm) or 'fbgemm-gpu missing'}, torchrec {torchrec or 'missing'}"
    )
    steps = ", or ".join(f"{unit.install} ({unit.machine})" for unit in UNITS)
    raise Unavailable(
        f"the torch backend needs torch, FBGEMM and TorchRec that were tested together; found {found}.\n{table()}\n"
        f"Next: {steps}, or choose --backend reference"
    )


def failures(doing: str) -> AbstractContextManager[None]:
    """What torch and FBGEMM raise on a machine that is not as it should be, or too small, as Unfit."""
    step = "another --precision, or --backend reference"
    what = f"the torch backend could not {doing}"
    return unfit(what, step, MemoryError, RuntimeError, OSError, ImportError, ValueError)


def is_here() -> bool:
    """Whether a locked unit is installed."""
    try:
        require_unit()
    except Unavailable:
        return False
    return True


def table() -> str:
    """The units, for people."""
    rows = [("machine", "python", "torch", "fbgemm", "torchrec"), *(unit[:5] for unit in UNITS)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(f"  {line.rstrip()}" for line in lines)


def _public(distribution: str) -> str | None:
    """Its version without what follows "+", such as the CUDA version that torch was built for."""
    try:
        return version(distribution).partition("+")[0]
    except PackageNotFoundError:
        return None
