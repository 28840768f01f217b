"""Every kernel compiles for every supported GPU: by NVRTC, which does it in earnest, or else by nvcc. Needs no GPU."""

import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from msgspec.structs import replace

from narsil_stream.kernels.init import Cross, criteo_spec
from narsil_stream.kernels.native import fused, layers, nvrtc, source
from narsil_stream.schemas.model import DcnV2, DlrmDot

SPEC = criteo_spec(rows=50, dim=64, bottom=(512, 256), top=(512, 512, 256))
WIDE = criteo_spec(rows=50, dim=256, bottom=(512,), top=(256,))
CROSS = criteo_spec(rows=50, dim=128, bottom=(512, 256), top=(1024, 512, 256), cross=Cross(3, 512), pooling="mean")
ODD = replace(SPEC, architecture=DlrmDot(3, 20, (7, 20), (9, 5, 1)), tables=SPEC.tables[:4], preprocessing=None)
ODD_CROSS = replace(ODD, architecture=DcnV2(3, 20, (7, 20), (9, 5, 1), cross_layers=3, cross_rank=5))

ALL_GPUS = ("sm_80", "sm_89", "sm_90")
SOURCES = {
    "layers-fp16-int8": ("layers.cu", layers.defines_of(SPEC, 1, False, "fp16"), ALL_GPUS),
    "layers-fp16-wide": ("layers.cu", layers.defines_of(WIDE, 4, True, "fp16"), ALL_GPUS),
    "layers-bf16-int8": ("layers.cu", layers.defines_of(SPEC, 1, False, "bf16"), ALL_GPUS),
    "layers-bf16-fp16-bags": ("layers.cu", layers.defines_of(ODD, 2, True, "bf16"), ALL_GPUS),
    "layers-fp32-bags": ("layers.cu", layers.defines_of(SPEC, 4, True, "fp32"), ALL_GPUS),
    "cross-fp16-int8": ("cross.cu", layers.defines_of(CROSS, 1, False, "fp16"), ALL_GPUS),
    "cross-fp16-fp16-bags": ("cross.cu", layers.defines_of(ODD_CROSS, 2, True, "fp16"), ALL_GPUS),
    "cross-bf16-fp32": ("cross.cu", layers.defines_of(CROSS, 4, False, "bf16"), ALL_GPUS),
    "cross-fp32-int8-bags": ("cross.cu", layers.defines_of(CROSS, 1, True, "fp32"), ALL_GPUS),
    "fused-4": ("fused.cu", fused.defines_of(SPEC, 1, False, 4), (*ALL_GPUS, "sm_90a")),
    "fused-1-bags": ("fused.cu", fused.defines_of(SPEC, 2, True, 1), ("sm_90a",)),
    "pull": ("pull.cu", {}, ALL_GPUS),
}
CASES = sorted(((name, arch) for name in SOURCES for arch in SOURCES[name][2]), key=lambda case: case[0][:5] != "fused")
"""The longest first, so that no processor waits for one at the end."""

Case = tuple[str, str]


class Compiler(NamedTuple):
    version: str
    run: Callable[[str, str, str], str | None]
    """(name, source, arch) -> what is wrong, or None."""


def _compiler(folder: Path) -> Compiler | None:
    try:
        return Compiler(f"NVRTC {nvrtc.version()}", _nvrtc)
    except nvrtc.NvrtcError:
        pass
    if (path := shutil.which("nvcc")) is None:
        return None
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    return Compiler(version, functools.partial(_nvcc, path, folder))


def _nvrtc(name: str, text: str, arch: str) -> str | None:
    try:
        nvrtc.compile_source(text, name, source.options(arch))
    except nvrtc.NvrtcError as error:
        return str(error)
    return None


def _nvcc(path: str, folder: Path, name: str, text: str, arch: str) -> str | None:
    file = folder / f"{name}-{arch}.cu"
    file.write_text(text)
    command = [path, "-std=c++17", f"-arch={arch}", "-cubin", "-o", str(file.with_suffix(".out")), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stderr if done.returncode else None


@pytest.fixture(scope="session")
def outcomes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Case, Future[str | None]]]:
    """What each test of this run will ask for: all begun at once, on all processors.

    What compiled in an earlier run, by the same compiler from the same text, is known from pytest's cache.
    """
    compiler = _compiler(tmp_path_factory.mktemp("compiled"))
    if compiler is None:
        pytest.skip("no NVRTC (pip install nvidia-cuda-nvrtc nvidia-cuda-runtime) and no nvcc on this machine")
    cache = request.config.cache
    known = set(cache.get("narsil/compiled", []) if cache else [])
    asked: list[Case] = [
        item.callspec.params["case"]
        for item in request.session.items
        if isinstance(item, pytest.Function)
        and item.originalname == test_kernels_compile_for_every_supported_gpu.__name__
    ]

    def attempt(name: str, arch: str) -> str | None:
        file, defines, _ = SOURCES[name]
        text = source.text(file, defines)
        key = hashlib.sha256(f"{compiler.version} {arch}\n{text}".encode()).hexdigest()
        wrong = None if key in known else compiler.run(name, text, arch)
        if wrong is None:
            compiled.append(key)
        return wrong

    compiled: list[str] = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield {case: pool.submit(attempt, *case) for case in asked}
        pool.shutdown(cancel_futures=True)
    if cache:
        cache.set("narsil/compiled", sorted(known.union(compiled))[-1000:])


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_kernels_compile_for_every_supported_gpu(case: Case, outcomes: dict[Case, Future[str | None]]) -> None:
    """A kernel that compiles only where its author sat is found out by a user. The fused one is empty below sm_90a."""
    assert outcomes[case].result() is None


def test_a_source_that_does_not_compile_says_where() -> None:
    """The compiler's words are all that a report of such a bug can hold."""
    try:
        nvrtc.version()
    except nvrtc.NvrtcError as error:
        assert "Next: pip install" in str(error)
        pytest.skip("no NVRTC on this machine")
    with pytest.raises(nvrtc.NvrtcError, match=r"broken\.cu\(1\): error: identifier \"y\" is undefined"):
        nvrtc.compile_source("__device__ int x = y;", "broken.cu", ("-arch=sm_90",))
