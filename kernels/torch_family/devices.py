"""On which device and in which precision the torch family computes here."""

from typing import Any, NamedTuple

import torch

from narsil_stream.kernels.artifact import Artifact
from narsil_stream.kernels.backend import Backend
from narsil_stream.kernels.torch_family.unit import Unavailable

DTYPES: dict[str, Any] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Chosen(NamedTuple):
    device: str
    """cpu or cuda"""
    precision: str
    """A key of DTYPES."""


def resolve(device: str, precision: str) -> Chosen:
    """Decide what is left to "auto". Raises Unavailable."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise Unavailable("the torch backend found no usable NVIDIA GPU. Next: check nvidia-smi and the CUDA unit")
    if precision == "auto":
        precision = "fp16" if device == "cuda" else "bf16" if _cpu_multiplies("bf16") else "fp32"
    if precision not in DTYPES:
        raise Unavailable(f"the torch backend has no precision {precision!r}; there are: {', '.join(DTYPES)}")
    if device == "cpu" and precision != "fp32" and not _cpu_multiplies(precision):
        raise Unavailable(
            f"this processor does not multiply {precision} numbers in hardware, which makes them slower than fp32. "
            "Next: choose --precision fp32, or leave it to auto"
        )
    return Chosen(device, precision)


def build(artifact: Artifact, chosen: Chosen, threads: int = 0) -> Backend:
    """A backend for a model in memory. `threads`: of a CPU's, 0: as many as torch has now."""
    if chosen.device == "cuda":
        from narsil_stream.kernels.torch_family.cuda import CudaBackend

        return CudaBackend(artifact, chosen.precision)
    from narsil_stream.kernels.torch_family.cpu import CpuBackend

    return CpuBackend(artifact, chosen.precision, threads)


def multiplied() -> tuple[str, ...]:
    """Precisions that this processor has instructions for."""
    return tuple(name for name in DTYPES if name == "fp32" or _cpu_multiplies(name))


def _cpu_multiplies(precision: str) -> bool:
    """By instructions of its own: AVX512_BF16 or AMX for bf16, AVX512_FP16 or AMX for fp16."""
    if not torch.backends.mkldnn.is_available():
        return False
    if precision == "bf16":
        return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())
    return bool(torch.cpu._is_amx_fp16_supported() or torch.cpu.get_capabilities().get("avx512_fp16", False))
