"""The CUDA sources beside this file: put together for a model, compiled once, kept on disk."""

import hashlib
import importlib
import importlib.util
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
    """A CuPy RawModule of `name` for `arch` (e.g. "sm_90a"), compiled by NVRTC unless the cache has it.

    Raises CompileError.
    """
    import cupy

    return cupy.RawModule(path=str(compiled(text(name, defines), name, arch)))


def compiled(source: str, name: str, arch: str) -> Path:
    """The machine code of `source`, from the cache or compiled now. Several processes may do so at once."""
    nvrtc: Any = importlib.import_module("cupy_backends.cuda.libs.nvrtc")
    key = hashlib.sha256(f"{nvrtc.getVersion()} {arch}\n{source}".encode()).hexdigest()[:32]
    path = cache_folder() / f"{Path(name).stem}-{arch}-{key}.cubin"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(f".{secrets.token_hex(4)}.tmp")
        fresh.write_bytes(_compile(nvrtc, source, name, arch))
        fresh.rename(path)
    return path


def cache_folder() -> Path:
    """Where machine code is kept: $NARSIL_KERNEL_CACHE, or narsil-stream/kernels in the user's cache folder."""
    if folder := os.environ.get("NARSIL_KERNEL_CACHE"):
        return Path(folder)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "narsil-stream" / "kernels"


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


def _compile(nvrtc: Any, source: str, name: str, arch: str) -> bytes:
    program = nvrtc.createProgram(source, name, (), ())
    try:
        nvrtc.compileProgram(program, (f"-arch={arch}", "-std=c++17", "-default-device", f"-I{header_folder()}"))
        return bytes(nvrtc.getCUBIN(program))
    except nvrtc.NVRTCError as error:
        raise CompileError(f"{name} for {arch}: {error}\n{nvrtc.getProgramLog(program)}") from error
    finally:
        nvrtc.destroyProgram(program)
