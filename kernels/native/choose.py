"""Which way a model is computed on the current GPU, and why."""

from typing import TYPE_CHECKING, Any

from narsil_stream.kernels.artifact import Artifact
from narsil_stream.kernels.native import OLDEST
from narsil_stream.kernels.native.fused import FusedPlan, misfit
from narsil_stream.kernels.native.layers import LayersPlan
from narsil_stream.kernels.native.memory import Memory
from narsil_stream.kernels.native.plan import Plan
from narsil_stream.kernels.native.tables import DeviceTables

if TYPE_CHECKING:
    from narsil_stream.kernels.native.engine import Options

PRECISIONS = ("fp16", "bf16", "tf32", "fp32")
_FUSED_ON = (9, 0)


def choose(artifact: Artifact, tables: DeviceTables, options: "Options", memory: Memory) -> Plan:
    """The fused kernel where it can be, else kernels around cuBLASLt. Raises ValueError with the reason."""
    if options.precision not in PRECISIONS:
        raise ValueError(f"precision is one of {', '.join(PRECISIONS)}, not {options.precision!r}")
    capability = _capability()
    if capability < OLDEST:
        needed = f"{OLDEST[0]}.{OLDEST[1]}"
        raise ValueError(f"this GPU has compute capability {capability[0]}.{capability[1]}; native needs {needed}")
    obstacle = _obstacle(artifact, options.precision, capability)
    if options.kernels == "fused" and obstacle:
        raise ValueError(f"kernels=fused cannot take {obstacle}")
    if options.kernels != "layers" and not obstacle:
        return FusedPlan(artifact, tables, memory, options.split)
    arch = f"sm_{capability[0]}{capability[1]}"
    return LayersPlan(artifact, tables, memory, options.precision, arch, options.max_rows)


def _obstacle(artifact: Artifact, precision: str, capability: tuple[int, int]) -> str | None:
    if precision != "fp16":
        return f"precision {precision}"
    if capability != _FUSED_ON:
        return f"compute capability {capability[0]}.{capability[1]} (it is written for 9.0)"
    return misfit(artifact.spec)


def _capability() -> tuple[int, int]:
    import cupy

    text: Any = cupy.cuda.Device().compute_capability
    return int(text[:-1]), int(text[-1])
