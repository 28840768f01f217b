"""NVIDIA's runtime compiler, bound by ctypes: it needs neither a GPU nor CuPy."""

import ctypes
import functools
import importlib
import importlib.util
from collections.abc import Sequence
from ctypes import byref, c_char_p, c_int, c_size_t, c_void_p
from pathlib import Path
from typing import Any

_LIBRARY = "libnvrtc.so.13"


class NvrtcError(Exception):
    """The compiler is missing, or did not take a source: holds its words."""


def version() -> tuple[int, int]:
    """Raises NvrtcError when there is no compiler."""
    major, minor = c_int(), c_int()
    _check("nvrtcVersion", byref(major), byref(minor))
    return major.value, minor.value


def compile_source(source: str, name: str, options: Sequence[str]) -> bytes:
    """Machine code for the architecture that the options name. `name`: of the file, for messages. Raises NvrtcError."""
    program = c_void_p()
    _check("nvrtcCreateProgram", byref(program), source.encode(), name.encode(), 0, None, None)
    try:
        given = (c_char_p * len(options))(*(option.encode() for option in options))
        try:
            _check("nvrtcCompileProgram", program, len(options), given)
        except NvrtcError as error:
            words = _output(program, "ProgramLog").rstrip(b"\0").decode()
            raise NvrtcError(f"{error}\n{words}") from None
        return _output(program, "CUBIN")
    finally:
        _check("nvrtcDestroyProgram", byref(program))


def _output(program: c_void_p, kind: str) -> bytes:
    size = c_size_t()
    _check(f"nvrtcGet{kind}Size", program, byref(size))
    out = ctypes.create_string_buffer(size.value)
    _check(f"nvrtcGet{kind}", program, out)
    return out.raw


def _check(name: str, *args: object) -> None:
    if status := getattr(_library(), name)(*args):
        text = _library().nvrtcGetErrorString(status)
        raise NvrtcError(f"{name}: {text.decode()}")


@functools.cache
def _library() -> ctypes.CDLL:
    """The one that CuPy's own finder names, else a wheel's, else the loader's."""
    try:
        library = ctypes.CDLL(_path())
    except OSError as error:
        raise NvrtcError(f"{error}. Next: pip install 'narsil-stream[cuda]'") from error
    library.nvrtcGetErrorString.restype = c_char_p
    return library


def _path() -> str:
    try:
        finder: Any = importlib.import_module("cuda.pathfinder")
        return str(finder.load_nvidia_dynamic_lib("nvrtc").abs_path)
    except Exception:  # no finder, or it found none
        spec = importlib.util.find_spec("nvidia")
        wheels = [Path(root) / "cu13" / "lib" / _LIBRARY for root in (spec and spec.submodule_search_locations) or ()]
        return next((str(path) for path in wheels if path.is_file()), _LIBRARY)
