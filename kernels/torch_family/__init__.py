"""The `torch` backend: DLRM and DCNv2 in torch over FBGEMM's table-batched embeddings, on the CPU and on CUDA.

Importing this package needs no torch; `load` does.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from narsil_stream.kernels.torch_family.fbgemm_logs import quieten
from narsil_stream.kernels.torch_family.unit import UNITS, Unavailable, failures, require_unit

if TYPE_CHECKING:
    from narsil_stream.kernels.backend import Backend

__all__ = ["UNITS", "Unavailable", "load", "require_unit"]

Device = Literal["auto", "cpu", "cuda"]


def load(artifact: Path, *, precision: str = "auto", device: Device = "auto", threads: int = 0) -> "Backend":
    """Load an artifact's folder. Embedding rows keep their type.

    `precision`: fp32, bf16 or fp16, of the MLPs and the interaction; auto: the fastest that the device multiplies in
    hardware. `device` auto: CUDA where torch sees a GPU.
    `threads`: of a CPU, 0: as many as torch has here.

    Raises Unavailable: no locked unit, no such device, a precision that it cannot do; Unfit: all else that this machine
    cannot do; ArtifactError: unfit artifact.
    """
    require_unit()
    quieten()
    from narsil_stream.kernels.artifact import read

    with failures("load this model"):
        from narsil_stream.kernels.torch_family.devices import build, resolve

        return build(read(artifact), resolve(device, precision), threads)
