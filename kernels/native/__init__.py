"""The `native` backend: the forward pass of a DLRM or DCNv2 in our own CUDA kernels, through CuPy (extra `cuda`).

Importing this package needs no GPU and no CuPy; `load` does.
"""

from pathlib import Path

from narsil_stream.kernels.backend import Backend, Unfit

LANES = 2
"""Batches that compute at the same time, unless somebody wants otherwise: docs/decisions.md."""
OLDEST = (8, 0)
"""Compute capability."""


class Unavailable(Unfit):
    """This process cannot use an NVIDIA GPU; says what is missing and what to do."""


def load(artifact: Path, *, precision: str = "fp16", lanes: int = LANES) -> Backend:
    """Load an artifact's folder onto the current GPU. Embedding rows keep their type.

    `precision`: fp16, bf16, tf32 or fp32, of the MLPs and the interaction. `lanes`: batches that compute at the same
    time.
    Raises Unavailable without CuPy or a fit GPU; Unfit: what else cannot be had here; ArtifactError: unfit artifact.
    """
    require_gpu()
    from narsil_stream.kernels.artifact import read
    from narsil_stream.kernels.native.native import Native

    return Native(read(artifact), precision=precision, lanes=lanes)


def require_gpu() -> None:
    """Raise Unavailable unless CuPy is installed, and sees a GPU that works and is new enough."""
    try:
        import cupy
    except ImportError as error:
        raise Unavailable(
            f"the native backend needs CuPy ({error}). Next: pip install 'narsil-stream[cuda]' on a machine with an "
            "NVIDIA GPU and a CUDA 13 driver, or choose --backend reference"
        ) from error
    try:
        if not cupy.cuda.runtime.getDeviceCount():
            raise Unavailable(
                "the native backend found no NVIDIA GPU. Next: check nvidia-smi, or choose --backend reference"
            )
        cupy.cuda.runtime.memGetInfo()  # the first call that needs a driver that works
        device = cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
    except Unavailable:
        raise
    except Exception as error:  # CuPy's own errors, whose class needs the driver
        raise Unavailable(
            f"the native backend found no usable NVIDIA driver ({error}). Next: check nvidia-smi, "
            "or choose --backend reference"
        ) from error
    if (device["major"], device["minor"]) < OLDEST:
        raise Unavailable(
            f"the native backend needs compute capability {OLDEST[0]}.{OLDEST[1]} or newer; {device['name'].decode()} "
            f"has {device['major']}.{device['minor']}. Next: choose --backend torch or --backend reference"
        )
