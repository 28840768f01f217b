"""The `native` backend: the forward pass of a DLRM or DCNv2 in our own CUDA kernels, through CuPy (extra `cuda`).

Importing this package needs no GPU and no CuPy; `load` does.
"""

from pathlib import Path

from narsil_stream.kernels.backend import Backend


class Unavailable(RuntimeError):
    """This process cannot use an NVIDIA GPU; says what is missing and what to do."""


def load(artifact: Path, *, precision: str = "fp16", lanes: int = 3) -> Backend:
    """Load an artifact's folder onto the current GPU. Embedding rows keep their type.

    `precision`: fp16, bf16, tf32 or fp32, of the MLPs and the interaction. `lanes`: batches that compute at the same
    time.
    Raises Unavailable without CuPy or a GPU, ArtifactError when the artifact is unfit.
    """
    require_gpu()
    from narsil_stream.kernels.artifact import read
    from narsil_stream.kernels.native.native import Native

    return Native(read(artifact), precision=precision, lanes=lanes)


def require_gpu() -> None:
    """Raise Unavailable unless CuPy is installed and sees a GPU."""
    try:
        import cupy
    except ImportError as error:
        raise Unavailable(
            f"the native backend needs CuPy ({error}). Next: pip install 'narsil-stream[cuda]' on a machine with an "
            "NVIDIA GPU and a CUDA 13 driver, or choose --backend reference"
        ) from error
    try:
        count = cupy.cuda.runtime.getDeviceCount()
    except Exception as error:  # CuPy's own errors, whose class needs the driver
        raise Unavailable(
            f"the native backend found no usable NVIDIA driver ({error}). Next: check nvidia-smi, "
            "or choose --backend reference"
        ) from error
    if count < 1:
        raise Unavailable(
            "the native backend found no NVIDIA GPU. Next: check nvidia-smi, or choose --backend reference"
        )
