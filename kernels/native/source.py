"""The CUDA sources beside this file: put together for a model, compiled once, loaded."""

import hashlib
import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from narsil_stream.kernels.exclusive import ON_DEVICE
from narsil_stream.kernels.native import nvrtc
from narsil_stream.kernels.native.cache import cached

HERE = Path(__file__).parent
_INCLUDED = ("ends.cuh", "rows.cuh", "hopper.cuh", "block.cuh", "gather.cuh")
"""Each before those that it includes."""
_HEADER = "cuda_fp16.h"


class CompileError(Exception):
    """A kernel that does not compile: a bug here, or a toolkit that does not fit. Holds the compiler's words."""


def text(name: str, defines: Mapping[str, object]) -> str:
    """The source of `name` (e.g. "layers.cu") with `defines` as macros before it, in one piece."""
    body = (HERE / name).read_text()
    for included in _INCLUDED:
        body = body.replace(f'#include "{included}"\n', (HERE / included).read_text().replace("#pragma once\n", ""))
    return "".join(f"#define {key} {value}\n" for key, value in defines.items()) + body


def load_module(name: str, defines: Mapping[str, object], arch: str) -> Any:
    """A CuPy Module of `name` for `arch` (e.g. "sm_90a"), compiled by NVRTC unless the cache has it.

    It is unloaded when nobody refers to it or its functions any more. Raises CompileError.
    """
    import cupy

    code = compiled(text(name, defines), name, arch)
    module = cupy.cuda.Module()
    with ON_DEVICE:
        module.load(code)
    return module


def allow_shared_memory(kernel: Any, nbytes: int) -> None:
    """Let a CuPy Function be launched with so many bytes of dynamic shared memory: beyond 48 KB a kernel has to ask."""
    from cupy.cuda import driver

    driver.funcSetAttribute(kernel.ptr, driver.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, nbytes)


def compiled(source: str, name: str, arch: str) -> bytes:
    """The machine code of `source`, from the cache or compiled now. Several processes may do so at once.

    Raises CompileError.
    """
    try:
        key = hashlib.sha256(f"{nvrtc.version()} {arch}\n{source}".encode()).hexdigest()[:32]
        return cached(f"{Path(name).stem}-{arch}-{key}.bin", lambda: nvrtc.compile_source(source, name, options(arch)))
    except nvrtc.NvrtcError as error:
        raise CompileError(f"{name} for {arch}: {error}") from error


def options(arch: str) -> tuple[str, ...]:
    """Of NVRTC."""
    return (f"-arch={arch}", "-std=c++17", "-default-device", f"-I{header_folder()}")


def header_folder() -> Path:
    """Where the toolkit's headers are. Raises CompileError with what to install when there are none."""
    candidates = [Path(os.environ[name]) / "include" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates += [folder for folder in _wheel_folders() if folder.is_dir()]
    candidates += [Path("/usr/local/cuda/include")]
    for folder in candidates:
        if (folder / _HEADER).is_file():
            return folder
    raise CompileError(
        f"no {_HEADER} found. Next: pip install 'narsil-stream[cuda]', or set CUDA_HOME to a CUDA 13 toolkit"
    )


def _wheel_folders() -> list[Path]:
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(root) for root in (spec.submodule_search_locations or [])] if spec else []
    return [root / part / "include" for root in roots for part in ("cu13", "cuda_runtime")]
